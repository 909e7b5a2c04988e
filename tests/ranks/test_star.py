"""Rounds between members of one process, as threads, and between processes that are killed or stopped."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import (
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    NoSpace,
    PathOccupied,
    RankFailure,
    RankLost,
    RanksFailed,
    Refused,
    from_report,
)
from elastickpt.ranks import star as starred
from elastickpt.ranks.addresses import HUB, Address, Hello, dial
from elastickpt.ranks.hub import Hub
from elastickpt.ranks.messages import Connection as Peer
from elastickpt.ranks.messages import Frame, FrameKind, decode, encode
from elastickpt.ranks.processes import Acquaintances, Process, host_identity, is_ending, process_start
from elastickpt.ranks.spoke import Spoke
from elastickpt.ranks.star import Heart, Star
from elastickpt.ranks.team import Alone, Call, require_limit

BOUND_S = 60.0  # by which what is sure to come has come, however busy the machine is


class FakeStore:
    """A job's store within one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def has(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, *, timeout_s: float) -> bytes:
        return self._values[key]


def end_of(store: object, member: int, ranks: tuple[int, ...], **options: float) -> Star:
    """One member's end, with a knowledge of its own; it has met nobody."""
    return (Spoke if member else Hub)(lambda: store, member, ranks, Acquaintances(), **options)  # type: ignore[arg-type]


def strangers(count: int, *, silence_s: float = 30.0) -> list[Star]:
    """The ends of `count` members with ranks 10, 11, ..., all in this process, who have not met."""
    store, ranks = FakeStore(), tuple(range(10, 10 + count))
    return [end_of(store, member, ranks, silence_s=silence_s) for member in range(count)]


def call(star: Star, *, what: str = "save", limit_s: float = BOUND_S, number: int = 0, again_s: float = 0.5) -> bytes:
    """A call of one round, to which each member brings its number."""
    star.enter(Call(what, limit_s, again_s=again_s, number=number))
    return star.round("first", lambda: str(star.member).encode(), echo)


def members(count: int, *, silence_s: float = 30.0) -> list[Star]:
    """The same, met and within a call. Nobody is silent before that."""
    stars = strangers(count)
    assert all(isinstance(reply, bytes) for reply in everywhere(stars, call))
    for star in stars:
        star._silence_s = silence_s
    return stars


def beat_often(patch: pytest.MonkeyPatch) -> None:
    """From now on, so that a short silence says something; by a thread that does not wait for a beat of the usual time."""
    gc.collect()  # teams of other tests
    patch.setattr(starred, "HEART", Heart())
    patch.setattr(starred, "BEAT_S", 0.05)


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
    """The member neither contributes nor beats; the others get its rank and the limit. [SAVE-63]"""
    stars = members(3, silence_s=0.5)
    found = everywhere(stars[:2], lambda star: star.round("write", lambda: b"", echo))
    assert [type(error) for error in found] == [DeadlineExceeded] * 2
    assert found[0].report[0].rank == 12  # type: ignore[attr-defined]
    assert "0.5 s" in found[0].report[0].message  # type: ignore[attr-defined]


def test_a_slow_member_that_beats_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-64]"""
    beat_often(monkeypatch)
    stars = members(2, silence_s=1.5)

    def work(star: Star) -> bytes:
        def contribute() -> bytes:
            time.sleep(2.0 * star.member)
            return b"done"

        return star.round("write", contribute, echo)

    assert everywhere(stars, work) == [b"done|done>0", b"done|done>1"]


@pytest.mark.parametrize(("lone", "missing"), [(0, (11, 12)), (1, (10, 12)), (2, (10, 11))])
def test_whoever_makes_a_call_alone_is_told_who_did_not_come(lone: int, missing: tuple[int, ...]) -> None:
    """[SAVE-111]"""
    stars = strangers(3)
    with pytest.raises(DeadlineExceeded) as caught:
        call(stars[lone], what="save to p", limit_s=0.3)
    assert tuple(failure.rank for failure in caught.value.report) == missing
    for word in ("save to p", "0.3 s (wait_limit_s)", "every rank of ranks 10, 11, 12 must call it"):
        assert word in caught.value.message
    assert "hub" not in caught.value.message
    assert "/" not in caught.value.message


@pytest.mark.parametrize("lone", [0, 1, 2])
@pytest.mark.parametrize("made", [strangers, members], ids=["unmet", "met"])
def test_a_call_that_one_member_made_alone_uses_up_no_call_of_the_others(lone: int, made: Callable[[int], list[Star]]) -> None:
    """[SAVE-112]"""
    stars = made(3)
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                call(stars[lone], limit_s=0.2)
        assert everywhere(stars, call) == [b"0|1|2>0", b"0|1|2>1", b"0|1|2>2"]


@pytest.mark.parametrize(
    ("late", "made"),
    [
        pytest.param(0, strangers, id="0-unmet"),
        pytest.param(2, members, id="2-met"),
        pytest.param(2, strangers, id="2-unmet", marks=pytest.mark.long),
        pytest.param(0, members, id="0-met", marks=pytest.mark.long),
    ],
)
def test_a_late_member_is_waited_for_longer_than_silence_and_named_meanwhile(
    late: int, made: Callable[..., list[Star]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[SAVE-110]"""
    monkeypatch.setattr(starred, "LOG_AFTER_S", 0.2)
    beat_often(monkeypatch)
    stars = made(3, silence_s=1.5)

    def work(star: Star) -> bytes:
        if star.member == late:
            time.sleep(2.0)  # more than the silence that a member in a round may keep
        return call(star)

    assert everywhere(stars, work) == [b"0|1|2>0", b"0|1|2>1", b"0|1|2>2"]
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if f"waiting for rank {10 + late}" in text or "waiting for ranks" in text]) >= 2
    assert any("every rank of ranks 10, 11, 12 must call it" in text for text in said)


def test_who_comes_after_the_limit_waits_for_the_next_call() -> None:
    stars = members(2)
    with pytest.raises(DeadlineExceeded):
        call(stars[0], limit_s=0.1)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(call, stars[1])
        time.sleep(0.2)
        assert call(stars[0]) == b"0|1>0"
        assert late.result() == b"0|1>1"


@pytest.mark.parametrize("behind", [0, 1])
def test_calls_that_are_counted_never_pair_with_others(behind: int) -> None:
    """Who comes to a call that the others have given up makes it alone, and is with them at the next one."""
    stars = members(2)
    ahead = 1 - behind
    with pytest.raises(DeadlineExceeded):
        call(stars[ahead], limit_s=0.1, number=1)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(call, stars[ahead], number=2)
        time.sleep(0.1)
        with pytest.raises(RanksFailed):
            call(stars[behind], number=1)
        assert call(stars[behind], number=2) == f"0|1>{behind}".encode()
        assert second.result() == f"0|1>{ahead}".encode()


def test_a_failure_of_one_waits_for_the_late_so_that_all_hear_of_it() -> None:
    stars = members(3)

    def work(star: Star) -> bytes:
        star.enter(Call("save", BOUND_S))
        if star.member == 2:
            time.sleep(0.3)
        return star.round("first", raising(NoSpace("full")) if star.member == 1 else lambda: b"", echo)

    assert {type(error) for error in everywhere(stars, work)} == {NoSpace}


def test_a_member_that_leaves_between_rounds_ends_the_call_of_the_others_and_is_back_at_the_next() -> None:
    for leaver in range(3):
        stars = members(3)

        def work(star: Star, leaver: int = leaver) -> object:
            if star.member == leaver:
                return star.leave(KeyboardInterrupt())
            return star.round("second", lambda: b"", echo)

        errors = [error for error in everywhere(stars, work) if error is not None]
        assert [type(error) for error in errors] == [RankLost] * 2
        assert all(error.report[0].rank == 10 + leaver for error in errors)  # type: ignore[attr-defined]
        assert all("gave up: KeyboardInterrupt" in str(error) for error in errors if leaver)
        assert everywhere(stars, call) == [b"0|1|2>0", b"0|1|2>1", b"0|1|2>2"]


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("made", [strangers, members], ids=["unmet", "met"])
def test_a_wait_is_ended_by_another_thread(waiting: int, made: Callable[[int], list[Star]]) -> None:
    """[SAVE-114]"""
    stars = made(2)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(call, stars[waiting], limit_s=600.0)
        time.sleep(0.2)
        stars[waiting].end("the group is formed anew")
        with pytest.raises(Cancelled, match="the group is formed anew"):
            found.result(timeout=BOUND_S)
    with pytest.raises(Cancelled):
        call(stars[waiting])


class SharedStore(FakeStore):
    """One member's connection to the values of all."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self._values = values


def test_an_ended_end_keeps_no_connection_to_the_store_though_somebody_holds_it() -> None:
    values: dict[str, bytes] = {}
    opened: list[weakref.ref[SharedStore]] = []

    def connection() -> SharedStore:
        found = SharedStore(values)
        opened.append(weakref.ref(found))
        return found

    ends = [(Spoke if member else Hub)(connection, member, (0, 1), Acquaintances()) for member in range(2)]
    assert all(isinstance(reply, bytes) for reply in everywhere(ends, call))
    assert [one() is not None for one in opened] == [True, True]
    for one in ends:
        one.end("it is over")
    assert [one() for one in opened] == [None, None]


def test_the_end_of_a_team_ends_its_threads_and_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-114]"""
    gc.collect()  # teams of other tests
    monkeypatch.setattr(starred, "HEART", Heart())
    others = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        stars = members(3)
        beating = [one for one in threading.enumerate() if one.name == "elastickpt-beat" and one not in others]
        assert len(beating) == 1
        for star in stars:
            star.end("done")
        assert len(os.listdir("/proc/self/fd")) == descriptors
        beating[0].join(timeout=BOUND_S)
        assert not beating[0].is_alive()


def test_a_team_that_nobody_holds_any_more_is_collected() -> None:
    stars = members(2)
    gone = [weakref.ref(star) for star in stars]
    del stars
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_the_address_of_an_earlier_life_is_given_up_for_the_new_one() -> None:
    """One store may serve several lives of a job, and the earlier one's member 0 still stand there."""
    store = FakeStore()
    old = end_of(store, 0, (0, 1))
    with pytest.raises(DeadlineExceeded):
        call(old, limit_s=0.1)
    with ThreadPoolExecutor(2) as pool:
        member = pool.submit(call, end_of(store, 1, (0, 1)))
        time.sleep(0.3)
        assert pool.submit(call, end_of(store, 0, (0, 1))).result(timeout=BOUND_S) == b"0|1>0"
        assert member.result(timeout=BOUND_S) == b"0|1>1"


def test_a_stranger_without_the_secret_is_turned_away() -> None:
    """Somebody else on the machine who finds the socket cannot join, nor disturb who may. [SAVE-65]"""
    store = FakeStore()
    hub, member = end_of(store, 0, (0, 1)), end_of(store, 1, (0, 1))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, hub)
        while not store.has(HUB):
            time.sleep(0.01)
        address = decode(store.get(HUB, timeout_s=BOUND_S), Address)
        silent = dial(address.near, timeout_s=BOUND_S)
        stranger = Peer(dial(address.near, timeout_s=BOUND_S))
        stranger.send(Frame(FrameKind.HELLO, 0, encode(Hello(b"?" * 16, 1, Process("h", 1, 1)))), silence_s=BOUND_S)
        noise = dial(address.near, timeout_s=BOUND_S)
        noise.sendall(b"\xff" * 64)
        assert pool.submit(call, member).result(timeout=BOUND_S) == b"0|1>1"
        assert first.result(timeout=BOUND_S) == b"0|1>0"
    silent.close(), stranger.close(), noise.close()


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "5", True])
def test_what_is_no_limit_is_refused(value: object) -> None:
    with pytest.raises(Refused, match="wait_limit_s="):
        require_limit("wait_limit_s", value)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=6))
@settings(max_examples=15, deadline=None)
def test_after_any_calls_of_some_members_a_call_of_all_succeeds(lone: list[tuple[int, bool]]) -> None:
    """[SAVE-112]"""
    stars = strangers(3)
    for member, leaves in lone:
        with suppress(DeadlineExceeded):
            call(stars[member], limit_s=0.02)
        if leaves:
            stars[member].leave(ValueError("odd"))
    assert everywhere(stars, call) == [b"0|1|2>0", b"0|1|2>1", b"0|1|2>2"]
    for star in stars:
        star.end("done")


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

    def has(self, key: str) -> bool:
        while key not in self._values and self._pipe.poll():
            name, value = self._pipe.recv()
            self._values[name] = value
        return key in self._values

    def get(self, key: str, *, timeout_s: float) -> bytes:
        return self._values[key]


def _member(pipe: Connection, member: int) -> None:
    star = end_of(PipeStore(pipe), member, (0, 1))
    call(star)
    pipe.send("first round done")
    star.round("second", lambda: time.sleep(2 * BOUND_S) or b"", lambda p: [b""] * 2)  # type: ignore[func-returns-value]


def test_a_process_that_takes_long_to_end_is_gone_and_not_perhaps_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it may wait for a processor between the end of its connections and its own. [SAVE-62]"""
    monkeypatch.setattr(starred, "DYING_S", 0.0)
    process = get_context("fork").Process(target=os.getppid)
    process.start()
    pid = process.pid
    assert pid is not None
    ended = Process(host_identity(), pid, process_start(pid) or 0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert is_ending(ended)
    assert not is_ending(Process(ended.host, os.getpid(), process_start(os.getpid()) or 0))
    star = end_of(FakeStore(), 0, (0, 1))
    star._met(1, ended)
    lives = iter([True, True, False])
    monkeypatch.setattr(star._known, "lives_here", lambda rank: next(lives))
    assert f"its process {pid} is gone" in star._disconnected(1, "a round").message
    process.join()
    assert not is_ending(ended)


def test_who_waits_for_the_end_of_a_process_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be held in the kernel for as long as a file system takes."""
    star = end_of(FakeStore(), 0, (0, 1))
    looked = threading.Event()
    monkeypatch.setattr(star._known, "lives_here", lambda rank: looked.set() is None)
    monkeypatch.setattr(star._known, "ends_here", lambda rank: True)
    monkeypatch.setattr(starred, "ENDING_S", 10_000.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(star._disconnected, 1, "a round")
        assert looked.wait(BOUND_S)
        star.end("it is over")
        assert "may be gone" in waiting.result(timeout=BOUND_S).message


@pytest.mark.parametrize("victim", [0, 1], ids=["hub", "member"])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, RankLost), (signal.SIGSTOP, DeadlineExceeded)])
def test_a_killed_or_stopped_process_is_noticed_by_the_survivor(
    victim: int, number: signal.Signals, kind: type[RanksFailed]
) -> None:
    """A killed one by its closed connection, a stopped one by its silence; never a hang. [SAVE-62, SAVE-63]"""
    context = get_context("forkserver")  # a fork of this process, which has threads, may stand still
    mine, theirs = context.Pipe()
    process = context.Process(target=_member, args=(theirs, victim))
    process.start()
    theirs.close()
    try:
        star = end_of(PipeStore(mine), 1 - victim, (0, 1))
        call(star)
        star._silence_s = 0.5 if kind is DeadlineExceeded else BOUND_S
        while mine.recv() != "first round done":
            pass
        assert process.pid is not None
        os.kill(process.pid, number)
        with pytest.raises(kind) as caught:
            star.round("second", lambda: b"", lambda p: [b""] * 2)
        assert caught.value.report[0].rank == victim
        if number == signal.SIGKILL:
            assert f"its process {process.pid} is gone" in caught.value.message
            with pytest.raises(RankLost, match=f"rank {victim}: this rank is lost: its process {process.pid} is gone"):
                call(star, limit_s=600.0)  # at once [SAVE-113]
    finally:
        process.kill()
        process.join()
