"""Typed JSON back into values; each value has one spelling and every other one is refused. [UCF-50..59, UCF-101..106]"""

from __future__ import annotations

import base64
import binascii
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from math import inf, isfinite, nan, prod

from elastickpt.errors import LimitExceeded, Malformed, Unsupported
from elastickpt.format.arrays import dtype_named
from elastickpt.format.canonical_json import dump
from elastickpt.format.strict_reading import StrictObject, integer, integers, pair, sequence, text
from elastickpt.format.values import (
    FACTORIES,
    MANY,
    MAX_PLAIN_INT,
    ORIGINS,
    ArrayReference,
    ArrayValue,
    DeviceValue,
    DtypeValue,
    EnumValue,
    NamedTupleValue,
    Origin,
    StateReference,
    Value,
    references_spelled,
)
from elastickpt.format.version import MAX_DEPTH, MAX_DIM, MAX_INT_DIGITS, MAX_NDIM, MAX_SMALL_ARRAY_NBYTES

_FLOATS = {"nan": nan, "inf": inf, "-inf": -inf}
_Decoder = Callable[[object, str, int], Value]


def decode_value(obj: object, *, where: str) -> Value:
    """The value that parsed JSON spells. Raises Malformed, LimitExceeded, or Unsupported for an unknown tag.

    [UCF-50]
    """
    return _decode(obj, where, 0)


def _decode(obj: object, where: str, depth: int) -> Value:
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, int):
        if not -MAX_PLAIN_INT <= obj <= MAX_PLAIN_INT:
            raise Malformed(f"{where}: integer {obj} beyond 2^53 without $int")
        return obj
    if isinstance(obj, float):
        if not isfinite(obj):
            raise Malformed(f"{where}: number beyond binary64")
        return obj
    if isinstance(obj, str):
        return text(obj, where=where)
    if isinstance(obj, list):
        return _items(obj, where, depth)
    if isinstance(obj, dict):
        return _object(obj, where, depth)
    raise Malformed(f"{where}: {type(obj).__name__} is no JSON value")


def _object(obj: dict[str, object], where: str, depth: int) -> Value:
    tag = None
    for name in obj:
        if name.startswith("$"):
            tag = name
            break
    if tag is None:
        below = _deeper(where, depth)
        if len(obj) >= MANY and (found := references_spelled(obj)) is not None:
            return found
        return {text(name, where=where): _decode(one, f"{where}/{name}", below) for name, one in obj.items()}
    if len(obj) != 1:
        raise Malformed(f"{where}: tag {tag!r} beside other members")
    decoder = _TAGS.get(tag)
    if decoder is None:
        raise Unsupported(f"{where}: value tag {tag!r} is not known to this release, which knows {', '.join(_TAGS)}")
    return decoder(obj[tag], where, depth)


def _deeper(where: str, depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise LimitExceeded(f"{where}: nested more than {MAX_DEPTH} deep")
    return depth + 1


def _items(obj: object, where: str, depth: int) -> list[Value]:
    below = _deeper(where, depth)
    return [_decode(one, f"{where}/{k}", below) for k, one in enumerate(sequence(obj, where=where))]


def _tuple(obj: object, where: str, depth: int) -> Value:
    return tuple(_items(obj, where, depth))


def _pairs(obj: object, where: str, depth: int) -> list[tuple[object, Value]]:
    below = _deeper(where, depth)
    found: list[tuple[object, Value]] = []
    seen: set[object] = set()
    for k, one in enumerate(sequence(obj, where=where)):
        place = f"{where}/{k}"
        key, value = pair(one, where=place)
        decoded = _hashable(_decode(key, place, below), place)
        if decoded in seen:
            raise Malformed(f"{place}: key {decoded!r} stands twice")
        seen.add(decoded)
        found.append((decoded, _decode(value, place, below)))
    return found


def _hashable(value: Value, where: str) -> object:
    try:
        hash(value)
    except TypeError:
        raise Malformed(f"{where}: a {type(value).__name__} as key or element of a set") from None
    return value


def _map(obj: object, where: str, depth: int) -> Value:
    found = dict(_pairs(obj, where, depth))
    if all(isinstance(key, str) and not key.startswith("$") for key in found):
        raise Malformed(f"{where}: $map where a plain object says the same")
    return found


def _odict(obj: object, where: str, depth: int) -> Value:
    return OrderedDict(_pairs(obj, where, depth))


def _counter(obj: object, where: str, depth: int) -> Value:
    found: Counter[object] = Counter()
    for key, value in _pairs(obj, where, depth):
        dict.__setitem__(found, key, value)  # type: ignore[misc]  # a count may be any value
    return found


def _elements(obj: object, where: str, depth: int) -> frozenset[object]:
    items = _items(obj, where, depth)  # first, since it bounds the nesting
    texts = [dump(one) for one in sequence(obj, where=where)]
    if texts != sorted(set(texts)):
        raise Malformed(f"{where}: elements of a set out of the order of their texts, or twice")
    decoded = [_hashable(one, where) for one in items]
    found = frozenset(decoded)
    if len(found) != len(decoded):
        raise Malformed(f"{where}: equal elements in a set")
    return found


def _set(obj: object, where: str, depth: int) -> Value:
    return set(_elements(obj, where, depth))


def _frozenset(obj: object, where: str, depth: int) -> Value:
    return _elements(obj, where, depth)


def _base64(obj: object, where: str) -> bytes:
    try:
        data = base64.b64decode(text(obj, where=where).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as problem:
        raise Malformed(f"{where}: not base64: {problem}") from None
    if base64.b64encode(data).decode("ascii") != obj:
        raise Malformed(f"{where}: not the canonical base64 of its bytes")
    return data


def _bytes(obj: object, where: str, depth: int) -> Value:
    return _base64(obj, where)


def _float(obj: object, where: str, depth: int) -> Value:
    name = text(obj, where=where)
    if name not in _FLOATS:
        raise Malformed(f"{where}: $float {name!r}, expected one of nan, inf, -inf")
    return _FLOATS[name]


def _int(obj: object, where: str, depth: int) -> Value:
    digits = text(obj, where=where)
    if len(digits) > MAX_INT_DIGITS + 1:
        raise LimitExceeded(f"{where}: $int of {len(digits)} characters, the limit is {MAX_INT_DIGITS} digits")
    try:
        found = int(digits)
    except ValueError:
        raise Malformed(f"{where}: $int {digits[:40]!r} is no integer") from None
    if str(found) != digits or -MAX_PLAIN_INT <= found <= MAX_PLAIN_INT:
        raise Malformed(f"{where}: $int {digits[:40]!r} is not the spelling of an integer beyond 2^53")
    return found


def _part(obj: object, where: str, depth: int) -> float:
    found = _decode(obj, where, depth)
    if not isinstance(found, float):
        raise Malformed(f"{where}: $complex has a part that is no float")
    return found


def _complex(obj: object, where: str, depth: int) -> Value:
    real, imag = pair(obj, where=where)
    return complex(_part(real, where, depth), _part(imag, where, depth))


def _array(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    found = _array_value(members, where, ())
    members.close()
    return found


def _strided(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    order = integers(members.take("order"), where=f"{where}/order")
    found = _array_value(members, where, order)
    members.close()
    if sorted(order) != list(range(len(found.shape))) or sorted(order) == list(order):  # [UCF-104]
        raise Malformed(
            f"{where}: order {list(order)} of {len(found.shape)} axes, expected all of them in another than their own order"
        )
    return found


def _array_value(members: StrictObject, where: str, order: tuple[int, ...]) -> ArrayValue:
    dtype = dtype_named(members.text("dtype"))
    shape = tuple(integer(one, where=f"{where}/shape", high=MAX_DIM) for one in members.sequence("shape"))
    data, origin = _base64(members.take("data"), where), _origin(members, where)
    if len(shape) > MAX_NDIM or len(data) > MAX_SMALL_ARRAY_NBYTES:
        raise LimitExceeded(f"{where}: an array of {len(shape)} axes and {len(data)} bytes inside a value")
    if prod(shape) * dtype.itemsize != len(data):
        raise Malformed(f"{where}: {len(data)} bytes are no {dtype.name} array of shape {shape}")
    return ArrayValue(dtype.name, shape, data, origin, order)


def _origin(members: StrictObject, where: str) -> Origin:
    origin = members.text("origin")
    if origin not in ORIGINS:
        raise Malformed(f"{where}: origin {origin!r} of an array, expected torch or numpy")
    return ORIGINS[origin]


def _tensor(obj: object, where: str, depth: int) -> Value:
    return _reference(obj, where, "torch")


def _numpy(obj: object, where: str, depth: int) -> Value:
    return _reference(obj, where, "numpy")


def _reference(obj: object, where: str, origin: Origin) -> Value:
    if isinstance(obj, dict) and len(obj) == 2:  # as all of them are: a tree of tensors has one each
        item, name = obj.get("item"), obj.get("name")
        if isinstance(item, str) and isinstance(name, str) and item.isascii() and name.isascii():
            return ArrayReference(item, name, origin)
    members = StrictObject(obj, where=where)
    found = ArrayReference(members.text("item"), members.text("name"), origin)
    members.close()
    return found


def _state(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    found = StateReference(_some(members.take("name"), where), _origin(members, where))
    members.close()
    return found


def _some(obj: object, where: str) -> str:
    """A text that says something. [UCF-105]"""
    found = text(obj, where=where)
    if not found:
        raise Malformed(f"{where}: an empty text, expected a name")
    return found


def _dtype(obj: object, where: str, depth: int) -> Value:
    return DtypeValue(_some(obj, where))


def _device(obj: object, where: str, depth: int) -> Value:
    return DeviceValue(_some(obj, where))


def _enum(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    found = EnumValue(_some(members.take("type"), where), _some(members.take("name"), where))
    members.close()
    return found


def _deque(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    maxlen, items = members.take("maxlen"), _items(members.take("items"), where, depth)
    members.close()
    if maxlen is not None and integer(maxlen, where=f"{where}/maxlen") < len(items):  # [UCF-101]
        raise Malformed(f"{where}: {len(items)} elements in a deque of at most {maxlen}")
    return deque(items, None if maxlen is None else integer(maxlen, where=where))


def _defaultdict(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    factory, pairs = members.take("factory"), _pairs(members.take("pairs"), where, depth)
    members.close()
    if factory is None:
        return defaultdict(None, pairs)
    name = text(factory, where=f"{where}/factory")
    if name not in FACTORIES:  # [UCF-102]
        raise Malformed(f"{where}: factory {name!r} of a defaultdict, expected null or one of {', '.join(FACTORIES)}")
    return defaultdict(FACTORIES[name], pairs)


def _named_tuple(obj: object, where: str, depth: int) -> Value:
    members = StrictObject(obj, where=where)
    kind, below = _some(members.take("type"), where), _deeper(where, depth)
    fields = [pair(one, where=where) for one in members.sequence("fields")]
    members.close()
    names = tuple(_some(name, where) for name, _ in fields)
    if len(set(names)) != len(names):  # [UCF-103]
        raise Malformed(f"{where}: a field of a named tuple stands twice")
    values = tuple(_decode(one, f"{where}/{name}", below) for name, (_, one) in zip(names, fields, strict=True))
    return NamedTupleValue(kind, names, values)


_TAGS: dict[str, _Decoder] = {
    "$tuple": _tuple,
    "$bytes": _bytes,
    "$map": _map,
    "$counter": _counter,
    "$odict": _odict,
    "$set": _set,
    "$frozenset": _frozenset,
    "$float": _float,
    "$int": _int,
    "$complex": _complex,
    "$array": _array,
    "$tensor": _tensor,
    "$numpy": _numpy,
    "$state": _state,
    "$strided": _strided,
    "$deque": _deque,
    "$defaultdict": _defaultdict,
    "$namedtuple": _named_tuple,
    "$dtype": _dtype,
    "$device": _device,
    "$enum": _enum,
}


def decode_pointers(obj: object, *, where: str) -> dict[str, Value]:
    """The values of an object whose member names are JSON pointers. Raises as `decode_value`. [UCF-58]"""
    if not isinstance(obj, dict):
        raise Malformed(f"{where}: expected an object of JSON pointers")
    for name in obj:
        if not isinstance(name, str) or not name.startswith("/"):
            raise Malformed(f"{where}: {name!r} is no JSON pointer")
    return {text(name, where=where): decode_value(one, where=f"{where}{name}") for name, one in obj.items()}
