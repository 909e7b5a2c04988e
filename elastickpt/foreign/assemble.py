"""From arrays, groups and values back to the nested value that torch saves: the inverse of `nested.sort_out`. [FOR-37..39]"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from elastickpt.errors import StructureConflict
from elastickpt.foreign.file_plans import NewTensor
from elastickpt.foreign.listing import LocalName, ParamGroup, StateScalar, TiedName
from elastickpt.foreign.plain_values import from_plain
from elastickpt.format.values import ArrayReference

Keyed: TypeAlias = Literal["number", "name"]


@dataclass(frozen=True, slots=True)
class NewArray:
    """A whole array that a file shall hold; `state` is "" for a tensor that is no state of a parameter."""

    item: str
    name: LocalName
    state: str
    tensor: NewTensor


@dataclass(frozen=True, slots=True)
class NewState:
    """All that is to be saved; names as in a `ForeignCheckpoint`, `values` by JSON pointer."""

    arrays: tuple[NewArray, ...]
    groups: tuple[ParamGroup, ...] = ()
    scalars: tuple[StateScalar, ...] = ()
    tied: tuple[TiedName, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict)


def assemble(state: NewState, *, keyed: Keyed) -> dict[str, object]:
    """The value: a mapping of items, dotted ones nested. Optimizers' states are keyed by number, as `state_dict` of torch
    does, with `param_names` beside them, or by name, as `torch.distributed.checkpoint` does.

    Raises StructureConflict where two things have one place.
    """
    root: dict[str, object] = {}
    optimizers = {group.item for group in state.groups}
    for array in state.arrays:
        if array.state == "value" and array.item not in optimizers:
            _put(root, (*array.item.split("."), array.name), array.tensor)
    for tie in state.tied:
        at = (*tie.item.split("."), tie.name)
        _put(root, (*tie.item.split("."), tie.alias), _get(root, at))
    for item in sorted(optimizers):
        _put(root, tuple(item.split(".")), _optimizer(state, item, keyed))
    lists = []
    for pointer, value in sorted(state.values.items(), key=lambda pair: pair[0].count("/")):
        if isinstance(value, list) and _holds(root, state.values, pointer):
            lists.append((_tokens(pointer), len(value)))
        else:
            _put(root, _tokens(pointer), _with_tensors(from_plain(value), state.arrays))
    for array in state.arrays:
        if not array.state and not array.name:
            _put(root, (array.item,), array.tensor)
    for path, count in reversed(lists):
        _make_list(root, path, count)
    return root


def _holds(root: Mapping[str, object], values: Mapping[str, object], pointer: str) -> bool:
    """Whether what is in a list stands by itself."""
    at: object = root
    for name in _tokens(pointer):
        at = at.get(name) if isinstance(at, Mapping) else None
    return at is not None or any(other.startswith(f"{pointer}/") for other in values)


def _make_list(root: dict[str, object], path: tuple[str, ...], count: int) -> None:
    above = _get(root, path[:-1])
    found = above.get(path[-1], {}) if isinstance(above, dict) else None
    places = [str(k) for k in range(count)]
    if not isinstance(above, dict) or not isinstance(found, dict) or not found.keys() <= set(places):
        raise StructureConflict(f"{'/'.join(path)}: a list of {count} and a mapping of other things")
    above[path[-1]] = [found.get(place) for place in places]


def _optimizer(state: NewState, item: str, keyed: Keyed) -> dict[str, object]:
    groups = [group for group in state.groups if group.item == item]
    number: dict[LocalName, int] = {}
    for group in groups:
        for name in group.members:
            number.setdefault(name, len(number))
    states: dict[LocalName, dict[str, object]] = {}
    for array in state.arrays:
        if array.item == item:
            states.setdefault(array.name, {})[array.state] = array.tensor
    for scalar in state.scalars:
        if scalar.item == item:
            states.setdefault(scalar.name, {})[scalar.state] = scalar.value
    strange = next((name for name in states if name not in number), None)
    if strange is not None:
        raise StructureConflict(f"{item}: states of {strange!r}, which is in no param group")
    key_of = number if keyed == "number" else {name: name for name in number}
    made: list[dict[str, object]] = []
    for group in groups:
        options = {name: from_plain(value) for name, value in group.options.items()}
        if keyed == "number" and all(isinstance(name, str) for name in group.members):
            options["param_names"] = list(group.members)
        made.append({**options, "params": [key_of[name] for name in group.members]})
    return {"state": {key_of[name]: states[name] for name in number if name in states}, "param_groups": made}


def _tokens(pointer: str) -> tuple[str, ...]:
    return tuple(one.replace("~1", "/").replace("~0", "~") for one in pointer.split("/")[1:])


def _put(root: dict[str, object], path: tuple[object, ...], value: object) -> None:
    at: dict[object, object] = root  # type: ignore[assignment]
    for name in path[:-1]:
        below = at.setdefault(name, {})
        if not isinstance(below, dict):
            raise StructureConflict(f"{'/'.join(map(str, path))}: {name!r} is a value and a mapping of further ones")
        at = below
    if path[-1] in at:
        raise StructureConflict(f"{'/'.join(map(str, path))}: two things have this place in the file")
    at[path[-1]] = value


def _get(root: Mapping[str, object], path: tuple[object, ...]) -> object:
    at: object = root
    for name in path:
        if not isinstance(at, Mapping) or name not in at:
            raise StructureConflict(f"{'/'.join(map(str, path))}: a tied name, and there is no such tensor")
        at = at[name]
    return at


def _with_tensors(value: object, arrays: Iterable[NewArray]) -> object:
    """The value with tensors where it refers to arrays."""
    if isinstance(value, ArrayReference):
        for array in arrays:
            if (array.item, array.name, array.state) == (value.item, value.name, ""):
                return array.tensor
        raise StructureConflict(f"{value.item}/{value.name}: a value refers to this array, and there is none")
    if isinstance(value, dict):
        return type(value)((key, _with_tensors(one, arrays)) for key, one in value.items())
    if isinstance(value, list):
        return [_with_tensors(one, arrays) for one in value]
    if isinstance(value, tuple):
        return tuple(_with_tensors(one, arrays) for one in value)
    return value
