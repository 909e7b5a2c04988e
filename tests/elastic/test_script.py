"""Scripts of several loops and evaluations, on members of which some are lost at every point: all meet in the same calls again.
No processes; the members are threads, whose trainers meet in one place instead of passing tensors. [REC-61]"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.elastic.links import LinkBroken
from elastickpt.elastic.membership import Compute, LoopEnded
from elastickpt.elastic.mending import Rebuilding
from elastickpt.elastic.messages import Commit, Go
from elastickpt.elastic.passage import Passing
from elastickpt.elastic.policy import Report
from elastickpt.elastic.recovery import From, Moved, Recovery, Seconds
from elastickpt.elastic.reports import Reports
from elastickpt.elastic.script import Position, Script
from elastickpt.elastic.trainer import PipelineTrainer
from tests.elastic.small_model import Corpus

MEMBERS = 3
LIMIT_S = 120.0
BATCHES = [Corpus().batch(0)]
STEPS = {"start": 0, "between": 2, "behind the first": 2, "end": 4} | {f"step {step}": step for step in range(1, 5)}
Call = tuple[str, int]
RECOVERY = Recovery(0.0, 1, 1, 0, "replay", (), "replay", False, From(()), (), Seconds(0.0, 0.0, 0.0, 0.0), Moved())


@dataclass(frozen=True)
class Kill:
    """When all members have met so often, `victim` is lost. `through`: what they met for was done, for those of the others;
    of a step it was for all or for none. `back`: so many steps all roll back, None for no rollback."""

    meeting: int
    victim: int
    through: frozenset[int] = frozenset()
    back: int | None = None


class Killed(BaseException):
    """Of the thread of a member that is lost."""


class Apart(BaseException):
    """The members do not meet: the job stands still."""


@dataclass
class Job:
    """What the members of a job have in common: in it they meet for each step, each evaluation, and at the end."""

    kills: dict[int, Kill]
    changing: threading.Condition = field(default_factory=threading.Condition)
    step: int = 0
    last: Commit | None = None
    generation: int = 1
    meetings: int = 0
    calls: dict[int, Call] = field(default_factory=dict)
    results: dict[int, float] = field(default_factory=dict)
    broken: frozenset[int] = frozenset()
    killed: dict[int, int] = field(default_factory=dict)  # the newest generation in which a place was lost
    formed: dict[int, tuple[Position | None, bool]] = field(default_factory=dict)
    go: Go | None = None
    evaluates_rebuilt: bool = False
    back_to: int | None = None
    rolled_back: bool = False
    told: dict[int, Position] = field(default_factory=dict)
    over: bool = False
    apart: str = ""
    values: Iterator[int] = field(default_factory=count)
    threads: list[threading.Thread] = field(default_factory=list)
    script: Callable[[PipelineTrainer, Callable[[str], None]], None] | None = None
    had: dict[int, dict[str, float]] = field(default_factory=dict)
    reported: dict[int, list[int]] = field(default_factory=dict)

    def run(self) -> None:
        for place in range(MEMBERS):
            self.begin(place)
        for thread in self.threads:  # which grows
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "no member says why, and they stand still"
        assert not self.apart, self.apart

    def on_rebuilt(self, trainer: PipelineTrainer, recovery: Recovery) -> None:
        if self.evaluates_rebuilt:
            member: Any = trainer._tasks
            interrupted, member.name = member.name, f"rebuilt {recovery.generation}"
            trainer.evaluate(BATCHES)
            member.name = interrupted

    def begin(self, place: int) -> None:
        thread = threading.Thread(target=self.member, args=(place,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def member(self, place: int) -> None:
        tasks = Member(self, place)
        trainer = object.__new__(PipelineTrainer)
        trainer._passing, trainer._tasks, trainer._job = Passing(12), tasks, tasks  # type: ignore[assignment]
        trainer._arrived, trainer._reported, trainer._rebuilt_in = None, 0, None
        trainer._on_rebuilt = self.on_rebuilt
        had, self.reported[place] = self.had.setdefault(place, {}), []
        had.clear()

        steps, told = trainer.steps, self.reported[place]

        def reporting(until: int) -> Iterator[Report]:
            for report in steps(until):
                told.append(report.step)
                yield report

        trainer.steps = reporting  # type: ignore[method-assign]

        def evaluated(name: str) -> None:
            tasks.name = name
            had[name] = trainer.evaluate(BATCHES)

        try:
            assert self.script is not None
            self.script(trainer, evaluated)
            trainer._leave()
        except (Killed, Apart):
            pass
        except BaseException as error:
            with self.changing:
                self.say_apart(f"{type(error).__name__}: {error}")
            raise

    def say_apart(self, why: str) -> None:
        self.apart = self.apart or why
        self.changing.notify_all()

    # with `changing`

    def meet(self, place: int, call: Call) -> None:
        self.calls[place] = call
        if len(self.calls) < MEMBERS:
            return
        if len(set(self.calls.values())) > 1:
            self.say_apart(f"the members are at {self.calls}, after {self.meetings} meetings")
            return
        number, self.calls = self.meetings, {}
        self.meetings += 1
        kill, (kind, step) = self.kills.get(number), call
        through = frozenset(range(MEMBERS)) if kill is None else kill.through - {kill.victim}
        if kill is not None and kind == "step" and kill.through:
            through = frozenset(range(MEMBERS)) - {kill.victim}
        if kind == "step" and through:
            self.step, self.last = step, Commit(self.generation, step, (None,) * MEMBERS, 0.5)
        if kind == "left" and kill is None:
            self.over = True
        value = float(next(self.values))
        self.results = dict.fromkeys(through, value)
        if kill is not None:
            self.broken = frozenset(range(MEMBERS)) - through - {kill.victim}
            self.lose(kill)
        self.changing.notify_all()

    def stands(self, generation: int) -> bool:
        """Whether all members of this generation stand, or there is a newer one."""
        return self.go is not None or self.generation != generation

    def lose(self, kill: Kill) -> None:
        self.killed[kill.victim] = self.generation
        self.generation += 1
        self.formed, self.go = {}, None
        if kill.back is not None:
            self.back_to = max(0, self.step - kill.back)
        self.begin(kill.victim)

    def form(self, place: int, position: Position | None, *, evaluating: bool) -> None:
        self.formed[place] = (position, evaluating)
        if len(self.formed) < MEMBERS:
            return
        furthest: Position | None = None
        for one, _ in self.formed.values():
            furthest = one if furthest is None else furthest if one is None else one.further(furthest)
        self.step = self.step if self.back_to is None else self.back_to
        last = self.last if self.last is not None and self.last.step == self.step else None
        evaluating = any(one for _, one in self.formed.values())
        recovered = replace(RECOVERY, generation=self.generation, step=self.step) if self.generation > 1 else None
        self.go, self.calls = Go(self.generation, self.step, last, evaluating, False, furthest, recovered), {}
        self.rolled_back = self.back_to is not None
        self.back_to, self.broken, self.results = None, frozenset(), {}
        self.changing.notify_all()


class Member:
    """The tasks and the job of one member, as its trainer knows both."""

    rank, epoch = 0, 1

    def __init__(self, job: Job, place: int) -> None:
        self._all, self._place = job, place
        self.generation = 0  # in which it stands
        self.born = job.generation
        self.reports, self.script = Reports(), Script()
        self.step, self.evaluating = 0, False
        self.history = self.saves = self
        self._left = False
        self.passage = self.stage = self
        self.name = ""  # of the evaluation that it has begun
        self.module = torch.nn.Identity()
        self.norms: object = None
        self.pending, self.trained = Rebuilding(), {}  # type: ignore[var-annotated]
        self._task: Task | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("loop_body", "waiting"):
            return lambda: nullcontext()
        raise AttributeError(name)

    def at(self, *_: object) -> None:
        """Nothing is saved."""

    def state(self) -> dict[str, object]:
        return {}

    def mended(self, recovery: object) -> None:
        """It keeps no history."""

    def part(self) -> None:
        """It has no links."""

    def _wait(self, done: Callable[[], bool]) -> None:
        """Raises Killed or Apart where this is lost meanwhile."""
        job = self._all
        assert job.changing.wait_for(
            lambda: bool(job.apart) or job.killed.get(self._place, -1) >= self.born or done(), LIMIT_S
        ), "no member comes"
        if job.apart:
            raise Apart
        if job.killed.get(self._place, -1) >= self.born:
            raise Killed

    def standing(self) -> Any:
        job = self._all
        with job.changing:
            while True:
                if self._left:
                    self._wait(lambda: job.over or job.generation != self.generation)
                    if job.over and job.generation == self.generation:
                        return None
                self._wait(lambda: True)
                if self.generation == job.generation:
                    return self._task
                generation, self._left = job.generation, False
                at = self.script.furthest
                if self.script.position.tells_of_step and self.reports.is_due_of(self.step):
                    at = replace(at, met=False)
                job.form(self._place, None if self.reports.new else at, evaluating=self.evaluating)
                self._wait(partial(job.stands, generation))
                if job.generation == generation and job.go is not None:
                    break
            self.generation, go = generation, job.go
            if job.rolled_back:
                self.reports.rolled_back(go.step)
            self.step, self._task = go.step, Task(Compute(go.step + 1, go), generation)
            return self._task

    def require_standing(self) -> tuple[Any, Any]:
        return self, self

    def meet(self, task: object, *, evaluates: bool = False) -> bool:
        if self.script.position.met:
            return True
        job = self._all
        with job.changing:
            job.told[self._place] = replace(self.script.position, evaluates=evaluates)
        with suppress(LinkBroken):
            self._met(("position", self.step))
            if self.script.meet(job.told.values()):
                self.reports.repeat()
        return False

    def _met(self, call: Call) -> float:
        job = self._all
        with job.changing:
            if job.generation != self.generation:
                raise LinkBroken("a newer view is known")
            meetings = job.meetings
            job.meet(self._place, call)
            self._wait(lambda: job.meetings > meetings or job.generation != self.generation)
            if self._place in job.broken or self._place not in job.results:
                raise LinkBroken("lost")
            return job.results[self._place]

    def evaluate(self, batches: object) -> float:
        step = next((step for name, step in STEPS.items() if self.name.startswith(name)), None)
        assert step in (self.step, None), f"{self.name!r} after step {self.step}"
        return self._met((self.name, self.step))

    def give_up(self, task: object, error: object) -> None:
        """What was under way is gone."""

    def compute(self, task: object) -> None:
        try:
            self._met(("step", self.step + 1))
        except LinkBroken:
            return
        self.step += 1
        self.script.stepped(self.step)
        self.reports.committed(self._all.last)  # type: ignore[arg-type]
        self._task = Task(Compute(self.step + 1, None), self.generation)

    def done(self, task: object, outcome: LoopEnded) -> None:
        job = self._all
        with job.changing:
            if job.generation == self.generation:
                self._left = True
                job.meet(self._place, ("left", self.step))


@dataclass(eq=False)
class Task:
    act: Compute
    generation: int


# -- scripts. Each evaluation has a name of its own, with the step that it belongs to.

Evaluates = Callable[[str], None]


def one_loop(trainer: PipelineTrainer, evaluated: Evaluates) -> None:
    for report in trainer.steps(4):
        if report.step % 2 == 0:
            evaluated(f"step {report.step}, first")
            evaluated(f"step {report.step}, second")
    evaluated("end, first")
    evaluated("end, second")


def two_loops(trainer: PipelineTrainer, evaluated: Evaluates) -> None:
    evaluated("start")
    for report in trainer.steps(2):
        if report.step == 2:
            evaluated("step 2")
    evaluated("between, first")
    evaluated("between, second")
    for report in trainer.steps(4):
        if report.step == 3:
            evaluated("step 3")
    evaluated("end")


def loops_that_are_left(trainer: PipelineTrainer, evaluated: Evaluates) -> None:
    for report in trainer.steps(9):
        evaluated(f"step {report.step}")
        if report.step == 2:
            break
    evaluated("behind the first")
    for report in trainer.steps(9):
        if report.step == 3:
            break
    for _ in trainer.steps(4):
        pass
    evaluated("end")


def loops_of_nothing_else(trainer: PipelineTrainer, evaluated: Evaluates) -> None:
    for until in (1, 2, 2, 4):
        for _ in trainer.steps(until):
            pass
    evaluated("end")


SCRIPTS = [one_loop, two_loops, loops_that_are_left, loops_of_nothing_else]
MEETINGS = {one_loop: 11, two_loops: 11, loops_that_are_left: 9, loops_of_nothing_else: 6}


def carried_out(script: Callable[..., None], *kills: Kill, evaluates_rebuilt: bool = False) -> Job:
    job = Job({kill.meeting: kill for kill in kills}, script=script, evaluates_rebuilt=evaluates_rebuilt)
    job.run()
    assert job.step == 4
    return job


def had_by_all(script: Callable[..., None], *kills: Kill) -> list[dict[str, float]]:
    """What each member that is there at the end has had, by the names of the evaluations."""
    job = carried_out(script, *kills)
    return [job.had[place] for place in range(MEMBERS)]


def assert_equal_or_none(had: list[dict[str, float]]) -> None:
    """No two members have different numbers of one evaluation; who has none has NaN, or never began it."""
    for name in {name for one in had for name in one}:
        numbers = {one[name] for one in had if name in one and not math.isnan(one[name])}
        assert len(numbers) <= 1, f"{name}: {numbers}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_lost(script: Callable[..., None]) -> None:
    had = had_by_all(script)
    assert had[0] == had[1] == had[2]
    assert had[0]
    assert not any(math.isnan(one) for one in had[0].values())


@pytest.mark.parametrize(
    ("meeting", "through", "first"),
    [
        (0, False, 1),  # in the first step
        (0, True, 2),  # behind its decision
        (1, False, 2),
        (1, True, 2),  # after which all evaluate
        (2, False, 2),  # in an evaluation
        (3, True, 3),
        (4, False, 3),  # in the step after one after which they did
        (4, True, 4),
    ],
)
def test_the_first_report_of_who_takes_a_place_is_the_next_step(meeting: int, through: bool, first: int) -> None:
    """Or, to join what is evaluated then, the last one. [REC-61]"""
    job = carried_out(one_loop, Kill(meeting, 0, frozenset(range(MEMBERS) if through else ())))
    assert job.reported == {0: list(range(first, 5)), 1: [1, 2, 3, 4], 2: [1, 2, 3, 4]}


def test_steps_on_the_way_back_are_not_reported() -> None:
    """All are rolled back as they evaluate behind the first loop, which is over. [REC-61]"""
    job = carried_out(two_loops, Kill(4, 0, back=1))
    assert job.reported == {0: [3, 4], 1: [1, 2, 3, 4], 2: [1, 2, 3, 4]}


THROUGH = (frozenset[int](), frozenset({1}), frozenset({0, 1, 2}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_at_every_meeting(script: Callable[..., None]) -> None:
    """With every way in which it may be known to the others, and every way back. [REC-61]"""
    for meeting in range(MEETINGS[script]):
        for through in THROUGH:
            for back in (None, 0, 1, 2, 4):
                had = had_by_all(script, Kill(meeting, 0, through, back))
                assert_equal_or_none(had)
                if back is None:  # nobody who stood through it misses anything
                    assert had[1] == had[2]
                    assert not any(math.isnan(one) for one in had[1].values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_as_the_members_tell_each_other_where_they_are(script: Callable[..., None]) -> None:
    """At their first meeting behind a loss; some may know by then, and others do not. [REC-61]"""
    for meeting in range(MEETINGS[script]):
        for through in THROUGH:
            for first in (Kill(meeting, 0, back=1), Kill(meeting, 0, back=2), Kill(meeting, 0, frozenset({1}))):
                assert_equal_or_none(had_by_all(script, first, Kill(meeting + 1, 2, through)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_evaluated_when_all_is_rebuilt(script: Callable[..., None]) -> None:
    """Wherever in the script the members are; a loss may interrupt that, too. [REC-61]"""
    for meeting in range(MEETINGS[script]):
        for first in (Kill(meeting, 0), Kill(meeting, 0, frozenset({1})), Kill(meeting, 0, back=1)):
            for more in ([], [Kill(meeting + 1, 2, frozenset({1}))]):
                carried_out(script, first, *more, evaluates_rebuilt=True)


@settings(max_examples=100, deadline=None)
@given(
    script=st.sampled_from(SCRIPTS),
    kills=st.lists(
        st.builds(
            Kill,
            meeting=st.integers(0, 16),
            victim=st.integers(0, MEMBERS - 1),
            through=st.frozensets(st.integers(0, MEMBERS - 1)),
            back=st.sampled_from([None, 0, 1, 2, 4]),
        ),
        min_size=2,
        max_size=4,
        unique_by=lambda kill: kill.meeting,
    ),
)
def test_losses_upon_losses(script: Callable[..., None], kills: list[Kill]) -> None:
    """[REC-61]"""
    assert_equal_or_none(had_by_all(script, *kills))
