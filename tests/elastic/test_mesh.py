"""The sockets between members: what goes over them, and what becomes of it when one is closed in the middle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from elastickpt.elastic.duties import TaskOver
from elastickpt.elastic.links import LinkBroken
from elastickpt.elastic.mesh import ViewSockets, meet, open_entrance
from elastickpt.ranks.addresses import dial

BIG = 32 << 20  # more than a socket holds


@pytest.fixture
def pair() -> Iterator[tuple[ViewSockets, ViewSockets]]:
    """Of stages 0 and 1."""
    ours, theirs = socket.socketpair()
    meshes = ViewSockets({1: ours}), ViewSockets({0: theirs})
    yield meshes
    for one in meshes:
        one.close()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[str]]:
    """`call`, and in words how it was broken once the thread has ended."""
    found: list[str] = []

    def run() -> None:
        try:
            call()
        except LinkBroken as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_messages_of_any_size_arrive_in_order_in_both_directions(pair: tuple[ViewSockets, ViewSockets]) -> None:
    """Whoever sends first waits for nobody, though both send more than their sockets hold."""
    sizes = [0, 1, 100_000, BIG, 0, 7]
    contents = [[bytes([number + 16 * stage]) * size for number, size in enumerate(sizes)] for stage in range(2)]
    sendings = [pair[stage].send(memoryview(one), 1 - stage) for stage in range(2) for one in contents[stage]]
    for stage in range(2):
        for expected in contents[1 - stage]:
            found = bytearray(len(expected))
            pair[stage].receive(memoryview(found), 1 - stage)
            assert found == expected
    for sending in sendings:
        sending.wait()


@pytest.mark.parametrize("ended", ["closed", "aborted"])
def test_what_has_arrived_in_part_is_not_waited_for_when_its_connection_ends(ended: str) -> None:
    """As when its sender is killed in the middle of it. Gloo waits for ever there. [REC-11]"""
    ours, theirs = socket.socketpair()
    mesh = ViewSockets({0: theirs})
    thread, found = in_thread(lambda: mesh.receive(memoryview(bytearray(1000)), 0))
    ours.sendall((1000).to_bytes(8, "little") + bytes(500))
    if ended == "closed":
        ours.close()
    else:
        mesh.abort()
    thread.join(60)
    assert found == ["stage 0 closed the connection" if ended == "closed" else "these links were ended"]
    mesh.close()
    ours.close()


@pytest.mark.parametrize("ended", ["closed", "aborted"])
def test_what_has_gone_in_part_is_not_waited_for_when_its_connection_ends(ended: str) -> None:
    """[REC-11]"""
    ours, theirs = socket.socketpair()
    mesh = ViewSockets({0: theirs})
    sending = mesh.send(memoryview(bytes(BIG)), 0)
    thread, found = in_thread(sending.wait)
    if ended == "closed":
        ours.close()
    else:
        mesh.abort()
    thread.join(60)
    assert len(found) == 1
    with pytest.raises(LinkBroken):
        mesh.send(memoryview(b"more"), 0)
    mesh.close()
    ours.close()


def test_another_number_of_bytes_than_expected_is_an_error(pair: tuple[ViewSockets, ViewSockets]) -> None:
    pair[0].send(memoryview(b"four"), 1)
    with pytest.raises(LinkBroken, match="stage 0 sends 4 bytes, and 5 are expected"):
        pair[1].receive(memoryview(bytearray(5)), 0)


def test_a_stranger_at_the_door_is_turned_away() -> None:
    """Who cannot prove the key, and who says nothing or nonsense, is no member of the view. [REC-24]"""
    doors = [open_entrance(host=None) for _ in range(2)]
    strangers = [dial(doors[0].address, timeout_s=60.0) for _ in range(3)]
    strangers[0].sendall(b"\x01\x00" + bytes(32))
    strangers[1].sendall(b"GET")
    others = [(door.key, door.address) for door in doors]
    met: list[dict[int, socket.socket]] = [{}, {}]

    def go(stage: int) -> None:
        met[stage] = meet(doors[stage], others, stage, limit_s=60.0, over=lambda: False)

    threads = [threading.Thread(target=go, args=(stage,)) for stage in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    met[1][0].sendall(b"hello")
    assert met[0][1].recv(5) == b"hello"
    assert all(stranger.recv(1) == b"" for stranger in strangers)
    for one in (*strangers, *(door.listener for door in doors), *met[0].values(), *met[1].values()):
        one.close()


def test_who_is_waited_for_is_waited_for_no_longer_than_the_view_holds() -> None:
    """[REC-11]"""
    door = open_entrance(host=None)
    with door.listener, pytest.raises(TaskOver):
        meet(door, [(door.key, door.address)] * 2, 0, limit_s=60.0, over=lambda: True)
