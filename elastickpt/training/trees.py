"""Containers in plain values: walked, copied, compared.

A *place* is the JSON pointer of a value: the key of `state`, then one token a level (`/loader/sampler/3`). Containers
are list, tuple, set, frozenset, dict, OrderedDict, Counter, deque, defaultdict and named tuples, of exactly these types:
a subclass would come back as another type. `torch.Size` counts as tuple.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch

from elastickpt.errors import ValueNotCarried
from elastickpt.format.values import FACTORIES, ArrayReference, NamedTupleValue, StateReference, Value
from elastickpt.format.version import MAX_DEPTH

Leaf = Callable[[object, str], object]
Build = Callable[[NamedTupleValue, str], object]

ATOMS = (type(None), bool, int, float, complex, str, bytes)
_DICTS = (dict, OrderedDict, Counter, defaultdict)
_SEQUENCES = (list, tuple, torch.Size, deque)
_SETS = (set, frozenset)
_CONTAINERS = frozenset((*_DICTS, *_SEQUENCES, *_SETS))


def token(name: object) -> str:
    """One token of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def tokens(names: Sequence[object]) -> list[str]:
    """Of many."""
    if set(map(type, names)) == {str} and not {"~", "/"} & set("".join(names)):  # type: ignore[arg-type]
        return list(names)  # type: ignore[arg-type]
    return list(map(token, names))


def place_of(*names: object) -> str:
    """The JSON pointer with these tokens: ("a", "b/c") -> "/a/b~1c"."""
    return "".join(f"/{token(name)}" for name in names)


def type_name(kind: type) -> str:
    """ "<module>.<qualified name>", without the module for Python's own."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_named_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether `value` is an instance of a class that `typing.NamedTuple` or `collections.namedtuple` made."""
    fields = getattr(type(value), "_fields", None)
    return isinstance(value, tuple) and isinstance(fields, tuple) and len(fields) == len(value)


def is_container(value: object) -> bool:
    """Whether `mapped` goes into it."""
    return type(value) in _CONTAINERS or type(value) is NamedTupleValue or is_named_tuple(value)


def loaded_class(name: str) -> type | None:
    """The class with this `type_name` in a module that this process has loaded; nothing is imported."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        for part in parts[cut:]:
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        if isinstance(found, type):
            return found
    return None


def children(value: object) -> Iterator[tuple[str, object]]:
    """(token, element) of a container's elements in order, nothing for sets and for what is no container."""
    if type(value) is NamedTupleValue:
        yield from zip(map(token, value.fields), value.values, strict=True)
    elif is_named_tuple(value):
        yield from zip(map(token, type(value)._fields), value, strict=True)  # type: ignore[attr-defined]
    elif isinstance(value, dict):
        yield from ((token(key), one) for key, one in value.items())
    elif isinstance(value, _SEQUENCES):
        yield from ((str(index), one) for index, one in enumerate(value))


def _as_it_is(value: NamedTupleValue, place: str) -> object:
    return value


def _in_parts(value: object, place: str) -> None:
    return None


def mapped(value: object, place: str, leaf: Leaf, build: Build = _as_it_is, *, whole: Leaf = _in_parts) -> object:
    """A copy of `value` in which `leaf(element, its place)` stands for everything that is no container, and
    `whole(container, its place)` for a container where that is not None.

    A named tuple becomes what `build` makes of its NamedTupleValue. Raises ValueNotCarried for nesting beyond the limit (so
    also for a container inside itself), for keys or set elements that are no plain hashable values, for a defaultdict's
    factory and a named tuple's class that have no name.
    """
    return _mapped(value, place, _Ways(leaf, build, whole), 0)


class _Ways(NamedTuple):
    leaf: Leaf
    build: Build
    whole: Leaf


def _mapped(value: object, place: str, ways: _Ways, depth: int) -> object:
    kind = type(value)
    if not is_container(value):
        return ways.leaf(value, place)
    if depth >= MAX_DEPTH:
        raise ValueNotCarried(f"value {place}: nested more than {MAX_DEPTH} deep, or inside itself")
    if (instead := ways.whole(value, place)) is not None:
        return instead
    if isinstance(value, dict):
        made = _empty_like(value, place)
        for key, one in value.items():
            made[_key(key, place)] = _mapped(one, f"{place}/{token(key)}", ways, depth + 1)
        return made
    if isinstance(value, (set, frozenset)):
        return type(value)(_key(one, place) for one in value)
    elements = [_mapped(one, f"{place}/{name}", ways, depth + 1) for name, one in children(value)]
    if isinstance(value, NamedTupleValue):
        return ways.build(NamedTupleValue(value.type, value.fields, tuple(elements)), place)
    if is_named_tuple(value):
        fields: tuple[str, ...] = type(value)._fields  # type: ignore[attr-defined]
        return ways.build(NamedTupleValue(_class_name(value, place), fields, tuple(elements)), place)
    if isinstance(value, deque):
        return deque(elements, value.maxlen)
    return elements if kind is list else tuple(elements)


def _empty_like(value: dict[object, object], place: str) -> dict[object, object]:
    if not isinstance(value, defaultdict):
        return type(value)()
    factory = value.default_factory
    if factory is not None and factory not in FACTORIES.values():
        raise ValueNotCarried(
            f"value {place}: a defaultdict that makes its elements by {factory!r} cannot be carried by a checkpoint; expected "
            f"None or one of {', '.join(FACTORIES)}"
        )
    return defaultdict(factory)


def _class_name(value: tuple[Any, ...], place: str) -> str:
    kind = type(value)
    name = type_name(kind)
    if loaded_class(name) is not kind:
        raise ValueNotCarried(
            f"value {place}: a named tuple of class {name}, which is not found under this name: define it at the top of its "
            f"module"
        )
    if getattr(value, "__dict__", None):
        raise ValueNotCarried(f"value {place}: a {name} with attributes beside its fields cannot be carried by a checkpoint")
    return name


def _key(key: object, place: str) -> Hashable:
    kind = type(key)
    if kind in ATOMS:
        return key
    if kind in (tuple, frozenset):
        for one in key:  # type: ignore[attr-defined]
            _key(one, place)
        return key
    what, advice = f"a key or set element of type {type_name(kind)}", ""
    if isinstance(key, torch.Tensor):
        advice = ": key it by a name or a number, or keep it among the parameter's own states"
    raise ValueNotCarried(f"value {place}: {what} cannot be carried by a checkpoint{advice}")


def named_tuple_of(value: NamedTupleValue, place: str) -> tuple[Any, ...]:
    """The named tuple that it was, of the class that this process has loaded; no code of the class runs.

    Raises ValueNotCarried, with the place, where this process has no such class.
    """
    kind = loaded_class(value.type)
    if kind is None or not issubclass(kind, tuple):
        raise ValueNotCarried(
            f"value {place or '/'}: the checkpoint has a named tuple of class {value.type} here, which this process has not "
            f"loaded: import its module before loading"
        )
    if (fields := getattr(kind, "_fields", None)) != value.fields:
        raise ValueNotCarried(
            f"value {place or '/'}: expected a named tuple {value.type} with fields {fields} (in this process), found fields "
            f"{value.fields} (in the checkpoint)"
        )
    made: tuple[Any, ...] = tuple.__new__(kind, value.values)
    return made


def references(value: Value) -> Iterator[ArrayReference | StateReference]:
    """Every reference to an array in the tree."""
    if isinstance(value, (ArrayReference, StateReference)):
        yield value
    for _, one in children(value):
        yield from references(one)


def holds_arrays(value: Value) -> bool:
    """Whether a reference to an array stands anywhere in the tree."""
    return next(references(value), None) is not None


def holds_tensors(value: Value) -> bool:
    """Whether a reference to a tensor stands anywhere in the tree; one to an array of numpy does not count."""
    return any(one.origin == "torch" for one in references(value))
