"""Members that take nothing any more: whoever sends to them is not held up for longer than the silence limit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

import pytest
from simulated import everywhere, stars

from elastickpt.errors import CheckpointError, DeadlineExceeded, RankLost
from elastickpt.ranks.messages import Connection, Frame, FrameKind, PeerSilent
from elastickpt.ranks.spoke import Spoke
from elastickpt.ranks.star import Star

BIG = b"x" * (8 << 20)  # beyond what sockets buffer


def test_a_member_with_much_to_say_does_not_wait_for_a_hub_that_is_stuck() -> None:
    joined = quickly_silent(stars(2), 0.5)
    with pytest.raises(DeadlineExceeded) as caught:
        joined[1].round("structure", lambda: BIG, lambda payloads: [b""] * 2)
    assert caught.value.report[0].rank == 0


def test_a_hub_with_much_to_say_serves_the_others_when_one_is_stuck() -> None:
    joined = stars(3, silence_s=60.0)
    quickly_silent(joined[:1], 0.5)  # only it waits for somebody who takes nothing
    spoke(joined[1])._hub.send(Frame(FrameKind.PAYLOAD, 1, b"1"), silence_s=60.0)  # answers, then takes nothing

    def work(member: int) -> bytes:
        return joined[member].round("structure", lambda: str(member).encode(), lambda payloads: [BIG] * 3)

    assert everywhere(3, lambda member: b"stuck" if member == 1 else work(member)) == [BIG, b"stuck", BIG]
    lost = everywhere(3, lambda member: None if member == 1 else next_round(joined[member]))
    assert [error.report[0].rank for error in lost if isinstance(error, CheckpointError)] == [1, 1]


def quickly_silent(met: list[Star], silence_s: float) -> list[Star]:
    """From now on, as all have met."""
    for star in met:
        star._silence_s = silence_s
    return met


def spoke(star: Star) -> Spoke:
    assert isinstance(star, Spoke)
    return star


def next_round(star: Star) -> CheckpointError:
    with pytest.raises(RankLost) as caught:
        star.round("next", lambda: b"", lambda payloads: [b""] * 3)
    return caught.value


def test_a_member_that_was_stuck_learns_that_it_was_given_up() -> None:
    """The report that names it waits in its connection, although the hub has hung up since."""
    joined = quickly_silent(stars(2), 0.5)
    with pytest.raises(DeadlineExceeded):
        joined[0].round("write", lambda: b"", lambda payloads: [b""] * 2)
    with pytest.raises(DeadlineExceeded) as caught:
        joined[1].round("write", lambda: BIG, lambda payloads: [b""] * 2)
    assert caught.value.report[0].rank == 1


def test_beats_to_a_peer_that_takes_nothing_hold_up_nobody() -> None:
    """Until its buffer is full, and beyond: a frame then follows whole."""
    mine, theirs = socket.socketpair()
    sender, receiver = Connection(mine), Connection(theirs)
    for _ in range(20_000):
        sender.beat(1)
    with pytest.raises(PeerSilent):
        sender.send(Frame(FrameKind.PAYLOAD, 1, BIG), silence_s=0.2)
    mine.close()
    theirs.close()
    del receiver


def test_a_frame_after_many_beats_arrives_whole() -> None:
    mine, theirs = socket.socketpair()
    sender, receiver = Connection(mine), Connection(theirs)
    for _ in range(20_000):
        sender.beat(1)
    found: list[Frame] = []

    def receive() -> None:
        while not found:
            receiver.pump()
            if (frame := receiver.take()) is not None:
                found.append(frame)

    thread = threading.Thread(target=receive)
    thread.start()
    sender.send(Frame(FrameKind.PAYLOAD, 3, BIG), silence_s=60.0)
    thread.join()
    assert found == [Frame(FrameKind.PAYLOAD, 3, BIG)]
    mine.close()
    theirs.close()


def test_a_slow_peer_that_beats_is_waited_for_while_sending() -> None:
    mine, theirs = socket.socketpair()
    sender, receiver = Connection(mine), Connection(theirs)
    found: list[Frame] = []

    def work() -> None:
        for _ in range(12):  # busy for longer than the limit, and saying so
            receiver.beat(1)
            threading.Event().wait(0.15)
        while not found:
            receiver.pump()
            if (frame := receiver.take()) is not None:
                found.append(frame)

    thread = threading.Thread(target=work)
    thread.start()
    sender.send(Frame(FrameKind.PAYLOAD, 1, BIG), silence_s=1.5)
    thread.join()
    assert len(found[0].data) == len(BIG)
    mine.close()
    theirs.close()


def payloads_joined(payloads: Sequence[bytes]) -> Sequence[bytes]:
    return [b"".join(payloads)] * len(payloads)


def test_all_members_send_much_at_once_and_get_much_back() -> None:
    joined = stars(3, silence_s=60.0)
    found = everywhere(3, lambda member: joined[member].round("r", lambda: BIG, payloads_joined))
    assert [len(data) if isinstance(data, bytes) else data for data in found] == [3 * len(BIG)] * 3
