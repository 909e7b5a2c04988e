"""Rounds between members of one process, as threads, and between processes that are killed or stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

from elastickpt.comms.star import Star, connect
from elastickpt.comms.team import Alone
from elastickpt.errors import (
    CheckpointError,
    DeadlineExceeded,
    NoSpace,
    PathOccupied,
    RankFailure,
    RankLost,
    RanksFailed,
    from_report,
)


class FakeStore:
    """A job's store within one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, *, timeout_s: float) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_s):
                raise DeadlineExceeded(f"no key {key!r} after {timeout_s:g} s")
            return self._values[key]


def members(count: int, *, silence_s: float = 30.0) -> list[Star]:
    """A connected star of `count` members with ranks 10, 11, ..., all in this process."""
    store, ranks = FakeStore(), tuple(range(10, 10 + count))
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda m: connect(store, m, ranks, timeout_s=10, silence_s=silence_s), range(count)))


def everywhere(stars: Sequence[Star], work: Callable[[Star], object]) -> list[object]:
    """`work` on every member at once; an error is returned instead of raised."""

    def one(star: Star) -> object:
        try:
            return work(star)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(len(stars)) as pool:
        return list(pool.map(one, stars))


def echo(payloads: Sequence[bytes]) -> Sequence[bytes]:
    return [b"|".join(payloads) + b">" + str(member).encode() for member in range(len(payloads))]


def raising(error: Exception) -> Callable[[], bytes]:
    def contribute() -> bytes:
        raise error

    return contribute


def test_every_member_gets_its_own_reply_made_from_all_payloads() -> None:
    stars = members(3)
    found = everywhere(stars, lambda star: star.round("r", lambda: str(star.member).encode(), echo))
    assert found == [b"0|1|2>0", b"0|1|2>1", b"0|1|2>2"]


def test_many_rounds_keep_their_order() -> None:
    """Members may be a round apart; a fast one's next payload must wait for its round."""
    stars = members(4)

    def work(star: Star) -> list[bytes]:
        return [star.round("r", lambda n=n: f"{n}.{star.member}".encode(), lambda p: [b" ".join(p)] * 4) for n in range(50)]

    expected = [" ".join(f"{n}.{m}" for m in range(4)).encode() for n in range(50)]
    assert everywhere(stars, work) == [expected] * 4


def test_large_payloads_cross_while_the_hub_is_still_busy() -> None:
    """More than a socket's buffer: the members block in sending until the hub listens."""
    stars = members(3)
    big = b"x" * (8 << 20)

    def work(star: Star) -> int:
        if star.member == 0:
            time.sleep(0.3)
        return len(star.round("r", lambda: big, lambda p: [b"".join(p)] * 3))

    assert everywhere(stars, work) == [len(big) * 3] * 3


def test_a_failure_on_one_member_is_the_same_report_on_all() -> None:
    """[SAVE-54, SAVE-61]"""
    stars = members(3)

    def work(star: Star) -> bytes:
        mine = raising(NoSpace("disk is full")) if star.member == 1 else lambda: b""
        return star.round("write", mine, echo)

    found = everywhere(stars, work)
    assert {type(error) for error in found} == {NoSpace}
    assert {error.report for error in found} == {(RankFailure(11, "no-space", "disk is full"),)}  # type: ignore[attr-defined]
    assert found[1].__cause__.args == ("disk is full",)  # type: ignore[attr-defined]


def test_all_failures_are_in_one_report_and_the_lowest_rank_gives_the_class() -> None:
    stars = members(3)

    def work(star: Star) -> bytes:
        errors = [None, PathOccupied("taken"), ValueError("odd")]
        mine = raising(errors[star.member]) if errors[star.member] else lambda: b""  # type: ignore[arg-type]
        return star.round("write", mine, echo)

    found = everywhere(stars, work)
    assert {type(error) for error in found} == {PathOccupied}
    expected = (RankFailure(11, "path-occupied", "taken"), RankFailure(12, "checkpoint-error", "ValueError: odd"))
    assert {error.report for error in found} == {expected}  # type: ignore[attr-defined]


def test_a_decision_that_fails_fails_everywhere() -> None:
    """[SAVE-61]"""
    stars = members(2)

    def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
        raise PathOccupied("taken")

    found = everywhere(stars, lambda star: star.round("r", lambda: b"", decide))
    assert [(type(error), error.report) for error in found] == [  # type: ignore[attr-defined]
        (PathOccupied, (RankFailure(10, "path-occupied", "taken"),))
    ] * 2


def test_the_next_round_works_after_a_failed_one() -> None:
    stars = members(3)

    def fails(star: Star) -> bytes:
        return star.round("r", raising(NoSpace("full")) if star.member == 2 else lambda: b"", echo)

    everywhere(stars, fails)
    assert everywhere(stars, lambda star: star.round("r", lambda: b"a", lambda p: [b"ok"] * 3)) == [b"ok"] * 3


def test_a_silent_member_ends_the_round_for_the_others_at_the_limit() -> None:
    """The member neither contributes nor beats; the others get its rank and the limit, and the group is closed. [SAVE-63]"""
    stars = members(3, silence_s=0.5)
    found = everywhere(stars[:2], lambda star: star.round("write", lambda: b"", echo))
    assert [type(error) for error in found] == [DeadlineExceeded] * 2
    assert found[0].report[0].rank == 12  # type: ignore[attr-defined]
    assert "0.5 s" in found[0].report[0].message  # type: ignore[attr-defined]
    assert [star.closed for star in stars[:2]] == [True, True]
    with pytest.raises(RanksFailed):
        stars[0].round("next", lambda: b"", echo)


def test_a_slow_member_that_beats_is_waited_for() -> None:
    """[SAVE-64]"""
    stars = members(2, silence_s=1.5)

    def work(star: Star) -> bytes:
        def contribute() -> bytes:
            time.sleep(2.5 * star.member)
            return b"done"

        return star.round("write", contribute, echo)

    assert everywhere(stars, work) == [b"done|done>0", b"done|done>1"]


def test_whoever_does_not_come_is_named() -> None:
    store = FakeStore()
    store.set("host/1", b"elsewhere")
    with pytest.raises(DeadlineExceeded, match=r"ranks \[7\] did not connect to rank 4"):
        connect(store, 0, (4, 7), timeout_s=0.3)


def test_a_stranger_without_the_secret_is_turned_away() -> None:
    """Somebody else on the machine who finds the socket cannot join, nor disturb who may. [SAVE-65]"""
    import msgpack

    from elastickpt.comms.addresses import dial
    from elastickpt.comms.frames import Connection as Peer
    from elastickpt.comms.frames import Frame, Kind

    store = FakeStore()
    with ThreadPoolExecutor(2) as pool:
        hub = pool.submit(connect, store, 0, (0, 1), timeout_s=10)
        store.set("host/1", store.get("host/0", timeout_s=5))
        address, secret = msgpack.unpackb(store.get("hub", timeout_s=5))
        stranger = Peer(dial(address, timeout_s=5.0))
        stranger.send(Frame(Kind.HELLO, 0, msgpack.packb([b"?" * len(secret), 1])), silence_s=5.0)
        member = pool.submit(connect, store, 1, (0, 1), timeout_s=10)
        stars = [hub.result(), member.result()]
    assert everywhere(stars, lambda star: star.round("r", lambda: b"a", lambda p: [b"ok"] * 2)) == [b"ok"] * 2


def test_alone_a_round_is_a_call() -> None:
    assert Alone(3, "h").round("r", lambda: b"a", lambda p: [p[0] + b"b"]) == b"ab"
    with pytest.raises(CheckpointError) as caught:
        Alone(3, "h").round("r", raising(ValueError("odd")), echo)
    assert caught.value.report == (RankFailure(3, "checkpoint-error", "ValueError: odd"),)


def test_noticing_ranks_do_not_choose_the_class() -> None:
    report = [RankFailure(0, "rank-lost", "gone"), RankFailure(4, "no-space", "full")]
    assert type(from_report(report)) is NoSpace
    assert type(from_report(report[:1])) is RankLost


# -- processes ---------------------------------------------------------------------------------------------------------


class PipeStore:
    """A job's store for two processes: each end tells the other what it sets."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        self._pipe.send((key, value))

    def get(self, key: str, *, timeout_s: float) -> bytes:
        while key not in self._values:
            if not self._pipe.poll(timeout_s):
                raise DeadlineExceeded(key)
            name, value = self._pipe.recv()
            self._values[name] = value
        return self._values[key]


def _member(pipe: Connection, member: int) -> None:
    star = connect(PipeStore(pipe), member, (0, 1), timeout_s=10, silence_s=1.0)
    star.round("first", lambda: b"", lambda p: [b""] * 2)
    pipe.send("first round done")
    star.round("second", lambda: time.sleep(60) or b"", lambda p: [b""] * 2)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("victim", [0, 1], ids=["hub", "member"])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, RankLost), (signal.SIGSTOP, DeadlineExceeded)])
def test_a_killed_or_stopped_process_is_noticed_by_the_survivor(
    victim: int, number: signal.Signals, kind: type[RanksFailed]
) -> None:
    """A killed one by its closed connection, a stopped one by its silence; never a hang. [SAVE-62, SAVE-63]"""
    context = get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_member, args=(theirs, victim))
    process.start()
    theirs.close()
    try:
        star = connect(PipeStore(mine), 1 - victim, (0, 1), timeout_s=10, silence_s=1.0)
        star.round("first", lambda: b"", lambda p: [b""] * 2)
        while mine.recv() != "first round done":
            pass
        assert process.pid is not None
        os.kill(process.pid, number)
        with pytest.raises(kind) as caught:
            star.round("second", lambda: b"", lambda p: [b""] * 2)
        assert caught.value.report[0].rank == victim
    finally:
        process.kill()
        process.join()
