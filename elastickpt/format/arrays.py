"""What an array is, independent of ranks: identity, shape, element type. And the axes ranks are arranged on."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.dtypes import DType, dtype_named
from elastickpt.format.limits import MAX_DIM, MAX_NDIM

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

    def __str__(self) -> str:
        parts = (self.section, self.item, self.name, self.state)
        return "/".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a checkpoint: shape in elements, element type by zarr name."""

    id: ArrayId
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if any(extent < 0 for extent in self.shape):
            raise Malformed(f"array {self.id}: shape {self.shape} has an extent below 0")
        if len(self.shape) > MAX_NDIM or any(extent > MAX_DIM for extent in self.shape):  # [UCF-93]
            raise LimitExceeded(f"array {self.id}: shape {self.shape} is beyond {MAX_NDIM} axes or 2^48 elements an axis")
        dtype_named(self.dtype)

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
