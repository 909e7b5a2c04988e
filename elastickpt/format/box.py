"""Half-open hyperrectangles in an array's global coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import gt, sub

from elastickpt.errors import Malformed


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
        return cls((0,) * len(shape), tuple(shape))

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

    def __str__(self) -> str:
        return "[" + ", ".join(f"{low}:{high}" for low, high in zip(self.start, self.stop, strict=True)) + "]"
