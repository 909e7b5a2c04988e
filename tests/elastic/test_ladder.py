"""From what lost stages are rebuilt: each by the first rung that is possible for it; of those passed over it is said why."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from elastickpt.elastic.held_run import Newest
from elastickpt.elastic.job import Choose
from elastickpt.elastic.ladder import Known, sources_of
from elastickpt.elastic.limits import PhaseTimes
from elastickpt.elastic.messages import StageSource, Terms
from elastickpt.elastic.neighbours import alpha
from elastickpt.ledger.names import AttemptId

STAGES = 6
ALL = ("stale", "partner", "checkfree", "rollback")
NEWEST = Newest(AttemptId(90, 1, 1), "runs/a/step-90")
NORMS = {stage: 1.0 + stage for stage in range(STAGES)}


def chosen(
    *lost: int, terms: Terms, step: int = 100, **about: Any
) -> tuple[dict[int, StageSource], dict[int, list[tuple[str, str]]]]:
    """The sources by stage, and what was considered."""
    finite = frozenset(range(STAGES)) - {*lost} - {*about.pop("infinite", ())}
    order = Choose(3, step, tuple(lost), finite, False, about.pop("refused", ()))
    sources, considered = sources_of(Known(order, about.pop("newest", NEWEST), about.pop("norms", NORMS)), terms, STAGES)
    by_stage: dict[int, list[tuple[str, str]]] = {}
    for one in considered:
        by_stage.setdefault(one.stage, []).append((one.rung, one.why))
    return sources, by_stage


def test_the_first_rung_that_is_possible() -> None:
    """[REC-43, REC-67]"""
    terms = Terms(run="runs/a", rungs=ALL, swap=True, max_stale_steps=10)
    sources, considered = chosen(2, terms=terms)
    assert sources == {2: StageSource(2, "stale", path=NEWEST.path, step=90)}
    assert considered == {2: [("stale", "possible")]}
    sources, considered = chosen(2, 5, terms=terms, step=101)
    assert sources == {2: StageSource(2, "checkfree", (1, 3), alpha(NORMS[1], NORMS[3])), 5: StageSource(5, "partner", (4,))}
    assert considered[5] == [
        ("stale", "the newest checkpoint is 11 steps old, more than max_stale_steps=10"),
        ("partner", "possible"),
    ]
    assert [rung for rung, _ in considered[2]] == ["stale", "partner", "checkfree"]
    assert considered[2][1] == ("partner", "it has no partner")


@pytest.mark.parametrize(
    ("lost", "swap", "about", "why"),
    [
        ((2, 3), True, {}, "a neighbour is lost too"),
        ((0, 1), True, {}, "it is of an end pair, which has its partner only"),
        ((0,), False, {}, "it has one neighbour only"),
        ((2,), True, {"infinite": [3]}, "tensors of stage 3 are not finite"),
        ((2,), True, {"refused": ((StageSource(2, "checkfree", (1, 3)), "it broke"),)}, "it was tried, and failed: it broke"),
    ],
)
def test_two_beside_each_other_an_end_and_infinite_tensors_go_down_the_ladder(
    lost: tuple[int, ...], swap: bool, about: dict[str, Any], why: str
) -> None:
    """Said, and never made up. [REC-7, REC-43]"""
    terms = Terms(run="runs/a", rungs=("partner", "checkfree", "rollback"), swap=swap)
    sources, considered = chosen(*lost, terms=terms, **about)
    assert {one.rung for one in sources.values()} == {"rollback"}
    assert dict(considered[lost[0]])["checkfree"] == why
    nowhere = Terms(rungs=("partner", "checkfree", "rollback"), swap=swap)
    sources, considered = chosen(*lost, terms=nowhere, newest=None, **about)
    assert lost[0] not in sources
    assert dict(considered[lost[0]])["rollback"] == "the job has no run with checkpoints"


def test_limits_in_force_are_said_when_they_are_found_and_when_they_change(caplog: pytest.LogCaptureFixture) -> None:
    """[REC-33]"""
    caplog.set_level(logging.INFO)
    history = PhaseTimes()
    for seconds in (1.0, 2.0, 4.0, 4.0):
        history.note("step", seconds, now=0.0)
        history.log_changes()
    said = [one.getMessage() for one in caplog.records]
    assert said == ["limits of progress: step 30 s", "limits of progress: step 40 s"]
