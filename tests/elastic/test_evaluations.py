"""Evaluations that a loss interrupts: begun again, or given up where all roll back. No job. [REC-53, REC-61]"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from elastickpt.elastic.links import LinkBroken
from elastickpt.elastic.membership import Compute
from elastickpt.elastic.messages import Commit
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.reports import Evaluations, Reports
from elastickpt.elastic.stages import Place
from elastickpt.elastic.trainer import PipelineTrainer
from elastickpt.errors import RecoveryFailed
from tests.elastic.small_model import Corpus, build

LOSS = 2.5


class Rolled:
    """Tasks of a member that stands after `step`. As often as there are `goes` a loss interrupts an evaluation: they say after
    how many steps all stand then, None for the end of the job."""

    def __init__(self, step: int, goes: list[int | None]) -> None:
        self.step, self.evaluating, self.computed = step, False, list[int]()
        self.reports, self.evaluations, self.generation = Reports(), Evaluations(), 1
        self._goes, self._over = goes, False
        self.history: Any = None

    def standing(self) -> Any:
        return None if self._over else self

    @property
    def act(self) -> Compute:
        return Compute(self.step + 1, None)

    def require_standing(self) -> tuple[Any, Any]:
        return self, self

    @property
    def stage(self) -> Any:
        return self._stage

    _stage: Any = None

    @property
    def passage(self) -> Any:
        return self

    def evaluate(self, batches: object) -> float:
        assert self.evaluating
        if not self._goes:
            return LOSS
        raise LinkBroken("lost")

    def give_up(self, task: object, error: object) -> None:
        step = self._goes.pop(0)
        self._over = step is None
        self.step = self.step if step is None else step

    def compute(self, task: object) -> None:
        self.computed.append(self.step)
        self.step += 1


@dataclass(frozen=True)
class Alone:
    """The job of a member that waits for nobody."""

    rank: int | None = 0
    epoch: int = 1

    def loop_body(self) -> AbstractContextManager[None]:
        return nullcontext()

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()


def trainer_with(tasks: Rolled) -> PipelineTrainer:
    tasks._stage = build(Place(0, 1), Passing(12))
    found = object.__new__(PipelineTrainer)
    found._passing, found._tasks, found._at_report = Passing(12), tasks, False  # type: ignore[assignment]
    found._is_late = found._is_past = False
    found._job = Alone()  # type: ignore[assignment]
    found._at_boundary = tasks.standing  # type: ignore[method-assign]
    return found


def test_an_evaluation_is_begun_again() -> None:
    tasks = Rolled(6, [6, 6])
    assert trainer_with(tasks).evaluate([Corpus().batch(0)]) == LOSS
    assert (tasks.computed, tasks.evaluating) == ([], False)


def test_what_was_to_be_evaluated_within_the_loop_is_gone_with_a_rollback() -> None:
    tasks = Rolled(6, [6, 3])
    trainer = trainer_with(tasks)
    trainer._at_report = True
    assert math.isnan(trainer.evaluate([Corpus().batch(0)]))
    assert (tasks.computed, tasks.evaluating, tasks.step) == ([], False, 3)


def test_behind_the_loop_the_way_there_is_gone_once_more() -> None:
    tasks = Rolled(6, [3, 4])
    assert trainer_with(tasks).evaluate([Corpus().batch(0)]) == LOSS
    assert (tasks.computed, tasks.step) == ([3, 4, 5, 4, 5], 6)


def test_a_job_that_ends_while_it_evaluates() -> None:
    trainer = trainer_with(Rolled(6, [None]))
    trainer._job = Alone(rank=3)  # type: ignore[assignment]
    with pytest.raises(RecoveryFailed, match="ended while it evaluated"):
        trainer.evaluate([Corpus().batch(0)])


def test_a_spare_whose_loop_ended_with_the_job_evaluates_nothing() -> None:
    """A script that evaluates behind its loop does so on members, and is no error on who was none. [REC-61]"""
    trainer = trainer_with(Rolled(6, [None]))
    trainer._job = Alone(rank=None)  # type: ignore[assignment]
    assert math.isnan(trainer.evaluate([Corpus().batch(0)]))


def test_the_loop_is_at_a_report_while_the_user_has_it() -> None:
    tasks = Rolled(1, [])
    trainer = trainer_with(tasks)
    trainer._job = Alone(epoch=1)  # type: ignore[assignment]
    tasks.reports.committed(Commit(1, 1, (1.0,), 0.5))
    for report in trainer.steps(1):
        assert (report.step, trainer._at_report) == (1, True)
    assert trainer._at_report is False


def test_what_others_have_had_is_not_evaluated_again() -> None:
    """By a member that was interrupted when some had the result already, and by one that took a place since; the next one is
    evaluated by all. [REC-61]"""
    tasks = Rolled(6, [6])
    tasks.evaluations.stand(6, (1.5, 2.0))
    trainer = trainer_with(tasks)
    assert [trainer.evaluate([Corpus().batch(0)]) for _ in range(3)] == [1.5, 2.0, LOSS]
    assert tasks.evaluations.values == (1.5, 2.0, LOSS)
    tasks.evaluations.stand(7)
    assert (tasks.evaluations.known(), tasks.evaluations.values) == (None, ())


def test_a_loop_that_others_have_left_behind_is_passed_by() -> None:
    """Who took a place goes through the whole script: what belongs to earlier steps is over. [REC-61]"""
    tasks = Rolled(7, [])
    trainer = trainer_with(tasks)
    trainer._is_late = True
    tasks.reports.committed(Commit(1, 7, (1.0,), 0.5))
    assert list(trainer.steps(5)) == []
    assert math.isnan(trainer.evaluate([Corpus().batch(0)]))
    trainer._job = Alone(epoch=1)  # type: ignore[assignment]
    assert [report.step for report in trainer.steps(7)] == [7]
    tasks.reports.new = False
    assert trainer.evaluate([Corpus().batch(0)]) == LOSS


@pytest.mark.parametrize("late", [False, True])
def test_what_is_evaluated_before_the_loop_is_so_by_who_was_there(*, late: bool) -> None:
    """[REC-61]"""
    tasks = Rolled(3, [])
    trainer = trainer_with(tasks)
    trainer._is_late = late  # as it shows once the place is taken
    assert math.isnan(trainer.evaluate([Corpus().batch(0)])) is late
    assert tasks.evaluating is False
