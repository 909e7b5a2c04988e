"""Values into typed JSON: each value has one spelling; what has no tag is refused with its path. [UCF-50..59,
UCF-101..106]
"""

from __future__ import annotations

import base64
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import isfinite, isnan, prod
from typing import Any, cast

from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import DTYPES
from elastickpt.format.canonical_json import dump, dump_sorted
from elastickpt.format.digest import file_digest
from elastickpt.format.values import (
    FACTORIES,
    MANY,
    MAX_PLAIN_INT,
    ArrayReference,
    ArrayValue,
    DeviceValue,
    DtypeValue,
    EnumValue,
    NamedTupleValue,
    StateReference,
    Value,
)
from elastickpt.format.version import MAX_DEPTH, MAX_INT_DIGITS, MAX_SMALL_ARRAY_NBYTES


def pointer_token(name: object) -> str:
    """One token of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def _refuse(value: object, where: str) -> ValueNotCarried:
    kind = type(value).__name__
    if type(value).__module__ not in ("builtins", "collections"):
        kind = f"{type(value).__module__}.{kind}"
    article = "an" if kind[0].lower() in "aeiou" else "a"
    return ValueNotCarried(f"{where or '/'}: {article} {kind} cannot be carried by a checkpoint")


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueNotCarried(f"{where or '/'}: text with a lone surrogate cannot be carried by a checkpoint") from None
    return value


def _int(value: int, where: str) -> object:
    if -MAX_PLAIN_INT <= value <= MAX_PLAIN_INT:
        return value
    if abs(value) >= 10**MAX_INT_DIGITS:
        raise ValueNotCarried(f"{where or '/'}: an integer of more than {MAX_INT_DIGITS} digits")
    return {"$int": str(value)}


def _float(value: float) -> object:
    if isfinite(value):
        return value
    return {"$float": "nan" if isnan(value) else "inf" if value > 0 else "-inf"}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _array(value: ArrayValue, where: str) -> object:
    known = DTYPES.get(value.dtype)
    if known is None or len(value.data) != prod(value.shape) * known.itemsize:
        raise ValueNotCarried(f"{where or '/'}: {len(value.data)} bytes are no {value.dtype} array of shape {value.shape}")
    if len(value.data) > MAX_SMALL_ARRAY_NBYTES:
        raise ValueNotCarried(
            f"{where or '/'}: an array of {len(value.data)} bytes inside a value; the limit is {MAX_SMALL_ARRAY_NBYTES}"
        )
    body = {"dtype": value.dtype, "shape": list(value.shape), "data": _base64(value.data), "origin": value.origin}
    if not value.order:
        return {"$array": body}
    return {"$strided": {**body, "order": list(value.order)}}


def _reference(value: ArrayReference, where: str) -> object:
    if value.item.isascii() and value.name.isascii() and value.origin == "torch":  # nearly all
        return {"$tensor": {"item": value.item, "name": value.name}}
    tag = "$tensor" if value.origin == "torch" else "$numpy"
    return {tag: {"item": _text(value.item, where), "name": _text(value.name, where)}}


def _state(value: StateReference, where: str) -> object:
    return {"$state": {"name": _text(value.name, where), "origin": value.origin}}


def _enum(value: EnumValue, where: str) -> object:
    return {"$enum": {"type": _text(value.type, where), "name": _text(value.name, where)}}


_LEAVES: Mapping[type, Callable[[Any, str], object]] = {
    int: _int,
    float: lambda value, where: _float(value),
    str: _text,
    bytes: lambda value, where: {"$bytes": _base64(value)},
    complex: lambda value, where: {"$complex": [_float(value.real), _float(value.imag)]},
    ArrayValue: _array,
    ArrayReference: _reference,
    StateReference: _state,
    DtypeValue: lambda value, where: {"$dtype": _text(value.name, where)},
    DeviceValue: lambda value, where: {"$device": _text(value.name, where)},
    EnumValue: _enum,
}


def _items(values: Iterable[object], where: str, depth: int) -> list[object]:
    return [_encode(one, f"{where}/{k}", depth) for k, one in enumerate(values)]


def _pairs(value: Mapping[object, object], where: str, depth: int) -> list[object]:
    found: list[object] = []
    for key, one in value.items():
        place = f"{where}/{pointer_token(key)}"
        found.append([_encode(key, place, depth), _encode(one, place, depth)])
    _distinct((pair[0] for pair in found if isinstance(pair, list)), where)
    return found


def _distinct(encoded: Iterable[object], where: str) -> list[str]:
    """The canonical texts. Two NaN are two keys in memory and one on disk, hence the check."""
    texts = [dump(one) for one in encoded]
    if len(set(texts)) != len(texts):
        raise ValueNotCarried(f"{where or '/'}: two keys or elements that are the same on disk")
    return texts


def _set(value: Iterable[object], where: str, depth: int) -> list[object]:
    encoded = [_encode(one, where, depth) for one in value]
    return [one for _, one in sorted(zip(_distinct(encoded, where), encoded, strict=True), key=lambda pair: pair[0])]


def _dict(value: dict[object, object], where: str, depth: int) -> object:
    if all(type(key) is str and not key.startswith("$") for key in value):
        if len(value) >= MANY and set(map(type, value.values())) == {ArrayReference}:
            return {_text(str(key), where): _reference(one, f"{where}/{key!s}") for key, one in value.items()}  # type: ignore[arg-type]
        return {_text(str(key), where): _encode(one, f"{where}/{pointer_token(key)}", depth) for key, one in value.items()}
    return {"$map": _pairs(value, where, depth)}


def _encode(value: object, where: str, depth: int) -> object:
    if value is None or type(value) is bool:
        return value
    leaf = _LEAVES.get(type(value))
    if leaf is not None:
        return leaf(value, where)
    return _encode_container(value, where, depth + 1)


def _deque(value: deque[object], where: str, depth: int) -> object:
    return {"$deque": {"maxlen": value.maxlen, "items": _items(value, where, depth)}}


def _defaultdict(value: defaultdict[object, object], where: str, depth: int) -> object:
    names = [name for name, factory in FACTORIES.items() if factory is value.default_factory]
    if value.default_factory is not None and not names:
        raise ValueNotCarried(
            f"{where or '/'}: a defaultdict whose factory is {value.default_factory!r} cannot be carried by a checkpoint, "
            f"expected None or one of {', '.join(FACTORIES)}"
        )
    return {"$defaultdict": {"factory": names[0] if names else None, "pairs": _pairs(value, where, depth)}}


def _named_tuple(value: NamedTupleValue, where: str, depth: int) -> object:
    fields = zip(value.fields, value.values, strict=True)
    pairs = [[_text(name, where), _encode(one, f"{where}/{pointer_token(name)}", depth)] for name, one in fields]
    return {"$namedtuple": {"type": _text(value.type, where), "fields": pairs}}


_NODES: Mapping[type, Callable[[Any, str, int], object]] = {
    list: _items,
    tuple: lambda value, where, depth: {"$tuple": _items(value, where, depth)},
    dict: _dict,
    OrderedDict: lambda value, where, depth: {"$odict": _pairs(value, where, depth)},
    Counter: lambda value, where, depth: {"$counter": _pairs(value, where, depth)},
    set: lambda value, where, depth: {"$set": _set(value, where, depth)},
    frozenset: lambda value, where, depth: {"$frozenset": _set(value, where, depth)},
    deque: _deque,
    defaultdict: _defaultdict,
    NamedTupleValue: _named_tuple,
}


def _encode_container(value: object, where: str, depth: int) -> object:
    node = _NODES.get(type(value))
    if node is None:
        raise _refuse(value, where)
    if depth > MAX_DEPTH:
        raise ValueNotCarried(f"{where}: nested more than {MAX_DEPTH} deep (or inside itself)")
    return node(value, where, depth)


def encode_value(value: Value, *, where: str) -> object:
    """The typed JSON of a value: None, bool, int, float, str, list and dict only, for `canonical_json.dump`. [UCF-50]

    `where` is the value's JSON pointer, which messages begin with. Raises ValueNotCarried for what has no tag.
    """
    return _encode(value, where, 0)


def _unordered(typed: object) -> object:
    """Typed JSON with the pairs of mappings in the order of their texts, since filling order is no difference."""
    if isinstance(typed, list):
        return [_unordered(one) for one in typed]
    if not isinstance(typed, dict):
        return typed
    found = {name: _unordered(one) for name, one in typed.items()}
    for tag in ("$map", "$counter"):
        pairs = found.get(tag)
        if isinstance(pairs, list):
            found[tag] = sorted(pairs, key=dump_sorted)
    body = found.get("$defaultdict")
    if isinstance(body, dict) and isinstance(pairs := body.get("pairs"), list):
        body["pairs"] = sorted(pairs, key=dump_sorted)
    return found


_UNORDERED = ('{"$map":', '{"$counter":', '{"$defaultdict":')


def typed_digest(typed: object, text: str) -> str:
    """`value_digest` of a value whose typed JSON this is, as it is and as text."""
    ordered = _unordered(typed) if any(tag in text for tag in _UNORDERED) else typed
    return file_digest(dump_sorted(ordered).encode("ascii"))


def value_digest(value: Value, *, where: str = "") -> str:
    """The xxh3-128 (32 hex digits) of the value's canonical typed JSON; equal for values that are equal, types
    included.

    The filling order of plain dicts and Counters does not count; that of an OrderedDict does. Raises ValueNotCarried.
    """
    return file_digest(dump_sorted(_unordered(encode_value(value, where=where))).encode("ascii"))


def typed_key(value: Value) -> Hashable:
    """Equal for two values exactly when they have the same types and bits: 1 is not True, 0.0 is not -0.0, NaN is NaN.

    The filling order of dicts does not count, that of an OrderedDict does.
    """
    kind = type(value)
    if isinstance(value, float):
        return (kind, struct.pack("<d", value))
    if isinstance(value, complex):
        return (kind, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, dict):
        pairs = ((typed_key(key), typed_key(one)) for key, one in value.items())
        made = getattr(value, "default_factory", None)
        return (kind, made, frozenset(pairs) if kind is not OrderedDict else tuple(pairs))
    if isinstance(value, NamedTupleValue):
        return (kind, value.type, value.fields, tuple(typed_key(one) for one in value.values))
    if isinstance(value, deque):
        return (kind, value.maxlen, tuple(typed_key(one) for one in value))
    if kind in (list, tuple):
        return (kind, tuple(typed_key(one) for one in cast(Sequence[Value], value)))
    if kind in (set, frozenset):
        return (kind, frozenset(typed_key(one) for one in cast(Sequence[Value], value)))
    return (kind, value)


def values_equal(one: Value, other: Value) -> bool:
    """True when both have the same types and bits, as `typed_key` has them."""
    return one is other or typed_key(one) == typed_key(other)


def encode_pointers(values: Value, *, where: str) -> dict[str, object]:
    """The typed JSON of a mapping from JSON pointers to values. Raises ValueNotCarried. [UCF-58]"""
    return {name: encode_value(one, where=name) for name, one in require_pointers(values, where=where).items()}


def require_pointers(values: Value, *, where: str) -> Mapping[str, Any]:
    """The mapping itself. Raises ValueNotCarried where it is none, or not from JSON pointers. [UCF-58]"""
    if not isinstance(values, Mapping):
        raise ValueNotCarried(f"{where}: expected a mapping from JSON pointers, found {type(values).__name__}")
    for name in values:
        if not isinstance(name, str) or not name.startswith("/"):
            raise ValueNotCarried(f"{where}: {name!r} is no JSON pointer")
        _text(name, where)
    return values
