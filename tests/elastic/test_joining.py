"""What a member says to its coordinator, whose part the test plays: values on a socket, no process beside this one."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from elastickpt.elastic import progress
from elastickpt.elastic.joining import Job
from elastickpt.elastic.membership import Compute, Form, Made, Mend, Mended
from elastickpt.elastic.messages import (
    OWN_CODE,
    Beat,
    FromMember,
    Go,
    Join,
    Reached,
    Rebuild,
    ToMember,
    View,
    Welcome,
    from_member,
)
from elastickpt.elastic.stream import Stream
from elastickpt.ranks.messages import encode


class Coordinating:
    """The other end of one member's connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._stream = Stream(ours)
        self.interrupted = threading.Event()
        self.job = Job(Stream(theirs), Join("m", 1, "host", "zone"))
        self.job.on_interrupt(self.interrupted.set)
        self.say(Welcome(spare=False, beat_s=1.0))
        self.job.wait_until_in()

    def say(self, *messages: ToMember) -> None:
        for message in messages:
            self._stream.send(encode(message))

    def reached(self, last: Reached) -> list[FromMember]:
        """What the member said that it reached, up to the last one, which is waited for."""
        found: list[FromMember] = []
        while last not in found:
            assert select.select([self._stream], [], [], 120.0)[0], f"nothing but {found}"
            if (data := self._stream.receive_one()) is not None:
                found.append(from_member(data))
        return [one for one in found if isinstance(one, Reached)]

    def stands(self, generation: int) -> None:
        """The member goes through a view, up to its next Compute."""
        self.say(View(1, generation, 0, ("m",), ()))
        task = self.job.next_task()
        assert isinstance(task.act, Form)
        self.job.done(task, Made())
        self.say(Rebuild(generation, 1, ()))
        task = self.job.next_task()
        assert isinstance(task.act, Mend)
        self.job.done(task, Mended())
        self.say(Go(generation, 0, None))

    def close(self) -> None:
        self.job.close()
        self._stream.close()


@pytest.fixture
def coordinating() -> Iterator[Coordinating]:
    found = Coordinating()
    yield found
    found.close()


def test_of_a_view_only_its_own_tasks_begin_something(coordinating: Coordinating) -> None:
    """A step that begins when its view is over already says nothing of the newer one; what runs in that says so. [REC-41]"""
    job = coordinating.job
    coordinating.stands(1)
    late = job.next_task()
    assert isinstance(late.act, Compute)
    coordinating.interrupted.clear()
    coordinating.say(View(1, 2, 0, ("m",), ()))
    assert coordinating.interrupted.wait(60)
    assert (late.over, job.generation) == (True, 2)
    job.began()
    coordinating.stands(2)
    job.next_task()
    job.began()
    assert coordinating.reached(Reached(2, "first_microbatch")) == [
        Reached(1, "unblocked"),
        Reached(1, "first_microbatch"),
        Reached(2, "unblocked"),
        Reached(2, "first_microbatch"),
    ]


def test_a_member_tells_how_long_its_phases_took_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are, and of those that are over, too; but of none that has a limit of its own. [REC-33]"""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    at = progress.Progress()
    for seconds in (2.0, 0.5):
        now[0] += 100.0
        with at.declared("reading", None):
            now[0] += seconds
    with at.working(OWN_CODE):
        now[0] += 3.0
        at.moves()
        now[0] += 1.0
        with at.declared("loading", 900.0):
            now[0] += 50.0
    assert dict(at.beat().longest) == {"reading": 2.0, OWN_CODE: 3.0}
    assert at.beat().longest == ()


def test_a_members_own_code_in_a_step_is_a_declared_phase(coordinating: Coordinating) -> None:
    """Who stands still in it is found; a phase that the user declares has a limit of its own. [REC-33]"""
    job, told = coordinating.job, []

    def tell() -> None:
        beat = from_member(job._beat()[0])
        assert isinstance(beat, Beat)
        told.append((beat.phase, beat.limit_s, beat.own))

    tell()
    with job.own_code():
        tell()
        with job.phase("loading", limit_s=900.0):
            tell()
    with job.phase("plots"):
        tell()
        with job.loop_body():
            tell()
            with job.waiting():
                tell()
    with job.loop_body():
        tell()
    tell()
    assert told == [
        ("", None, False),
        (OWN_CODE, None, True),
        ("loading", 900.0, True),
        ("plots", None, False),
        ("plots", None, True),
        ("plots", None, False),
        ("", None, True),
        ("", None, False),
    ]
