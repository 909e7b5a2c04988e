"""What a coordinator decides beside the table of `coordination`: values and times only; and what a member does at the end."""

from __future__ import annotations

from typing import Any

import pytest

from elastickpt.elastic.conductor import Conductor
from elastickpt.elastic.deeds import AskLadder, KillWorker, Replace
from elastickpt.elastic.enlisting import Stopped
from elastickpt.elastic.job import Chosen, JobPhase
from elastickpt.elastic.limits import Limits
from elastickpt.elastic.membership import Stop
from elastickpt.elastic.messages import Beat, End, Formed, Join, Rebuilt
from elastickpt.elastic.policy import Policy
from elastickpt.elastic.replacing import Replacing
from elastickpt.elastic.tasks import Tasks, Training


class Conducted:
    """A conductor whose workers are the test's; its clock stands still."""

    def __init__(self, stages: int, workers: int) -> None:
        self.conductor = Conductor(stages, Limits(), Replacing(workers, 9), clock_offset=0.0)
        for number in range(workers):
            self.comes(f"w{number}")

    def comes(self, uid: str) -> None:
        self.conductor.started(uid, 0.0)
        assert self.conductor.joined(Join(uid, 1, "host", "zone"), 0.0)

    def dies(self, uid: str) -> None:
        self.conductor.stopped(Stopped(uid, 9, -1), 0.0)

    def forms(self) -> None:
        job = self.conductor.job
        for uid in job.members:
            self.conductor.heard(uid, Formed(job.generation, True), 0.0)

    def rebuilds(self) -> None:
        """Members stand once they have done their part."""
        if any(isinstance(deed, AskLadder) for deed in self.conductor.deeds):
            self.conductor.ladder_chose(Chosen(self.conductor.job.generation, ()), (), 0.0)
        for uid in self.conductor.job.members:
            self.conductor.heard(uid, Rebuilt(self.conductor.job.generation), 0.0)

    def replacements(self) -> int:
        """Those that were ordered since this was asked last."""
        deeds, self.conductor.deeds = self.conductor.deeds, []
        return sum(deed.count for deed in deeds if isinstance(deed, Replace))


def test_a_process_in_place_of_a_lost_one_is_started_once_members_stand() -> None:
    """What it takes to start is taken from nobody who recovers. [REC-34]"""
    job = Conducted(2, 3)
    job.forms()
    job.rebuilds()
    assert (job.conductor.job.phase, job.replacements()) == (JobPhase.WORKING, 0)
    job.dies("w0")
    assert (job.conductor.job.phase, job.replacements()) == (JobPhase.FORMING, 0)
    job.forms()
    assert job.conductor.job.phase is JobPhase.REBUILDING
    job.rebuilds()
    assert (job.conductor.job.phase, job.replacements()) == (JobPhase.WORKING, 1)


def test_a_process_for_an_empty_place_is_started_at_once() -> None:
    """[REC-34]"""
    job = Conducted(2, 3)
    job.forms()
    job.rebuilds()
    job.dies("w0")
    assert job.replacements() == 0
    job.dies("w1")
    assert (job.conductor.job.phase, job.replacements()) == (JobPhase.GATHERING, 2)


@pytest.mark.parametrize("joined", [False, True])
def test_a_job_of_which_nobody_is_left_ends(*, joined: bool) -> None:
    """Whether they were lost one after the other, or had not even joined. [REC-35]"""
    conductor = Conductor(2, Limits(), Replacing(2, 0), clock_offset=0.0)
    for uid in ("w0", "w1"):
        conductor.started(uid, 0.0)
        if joined:
            assert conductor.joined(Join(uid, 1, "host", "zone"), 0.0)
    conductor.stopped(Stopped("w0", 9, -1), 0.0)
    assert conductor.outcome() is None
    conductor.stopped(Stopped("w1", 9, -1), 0.0)
    end = conductor.outcome()
    assert end is not None
    assert (end.code, end.reason) == (75, "no-spare")


def test_a_silent_worker_is_killed_when_the_limit_is_over_not_at_the_next_look() -> None:
    """[REC-30]"""
    job = Conducted(2, 2)
    job.conductor.heard("w1", Beat("", 0), 1.0)
    assert job.conductor.tick(4.875) == pytest.approx(0.125)
    assert job.conductor.deeds[-1] != KillWorker("w0")
    job.conductor.tick(5.0)
    assert job.conductor.deeds[-1] == KillWorker("w0")
    assert KillWorker("w1") not in job.conductor.deeds


class Order:
    """What is done to links and saves, in turn."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def told(self, name: str) -> Any:
        return type("Told", (), {"close": lambda _: self.done.append(name)})()


def test_saves_under_way_come_to_their_end_before_the_group_of_their_view_is_gone() -> None:
    """That of the last step, for which no loop waits, as much as others. [REC-65]"""
    order = Order()
    job: Any = type("J", (), {"uid": "w0", "require_good_end": lambda _: None})()
    training = Training(build=lambda _: None, batches=None, passing=None, clipping=None, policy=Policy(), seed=1)  # type: ignore[arg-type, return-value]
    tasks = Tasks(job, training, order.told("saves"))
    tasks._links = order.told("links")
    tasks._stop(Stop(End(0, "", "done")))
    assert order.done == ["saves", "links"]
