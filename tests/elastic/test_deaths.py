"""Members that die at every point of a job, as threads whose connection ends; the others go on from one step.
[REC-10..16, REC-41]"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from inside import Inside, inside

from elastickpt.elastic.duties import TaskOver
from elastickpt.elastic.job import Choose, Chosen
from elastickpt.elastic.joining import Job
from elastickpt.elastic.membership import Compute, Computed, Form, LoopEnded, Made, Mend, Mended, Stop, TakeStep, Took
from elastickpt.elastic.messages import Commit, StageSource, Terms
from elastickpt.elastic.recovery import Considered
from elastickpt.errors import CheckpointError, DeadlineExceeded

STAGES, STEPS, PATIENCE_S = 3, 4, 240.0
POINTS = ("form", "mend", "compute", "sent", "computed", "step", "took", "leave")


class AlwaysStale:
    """Whatever is lost is read from a checkpoint of the step at which all stand."""

    def choose(self, order: Choose, last: Commit | None) -> tuple[Chosen, tuple[Considered, ...]]:
        return Chosen(order.generation, tuple(StageSource(k, "stale", path="x", step=order.step) for k in order.lost)), ()

    def close(self) -> None:
        return None


class Died(Exception):
    pass


@dataclass
class Fate:
    """Who dies where: (point, stage, step of the act), each once."""

    deaths: set[tuple[str, int, int]]
    met: list[tuple[str, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, point: str, stage: int | None, step: int) -> None:
        with self.lock:
            found = (point, stage or 0, step)
            if found in self.deaths:
                self.deaths.remove(found)
                self.met.append(found)
                raise Died


class Trainee:
    """A member whose state is the number of steps that it has taken. In each step it waits for a word of every other one."""

    def __init__(self, job: Job, fate: Fate) -> None:
        self.job, self.fate, self.state, self.stages = job, fate, 0, 0
        self.begun: dict[int, float] = {}  # by generation, as commits say
        job.declare(Terms())

    def live(self) -> None:
        acts: dict[type, Callable[..., None]] = {Form: self.form, Mend: self.mend, Compute: self.compute, TakeStep: self.step}
        while not isinstance(act := (task := self.job.next_task()).act, Stop):
            try:
                acts[type(act)](task, act)
            except TaskOver:
                assert task.over

    def hear_all(self, task: object, key: str) -> None:
        exchange = self.job.exchange(task)  # type: ignore[arg-type]
        exchange.set(f"{key}/{self.job.rank}", str(self.state).encode())
        heard = exchange.get_all([f"{key}/{stage}" for stage in range(self.stages)], limit_s=PATIENCE_S)
        assert set(heard) == {str(self.state).encode()}, key

    def form(self, task: object, act: Form) -> None:
        self.stages = len(act.view.places)
        self.fate.at("form", self.job.rank, act.view.step)
        if self.job.rank in act.view.lost:
            self.state = act.view.step
        self.hear_all(task, "form")
        self.job.done(task, Made())  # type: ignore[arg-type]

    def mend(self, task: object, act: Mend) -> None:
        self.fate.at("mend", self.job.rank, act.view.step)
        self.job.done(task, Mended(moved=1))  # type: ignore[arg-type]

    def compute(self, task: object, act: Compute) -> None:
        assert self.state == act.step - 1
        if act.go is not None and act.go.last is not None:
            self.begun |= dict(act.go.last.begun)
        if act.step > STEPS:
            self.fate.at("leave", self.job.rank, 1)
            self.job.done(task, LoopEnded())  # type: ignore[arg-type]
            return
        self.fate.at("compute", self.job.rank, act.step)
        self.job.began()
        self.hear_all(task, f"step-{act.step}")
        self.fate.at("sent", self.job.rank, act.step)
        self.job.done(task, Computed(norm=1.0))  # type: ignore[arg-type]
        self.fate.at("computed", self.job.rank, act.step)

    def step(self, task: object, act: TakeStep) -> None:
        assert self.state == act.step - 1
        self.fate.at("step", self.job.rank, act.step)
        self.state = act.step
        if act.commit is not None:
            self.begun |= dict(act.commit.begun)
        self.job.done(task, Took())  # type: ignore[arg-type]
        self.fate.at("took", self.job.rank, act.step)


def run(folder: Path, deaths: set[tuple[str, int, int]], *, spares: int) -> tuple[Inside, Fate, list[Trainee]]:
    """A whole job; the members that were there at its end."""
    fate, stood, errors = Fate(set(deaths)), [], []
    all_in = threading.Barrier(STAGES + spares, timeout=PATIENCE_S)
    with inside(folder, STAGES, of=lambda terms, stages: AlwaysStale()) as job:

        def process(uid: str) -> None:
            with_end = None
            try:
                member = job.join(uid)
                try:
                    all_in.wait()
                    trainee = Trainee(member, fate)
                    trainee.live()
                    with_end = member.end
                    if member.rank is not None:
                        stood.append(trainee)
                finally:
                    member.close()
            except Died:
                return
            except (CheckpointError, AssertionError) as error:
                errors.append(error)
            assert with_end is not None, errors

        threads = [threading.Thread(target=process, args=(f"m{k}",)) for k in range(STAGES + spares)]
        for thread in threads:
            thread.start()
        end = job.wait()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not [thread for thread in threads if thread.is_alive()]
        assert (end.code, errors) == (0, []), end
    return job, fate, stood


def check(folder: Path, deaths: set[tuple[str, int, int]], *, spares: int) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    job, fate, stood = run(folder, deaths, spares=spares)
    assert [one.state for one in stood] == [STEPS] * STAGES
    begun = {generation: seconds for one in stood for generation, seconds in one.begun.items()}
    lost = [(event["step"], one["stage"]) for event in job.events("recovery") for one in event["lost"]]
    assert len(lost) == len([one for one in fate.met if one[:1] != ("form",) or one[2] > 0])
    for event in job.events("recovery"):
        seconds = [one for one in event["seconds"].values() if one is not None]
        assert seconds == sorted(seconds)
        first = event["seconds"]["first_microbatch"]
        assert begun.get(event["generation"], first) == first
        if first is not None and event["step"] < STEPS:
            assert event["generation"] in begun
    assert threading.active_count() <= threads + 1  # the pool of the ladder's thread may still be ending
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("point", POINTS)
def test_a_death_at_every_point(tmp_path: Path, point: str, stage: int) -> None:
    """A member of the first view that dies while it forms is no recovery: nothing was done yet."""
    step = {"form": 0, "mend": 0, "leave": 1}.get(point, 2)
    deaths = {(point, stage, step)}
    if point == "mend":
        deaths = {("compute", (stage + 1) % STAGES, 2), ("mend", stage, 1)}
    check(tmp_path, deaths, spares=2)


@pytest.mark.parametrize("second", ["form", "mend", "compute", "computed", "step"])
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_death_during_the_recovery_from_another_one(tmp_path: Path, second: str, stage: int) -> None:
    """Or right after it; also of the one that has just taken the place."""
    step = {"form": 1, "mend": 1}.get(second, 2)
    check(tmp_path, {("sent", 1, 2), (second, stage, step)}, spares=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100))
def test_deaths_at_random(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    deaths = {(draw.choice(POINTS[2:7]), draw.randrange(STAGES), draw.randint(1, STEPS)) for _ in range(draw.randint(1, 4))}
    by_step: dict[int, int] = {}
    kept = set()
    for one in sorted(deaths):
        by_step[one[2]] = by_step.get(one[2], 0) + 1
        if by_step[one[2]] < 2:  # more of one step would end the job
            kept.add(one)
    check(tmp_path, kept, spares=len(kept))


def test_a_key_that_nobody_sets(tmp_path: Path) -> None:
    with inside(tmp_path, 1) as job:
        member = job.join("a")
        task = member.next_task()
        with pytest.raises(DeadlineExceeded, match=r"nobody set 'x' of generation 1 within 0.05 s"):
            member.exchange(task).get("x", limit_s=0.05)
        member.exchange(task).set("x", b"1")
        assert member.exchange(task).get("x", limit_s=20.0) == b"1"
        member.close()
