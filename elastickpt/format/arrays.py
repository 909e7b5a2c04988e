"""What an array is, independent of ranks: identity, shape, element type; boxes in it, and the axes ranks are arranged on.

Bits are stored as they are, little-endian, never through a float round trip. An element type without a registered zarr
name is stored as `uint8` with one more axis of its size in bytes and the attribute `stored_as`, its name. [UCF-20..23]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import attrgetter, eq, gt, sub
from typing import Literal, NoReturn

from elastickpt.errors import LimitExceeded, Malformed, Unsupported
from elastickpt.format.version import MAX_DIM, MAX_NDIM

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


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements with `start[k] <= index[k] < stop[k]` on every axis k; a 0-d box has exactly one element.

    [FRAG-1]
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise Malformed(f"box start has {len(self.start)} axes, its stop {len(self.stop)}")
        if any(map(gt, self.start, self.stop)) or min(self.start, default=0) < 0:
            raise Malformed(f"box [{self.start}, {self.stop}): expected 0 <= start <= stop on every axis")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of all elements of an array of this shape."""
        return _whole_box(tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether it has none."""
        return any(map(eq, self.start, self.stop))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{low}:{high}" for low, high in zip(self.start, self.stop, strict=True)) + "]"


@lru_cache(maxsize=4096)  # many arrays have one shape
def _whole_box(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), tuple(map(int, shape)))  # whoever asked first, with what kind of integers


Section = Literal["params", "extra"]


@dataclass(frozen=True, slots=True, order=True)
class ArrayId:
    """Which array: a state of a parameter (`params`), or another tensor of the user's state (`extra`).

    `params`: `item` is the key of `state` under which the model stands, `name` the FQN, `state` is `value`,
    `exp_avg`, ...
    `extra`: `item` is the key of `state`, `name` the JSON pointer below it without its first slash ("" for a tensor
    that stands at the item itself), `state` is "".
    """

    section: Section
    item: str
    name: str
    state: str

    def __post_init__(self) -> None:
        if (self.section == "extra") == bool(self.state):
            raise Malformed(f"array {self.item!r}/{self.name!r}: state {self.state!r} does not fit section {self.section!r}")

    def __hash__(self) -> int:  # names alone tell nearly all arrays apart, and a load asks for each of them ten times
        return hash((self.name, self.state))

    def __str__(self) -> str:
        parts = (self.section, self.item, self.name, self.state)
        return "/".join(part for part in parts if part)


id_key = attrgetter("section", "item", "name", "state")  # what an `ArrayId` says, as a tuple


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a checkpoint: shape in elements, element type by zarr name."""

    id: ArrayId
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        for extent in self.shape:
            if not 0 <= extent <= MAX_DIM:
                self._refuse()
        if len(self.shape) > MAX_NDIM:
            self._refuse()
        if self.dtype not in DTYPES:
            dtype_named(self.dtype)

    def _refuse(self) -> NoReturn:
        if min(self.shape) < 0:
            raise Malformed(f"array {self.id}: shape {self.shape} has an extent below 0")
        raise LimitExceeded(  # [UCF-93]
            f"array {self.id}: shape {self.shape} is beyond {MAX_NDIM} axes or 2^48 elements an axis"
        )

    @property
    def type(self) -> DType:
        return dtype_named(self.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.type.itemsize


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named parallel axes with sizes, the first one slowest, over these ranks in C order."""

    name: str
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.sizes) or len(set(self.axes)) != len(self.axes):
            raise Malformed(f"mesh {self.name!r}: axes {self.axes} and sizes {self.sizes} do not fit together")
        if any(size < 1 for size in self.sizes) or prod(self.sizes) != len(self.ranks):
            raise Malformed(f"mesh {self.name!r}: sizes {self.sizes} need {prod(self.sizes)} ranks, found {len(self.ranks)}")
        if len(set(self.ranks)) != len(self.ranks):
            raise Malformed(f"mesh {self.name!r}: a rank stands in it twice")

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """The place of a rank, one index per axis. Raises Malformed for a rank outside the mesh."""
        try:
            flat = self.ranks.index(rank)
        except ValueError:
            raise Malformed(f"mesh {self.name!r} has no rank {rank}") from None
        found = []
        for size in reversed(self.sizes):
            flat, index = divmod(flat, size)
            found.append(index)
        return tuple(reversed(found))
