"""Element types: the names zarr knows them by, sizes, and the fill value that makes a lost chunk loud. [UCF-20..23]

Bits are stored as they are, little-endian, never through a float round trip. An element type without a registered zarr
name is stored as `uint8` with one more axis of its size in bytes and the attribute `stored_as`, its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import Unsupported

FillValue = str | int | bool | tuple[str, str]
Support = Literal["core", "extension"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. `name` is zarr's `data_type`; `support` says whether zarr v3 core defines it."""

    name: str
    itemsize: int
    fill_value: FillValue
    support: Support


def _signed(bits: int) -> DType:
    return DType(f"int{bits}", bits // 8, -(2 ** (bits - 1)), "core")


def _unsigned(bits: int) -> DType:
    return DType(f"uint{bits}", bits // 8, 2**bits - 1, "core")


_ALL = (
    DType("bool", 1, True, "core"),
    *(_signed(bits) for bits in (8, 16, 32, 64)),
    *(_unsigned(bits) for bits in (8, 16, 32, 64)),
    *(DType(f"float{bits}", bits // 8, "NaN", "core") for bits in (16, 32, 64)),
    *(DType(f"complex{bits}", bits // 8, ("NaN", "NaN"), "core") for bits in (64, 128)),
    DType("bfloat16", 2, "NaN", "extension"),
    DType("float8_e4m3fn", 1, "NaN", "extension"),  # not registered; read by tensorstore. Never `float8_e4m3`.
    DType("float8_e4m3fnuz", 1, "NaN", "extension"),
    DType("float8_e5m2", 1, "NaN", "extension"),
    DType("float8_e5m2fnuz", 1, "NaN", "extension"),
    DType("float8_e8m0fnu", 1, "NaN", "extension"),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}


def dtype_named(name: str) -> DType:
    """The element type with zarr's `data_type` name. Raises Unsupported for a name this release does not know."""
    try:
        return DTYPES[name]
    except KeyError:
        known = ", ".join(DTYPES)
        raise Unsupported(f"element type {name!r} is not known to this release, which knows {known}") from None
