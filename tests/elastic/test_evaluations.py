"""Evaluations that a loss interrupts: begun again, or given up where all roll back. No job; `test_script` has whole scripts.
[REC-53, REC-61]"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from elastickpt.elastic.links import LinkBroken
from elastickpt.elastic.membership import Compute
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.reports import Reports
from elastickpt.elastic.script import Script
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
        self.reports, self.script, self.generation = Reports(), Script(), 1
        self.reports.new = False
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

    def meet(self, task: object, *, evaluates: bool = False) -> bool:
        return True

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
    found._passing, found._tasks, found._reported = Passing(12), tasks, 0  # type: ignore[assignment]
    found._rebuilt_in = None
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
    tasks.script.begin_loop()
    trainer._reported = 6
    assert math.isnan(trainer.evaluate([Corpus().batch(0)]))
    assert (tasks.computed, tasks.evaluating, tasks.step) == ([], False, 3)


def test_behind_the_loop_the_way_there_is_gone_once_more() -> None:
    tasks = Rolled(6, [3, 4])
    tasks.script.end_loop(tasks.script.begin_loop(), 6)
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
