"""When a save is due: alike on all ranks, at the interval that loses least. [RUN-90..93]"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import Refused
from elastickpt.runs.due import LEAD_STEPS, Every, Measured, YoungDaly, decide_step, due, interval_s, mtbf_s, young_daly_s


def test_by_steps_a_save_is_due_at_multiples() -> None:
    """[RUN-90]"""
    assert [step for step in range(11) if due(Every(steps=5), step=step, published=())] == [5, 10]


def test_by_clock_a_save_is_due_where_it_was_published_and_nowhere_else() -> None:
    """[RUN-91]"""
    assert [step for step in range(11) if due(Every(seconds=5.0), step=step, published={4, 9})] == [4, 9]


@pytest.mark.parametrize(
    "wrong", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"steps": 1.5}, {"seconds": 0.0}, {"seconds": math.inf}]
)
def test_a_rule_that_says_nothing_or_two_things_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refused):
        Every(**wrong)  # type: ignore[arg-type]


@given(st.floats(0.01, 100), st.floats(1e3, 1e6))
def test_the_interval_of_young_and_daly_loses_least(stall_s: float, mtbf: float) -> None:
    """Loss per second: stall / interval + interval / (2 MTBF); no interval near it has less. [RUN-93]"""

    def loss(interval: float) -> float:
        return stall_s / interval + interval / (2 * mtbf)

    best = young_daly_s(stall_s=stall_s, mtbf_s=mtbf)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_where_a_save_costs_more_than_failures_leave_the_interval_is_the_mean_time_between_them() -> None:
    assert young_daly_s(stall_s=1e6, mtbf_s=100.0) == 100.0


def test_failures_that_were_seen_correct_what_was_believed() -> None:
    belief = YoungDaly(mtbf_s=3600.0)
    assert mtbf_s(belief, Measured(1.0, 0.0, 0)) == 3600.0
    assert mtbf_s(belief, Measured(1.0, 3600.0, 0)) == 7200.0
    assert mtbf_s(belief, Measured(1.0, 6400.0, 9)) == 1000.0
    assert interval_s(belief, Measured(2.0, 6400.0, 9)) == pytest.approx(math.sqrt(4000))
    assert interval_s(Every(steps=5), Measured(1.0, 0.0, 0)) is None


@given(st.floats(0.1, 10), st.floats(0.1, 200), st.integers(1, 300))
def test_saves_by_clock_come_at_the_interval_for_steps_that_nobody_has_reached(step_s: float, interval: float, n: int) -> None:
    """[RUN-91, RUN-92]"""
    published: set[int] = set()
    saved = 0
    for step in range(1, n):
        pending = {one for one in published if one > saved}
        decided = decide_step(
            step=step, since_save_s=(step - saved) * step_s, step_s=step_s, interval_s=interval, published=pending
        )
        if decided is not None:
            assert decided == step + LEAD_STEPS
            published.add(decided)
        if due(Every(seconds=interval), step=step, published=published):
            late = (step - saved) * step_s - interval
            assert -step_s / 2 - 1e-9 <= late <= max(step_s, LEAD_STEPS * step_s + step_s - interval) + 1e-9
            saved = step
