"""Medians and how far the repeats lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, extremes and quartiles of one measure's repeats, in the unit of the repeats."""

    count: int
    median: float
    low: float
    high: float
    quartile_low: float
    quartile_high: float

    @property
    def relative_range(self) -> float:
        """(high - low) / median: above 1 the machine was busy with something else."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of at least one value. Quartiles are interpolated between the values that exist.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no repeats to summarise")
    ordered = sorted(values)
    if len(ordered) == 1:
        only = ordered[0]
        return Spread(1, only, only, only, only, only)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(
        len(ordered),
        statistics.median(ordered),
        ordered[0],
        ordered[-1],
        quartile_low=quartiles[0],
        quartile_high=quartiles[2],
    )


def ratio_to_floor(floor_s: float, taken_s: float) -> float:
    """The share of the floor's speed that was reached: 1.0 is the floor, 0.5 takes twice as long."""
    if floor_s <= 0 or taken_s <= 0:
        raise ValueError(f"durations must be positive, not {floor_s} and {taken_s}")
    return floor_s / taken_s
