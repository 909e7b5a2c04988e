"""Plain values that a checkpoint carries; `encode_values` and `decode_values` are their typed JSON. [UCF-50..59, UCF-101..106]

A value is None, bool, int, float, complex, str, bytes, a list, a tuple, a set, a frozenset, a dict with hashable
keys, a Counter, an OrderedDict, a deque, a defaultdict with a factory of `FACTORIES`, or one of the dataclasses below; of
exactly these types, since a subclass would come back as something else. JSON has no tuple, bytes, integer keys, NaN or
integers beyond 2^53: those are objects with one member whose name starts with `$`. What has no tag is refused at save time.

Numbers as programs hold them (Python's own, numpy's, tensors of one element and no dimension) are read here too, without
importing either library.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Literal, TypeAlias

MAX_PLAIN_INT = 2**53  # integers up to here are exact in every JSON reader

Origin = Literal["torch", "numpy"]
ORIGINS: Mapping[str, Origin] = {"torch": "torch", "numpy": "numpy"}

FACTORIES: Mapping[str, Callable[[], object]] = {
    kind.__name__: kind for kind in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}  # of a defaultdict, by name; [UCF-102]


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A small array inside a value: zarr element type, shape, little-endian bytes in C order, its origin in memory.

    `order` are its axes by falling stride, () where that is their own order: how it lay in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    origin: Origin
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ArrayReference:
    """Stands where a tensor (or numpy array) stood that is stored as an array of section `extra`: that ArrayId's item
    and name; for a composite tensor the name that its parts' names begin with."""

    item: str
    name: str
    origin: Origin = "torch"


@dataclass(frozen=True, slots=True)
class StateReference:
    """Stands, in a field of an optimizer table, where a tensor (or numpy array) stood that is stored as a state of the same
    parameter: that state's name."""

    name: str
    origin: Origin = "torch"


@dataclass(frozen=True, slots=True)
class NamedTupleValue:
    """A named tuple: its class as "<module>.<qualified name>", its fields' names and values."""

    type: str
    fields: tuple[str, ...]
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class DtypeValue:
    """An element type of torch, by its name there: "float32"."""

    name: str


@dataclass(frozen=True, slots=True)
class DeviceValue:
    """A device of torch, as torch spells it: "cuda:0"."""

    name: str


@dataclass(frozen=True, slots=True)
class EnumValue:
    """A member of an enumeration: its class as "<module>.<qualified name>", and its own name."""

    type: str
    name: str


Value: TypeAlias = object  # checked by `encode_value`, which refuses what has no tag


MANY = 8  # members of an object: from here on references are looked for at once


def references_spelled(obj: dict[str, object]) -> dict[str, Value] | None:
    """What typed JSON spells that is an object of nothing but references to tensors, as they are usually spelled; None for any
    other one."""
    found: dict[str, Value] = {}
    for name, one in obj.items():
        if type(one) is not dict or len(one) != 1:
            return None
        body = one.get("$tensor")
        if type(body) is not dict or len(body) != 2:
            return None
        item, own = body.get("item"), body.get("name")
        if type(item) is not str or type(own) is not str or not (item.isascii() and own.isascii() and name.isascii()):
            return None
        found[name] = ArrayReference(item, own)
    return found


def as_integer(value: object) -> object:
    """The int that a value is by its own word (`__index__`: numpy's integers, tensors of one); any other value as it is, for
    whoever checks it. A bool is no number."""
    if type(value) is int or isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return value


def as_real(value: object) -> float | None:
    """The number that a scalar is; None for what is none: texts, bools, complex numbers, anything with a dimension, and a
    distributed tensor that no rank holds whole. Waits for the device of a tensor."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        if any(not one.is_replicate() for one in getattr(value, "placements", ())):
            return None
        value = getattr(value, "to_local", lambda: value)().item()
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def described(value: object) -> str:
    """What a value is, in few words: its shape if it has one."""
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"{value!r:.80}" if shape is None else f"a {kind} of shape {tuple(shape)} and {getattr(value, 'dtype', 'no dtype')}"
