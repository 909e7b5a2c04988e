"""Plain values that a checkpoint carries, and their typed JSON. What has no tag here is refused at save time. [UCF-50..59]

A value is None, bool, int, float, str, bytes, a list, a tuple, a set, a frozenset, a dict with hashable keys, a Counter, an
OrderedDict, or a small `ArrayValue`. JSON has no tuple, bytes, integer keys, NaN or integers beyond 2^53: those are objects
with one member whose name starts with `$`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A small array inside a value: zarr element type, shape, little-endian bytes in C order, and what it was in memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    origin: Literal["torch", "numpy"]


@dataclass(frozen=True, slots=True)
class ArrayReference:
    """Stands in a value tree where a tensor stood that is stored as an array of section `extra`: its ArrayId item and name."""

    item: str
    name: str


Value: TypeAlias = object  # checked by `encode_value`, which refuses what has no tag
