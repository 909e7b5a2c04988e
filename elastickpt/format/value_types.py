"""What a value may be beyond Python's own plain types. [UCF-50..59]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

MAX_PLAIN_INT = 2**53  # integers up to here are exact in every JSON reader


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A small array inside a value: zarr element type, shape, little-endian bytes in C order, its origin in memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    origin: Literal["torch", "numpy"]


@dataclass(frozen=True, slots=True)
class ArrayReference:
    """Stands where a tensor stood that is stored as an array of section `extra`: that ArrayId's item and name."""

    item: str
    name: str


Value: TypeAlias = object  # checked by `encode_value`, which refuses what has no tag
