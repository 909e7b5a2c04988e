"""Medians and spreads are those of the standard definition, against a slow obvious reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.spread import ratio_to_floor, spread_of

durations = st.lists(st.floats(min_value=1e-6, max_value=1e4), min_size=1, max_size=20)


@given(durations)
def test_median_has_as_many_values_on_each_side(values: list[float]) -> None:
    spread = spread_of(values)
    below = sum(value < spread.median for value in values)
    above = sum(value > spread.median for value in values)
    assert below <= len(values) / 2
    assert above <= len(values) / 2


@given(durations)
def test_quartiles_lie_in_order_between_the_extremes(values: list[float]) -> None:
    spread = spread_of(values)
    assert (spread.count, spread.low, spread.high) == (len(values), min(values), max(values))
    slack = 1e-9 * spread.high  # interpolation rounds
    assert spread.low <= spread.quartile_low + slack
    assert spread.quartile_low <= spread.median + slack
    assert spread.median <= spread.quartile_high + slack
    assert spread.quartile_high <= spread.high + slack


def test_five_repeats_give_the_textbook_values() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.median, spread.quartile_low, spread.quartile_high) == (3.0, 2.0, 4.0)
    assert spread.relative_range == pytest.approx(4 / 3)


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="no repeats"):
        spread_of([])


def test_taking_twice_as_long_as_the_floor_is_half_of_it() -> None:
    assert ratio_to_floor(1.0, 2.0) == 0.5


@pytest.mark.parametrize(("floor", "taken"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_durations_that_are_not_positive_are_refused(floor: float, taken: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio_to_floor(floor, taken)
