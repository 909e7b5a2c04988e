"""Messages in flight, questions, and the threads that carry out what they are given."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import InternalError, NoSpace
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.ranks.team import Alone, Question, all_do, first_does
from elastickpt.ranks.threads import Actor, Pool

LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Inner:
    number: int
    text: str


class Outer(Message, frozen=True):
    inner: Inner | None
    rows: tuple[tuple[str, float], ...]
    data: bytes = b""


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.builds(Outer, st.none() | st.builds(Inner, st.integers(-(2**63), 2**63), texts), st.just(()), st.binary()))
def test_a_message_comes_back_as_it_was_and_equal_ones_are_equal_bytes(message: Outer) -> None:
    data = encode(message)
    assert decode(data, Outer) == message
    assert encode(decode(data, Outer)) == data


class Path(str):
    """As a library's own text may be."""


def test_subclasses_of_plain_values_are_what_they_are() -> None:
    class Share(float):
        pass

    found = decode(encode(Outer(Inner(1, Path("a")), ((Path("loss"), Share(0.5)),))), Outer)  # type: ignore[arg-type]
    assert found.rows == (("loss", 0.5),)
    assert found.inner is not None
    assert type(found.inner.text) is str


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", encode(("x",)), encode(Outer(None, ())) + b"\0", encode((None, (), b"", 1)), b"\xa1\xff"]
)
def test_what_is_none_of_ours_is_an_internal_error(data: bytes) -> None:
    with pytest.raises(InternalError, match="expected Outer, found"):
        decode(data, Outer)


def test_what_no_message_carries_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="no message carries a value of type object"):
        encode((object(),))


def test_a_question_has_values_in_and_out() -> None:
    team = Alone(0, "here")
    assert Question("sum", int, str).ask(team, lambda: 3, lambda said: str(sum(said))) == "3"
    assert Question("each", str, Inner).ask_each(team, lambda: "x", lambda said: [Inner(1, one) for one in said]) == Inner(
        1, "x"
    )
    done: list[str] = []
    all_do(team, "all", lambda: done.append("all"))
    first_does(team, "first", lambda: done.append("first"))
    assert done == ["all", "first"]


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_what_goes_wrong_in_a_question_is_raised() -> None:
    with pytest.raises(NoSpace, match="full"):
        first_does(Alone(0, "here"), "first", raising(NoSpace("full")))


def test_an_actor_carries_out_commands_in_order_and_none_after_its_end() -> None:
    found: list[int] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            actor.wait(None)
            actor.carry_out()
            actor.rest()
        left = actor.end()
        found.extend(-1 for _ in left)

    actor = Actor("elastickpt-test", run)
    actor.start()
    for number in range(100):
        assert actor.leave(lambda number=number: found.append(number))  # type: ignore[misc]
    assert actor.idle_within(LIMIT_S)
    assert found == list(range(100))
    assert actor.leave(over.set)
    actor.join(LIMIT_S)
    assert not actor.leave(lambda: found.append(100))
    assert found == list(range(100))


def kernel_waits() -> set[int]:
    """Descriptors of this process by which somebody waits in the kernel."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if "event" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


def test_an_actor_takes_descriptors_with_its_first_socket_and_hears_both_then() -> None:
    heard: list[object] = []
    over = threading.Event()
    mine, theirs = socket.socketpair()

    def run() -> None:
        while not over.is_set():
            for key in actor.wait(None):
                heard.append((key.data, mine.recv(1)))
                actor.sockets.unregister(mine)
            actor.carry_out()
            actor.rest()
        actor.end()

    before = kernel_waits()
    actor = Actor("elastickpt-test", run)
    actor.start()
    assert actor.leave(lambda: heard.append("alone"))
    assert actor.idle_within(LIMIT_S)
    assert kernel_waits() <= before
    theirs.send(b"x")  # before anybody listens
    assert actor.leave(lambda: actor.sockets.register(mine, "named"))
    for number in range(100):
        assert actor.leave(lambda number=number: heard.append(number))  # type: ignore[misc]
    assert actor.leave(over.set)
    actor.join(LIMIT_S)
    assert [one for one in heard if isinstance(one, int)] == list(range(100))
    assert heard[0] == "alone"
    mine.close()
    theirs.close()
    assert kernel_waits() <= before


@pytest.mark.parametrize("turn", range(20))
def test_an_actor_is_woken_by_commands_whenever_its_first_socket_comes(turn: int) -> None:
    """None is lost between the two forms of waiting."""
    over, done = threading.Event(), threading.Semaphore(0)
    mine, theirs = socket.socketpair()

    def run() -> None:
        while not over.is_set():
            actor.wait(None)
            actor.carry_out()
        actor.end()

    actor = Actor("elastickpt-test", run)
    actor.start()
    for command in (lambda: actor.sockets.register(mine), *[done.release] * 3, over.set):
        assert actor.leave(command)
    actor.join(LIMIT_S)
    assert [done.acquire(blocking=False) for _ in range(3)] == [True] * 3
    mine.close()
    theirs.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_shared_out_each_item_once(threads: int) -> None:
    done: Counter[int] = Counter()
    with Pool("elastickpt-test", threads) as pool:
        pool.share_out(range(100), lambda number: done.update([number]))
    assert done == Counter(range(100))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_failure_ends_the_work_and_nobody_is_at_it_any_more(threads: int) -> None:
    begun, ended = Counter[int](), Counter[int]()

    def work(number: int) -> None:
        begun[number] += 1
        try:
            if number == 3:
                raise NoSpace("full")
        finally:
            ended[number] += 1

    with Pool("elastickpt-test", threads) as pool:
        with pytest.raises(NoSpace, match="full"):
            pool.share_out(range(10**6), work)
        assert begun == ended
        assert len(begun) < 10**6
