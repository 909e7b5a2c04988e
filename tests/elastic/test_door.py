"""Who may speak with a coordinator, and what becomes of others."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inside import TOKEN, inside

from elastickpt.elastic.calling import connected
from elastickpt.elastic.limits import MAX_BEAT_S, PhaseTimes
from elastickpt.elastic.messages import OWN_CODE, Beat, Go, Join
from elastickpt.elastic.stream import Closed, Stream, admitted, called, nonce
from elastickpt.elastic.workers import Worker, stalled
from elastickpt.errors import RecoveryFailed
from elastickpt.ranks.addresses import dial
from elastickpt.ranks.messages import encode


def wait_until_closed(stream: Stream) -> None:
    """Whatever is said before."""
    closed = threading.Event()
    for _ in range(2000):
        try:
            stream.receive()
        except Closed:
            return
        closed.wait(0.01)
    raise AssertionError("the connection is still open")


def test_who_does_not_know_the_token_is_turned_away(tmp_path: Path) -> None:
    """[REC-20]"""
    with inside(tmp_path, 1) as job, pytest.raises(RecoveryFailed, match="ELASTICKPT_TOKEN") as raised:
        connected(job.address, "another token")
    assert (raised.value.reason, raised.value.code) == ("coordinator-lost", 75)


def test_a_coordinator_that_does_not_know_the_token_is_not_believed() -> None:
    mine, expected = called(nonce(), "a")
    assert admitted(mine, nonce(), "a") is None
    assert expected != called(nonce(), "a")[1]


@given(st.binary(max_size=200))
def test_no_other_answer_is_admitted(data: bytes) -> None:
    assert admitted(data, nonce(), TOKEN) is None


@pytest.mark.parametrize("data", [b"", b"\x93\xa5Ready\x01", encode(Go(1, 2, None)), encode(Beat("", 0))])
def test_a_caller_that_says_something_else_is_closed_and_the_job_goes_on(tmp_path: Path, data: bytes) -> None:
    """[REC-20]"""
    with inside(tmp_path, 2) as job:
        stranger = connected(job.address, TOKEN)
        stranger.send(data)
        wait_until_closed(stranger)
        stranger.close()
        member = job.join("a")
        assert member.rank == 0
        member.close()


def test_bytes_that_are_no_messages(tmp_path: Path) -> None:
    with inside(tmp_path, 2) as job:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x04\x00\x00\x00abcd"):
            sock = dial(job.address, timeout_s=20.0)
            sock.sendall(data)
            while sock.recv(4096):
                pass
            sock.close()
        member = job.join("a")
        member.close()


def test_nobody_joins_under_a_name_that_is_taken(tmp_path: Path) -> None:
    """[REC-22]"""
    with inside(tmp_path, 2) as job:
        first = job.join("a")
        second = connected(job.address, TOKEN)
        second.send(encode(Join("a", 2, "host", "zone")))
        wait_until_closed(second)
        second.close()
        assert [(e["uid"], e["pid"]) for e in job.events("member")] == [("a", 1)]
        assert first.end is None
        first.close()


def test_nothing_listens_on_a_network(tmp_path: Path) -> None:
    """[REC-21]"""
    before = listening()
    with inside(tmp_path, 1) as job:
        assert job.address.startswith("unix:")
        assert listening() == before


def listening() -> set[int]:
    connections = psutil.Process(os.getpid()).net_connections("inet")
    return {one.fd for one in connections if one.status == psutil.CONN_LISTEN}


def at_work(uid: str, *, own: bool, limit_s: float | None = None, phase: str = "step") -> Worker:
    return Worker(uid, True, 0.0, beat=Beat(phase, 3, limit_s, own), moved_at=100.0)


@pytest.mark.parametrize(
    ("workers", "culprits", "anybody"),
    [
        ([at_work("a", own=True), at_work("b", own=False)], ["a"], True),
        ([at_work("a", own=False), at_work("b", own=False)], [], True),
        ([at_work("a", own=True, phase=""), at_work("b", own=False, phase="")], [], False),
        ([at_work("a", own=False, limit_s=5.0)], ["a"], True),
        ([at_work("a", own=True, limit_s=50.0)], [], False),
    ],
)
def test_who_stands_still(workers: list[Worker], culprits: list[str], *, anybody: bool) -> None:
    """Whoever waits for others is not to blame; who is in no declared phase has no limit. [REC-30, REC-32]"""
    history = PhaseTimes()
    history.note("step", 0.5, now=100.0)
    found, late = stalled(workers, 100.0 + 31.0, history)
    assert ([one.uid for one in found], late) == (culprits, anybody)
    assert stalled(workers, 100.0 + 4.0, history) == ([], False)


@given(st.lists(st.tuples(st.floats(0.0, 600.0), st.floats(0.001, 1e4)), min_size=1, max_size=100))
def test_limits_follow_from_the_history_of_an_hour(times: list[tuple[float, float]]) -> None:
    """What declares no phase is not lost before a phase without history would be. [REC-33]"""
    history, now = PhaseTimes(), 0.0
    assert history.limit_s("step") == 600.0
    noted = []
    for later, seconds in times:
        now += later
        noted.append((now // 60, seconds))
        history.note("step", seconds, now=now)
        history.note(OWN_CODE, seconds, now=now)
    longest = max(seconds for minute, seconds in noted if minute > now // 60 - 60)
    assert history.limit_s("step") == max(30.0, 10 * longest)
    assert history.limit_s(OWN_CODE) == max(600.0, 10 * longest)
    assert history.limit_s("another") == 600.0
    assert MAX_BEAT_S < 30.0
