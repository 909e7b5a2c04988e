"""What a value may be beyond Python's own plain types. [UCF-50..59, UCF-101..106]"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
