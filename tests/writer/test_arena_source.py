"""Bytes are taken from an arena once its trainer has copied them, and not before. [SAVE-92, SAVE-102, SAVE-103]"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from elastickpt.errors import Cancelled, DeadlineExceeded, RankLost, Refused
from elastickpt.writer.arena import GIVE_WAY, Arena, ArenaSource
from elastickpt.writer.plans import Slice
from elastickpt.writer.write_files import unwatched

NBYTES = 10_000
WHOLE = Slice(0, 0, 0, NBYTES, 0)
BOUND_S = 30.0


@pytest.fixture
def arena() -> Iterator[Arena]:
    found = Arena.create(NBYTES)
    yield found
    found.close()


def test_the_mark_is_seen_by_who_has_the_descriptor_and_is_no_part_of_the_memory(arena: Arena) -> None:
    other = Arena.attach(os.dup(arena.descriptor), NBYTES)
    arena.memory[:] = 7
    for filled in (0, 1, NBYTES, (1 << 40) + 3):
        arena.fill_to(filled)
        assert (arena.filled, other.filled) == (filled, filled)
    assert (arena.memory == 7).all()
    arena.empty()
    assert other.filled == 0
    arena.lent = True
    with pytest.raises(Refused, match="still being written"):
        arena.empty()
    other.close()


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097])
def test_an_arena_of_any_size_has_a_mark(nbytes: int) -> None:
    arena = Arena.create(nbytes)
    arena.fill_to(nbytes)
    arena.memory[:] = 0xFF
    assert arena.filled == nbytes
    arena.close()


def test_what_is_there_is_taken_at_once_and_in_place(arena: Arena) -> None:
    arena.memory[:] = np.arange(NBYTES, dtype=np.uint64).astype(np.uint8)
    arena.fill_to(600)
    taken = ArenaSource(arena, unwatched).take(Slice(3, 1, 256, 1024, 100), 300, 756)
    assert taken.tobytes() == arena.memory[144:600].tobytes()
    assert np.shares_memory(taken, arena.memory)


def test_what_is_not_there_is_waited_for_by_all_threads(arena: Arena) -> None:
    staged = ArenaSource(arena, unwatched)
    taken: dict[int, bytes] = {}

    def take(start: int) -> None:
        taken[start] = staged.take(WHOLE, start, start + 1000).tobytes()

    threads = [threading.Thread(target=take, args=(start,)) for start in range(0, NBYTES, 1000)]
    for thread in threads:
        thread.start()
    for filled in range(500, NBYTES + 1, 500):
        time.sleep(0.003)
        assert all(start + 1000 < filled for start in taken)
        arena.memory[filled - 500 : filled] = filled // 500
        arena.fill_to(filled)
    for thread in threads:
        thread.join(BOUND_S)
    assert b"".join(taken[start] for start in range(0, NBYTES, 1000)) == arena.memory.tobytes()
    assert set(arena.memory.tolist()) == set(range(1, 21))


def test_threads_that_wait_give_way_to_who_copies_but_not_the_writers_own(arena: Arena) -> None:
    own, usual = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0)
    staged = ArenaSource(arena, unwatched)
    arena.fill_to(10)
    niceness: dict[str, int] = {}

    def take(name: str, start: int) -> None:
        staged.take(WHOLE, start, start + 10)
        niceness[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    threads = [threading.Thread(target=take, args=one) for one in (("at once", 0), ("waited", 90))]
    for thread in threads:
        thread.start()
    threads[0].join(BOUND_S)
    threading.Timer(0.05, arena.fill_to, (100,)).start()
    staged.take(WHOLE, 90, 100)
    threads[1].join(BOUND_S)
    # 19 is as far as Linux goes
    assert niceness == {"at once": usual, "waited": min(usual + GIVE_WAY, 19)}
    assert os.getpriority(os.PRIO_PROCESS, own) == usual


def test_what_a_trainer_that_ended_had_copied_is_taken_and_no_more(arena: Arena) -> None:
    staged = ArenaSource(arena, unwatched)
    arena.fill_to(4000)
    arena.abandoned = True
    assert staged.take(WHOLE, 3000, 4000).size == 1000
    with pytest.raises(RankLost, match="before it had staged the rest"):
        staged.take(WHOLE, 3001, 4001)


def test_a_trainer_that_stands_still_is_not_waited_for_for_ever(arena: Arena) -> None:
    staged = ArenaSource(arena, unwatched, still_s=0.2)
    filling = threading.Timer(0.1, arena.fill_to, (4000,))
    begun = time.monotonic()
    filling.start()
    with pytest.raises(DeadlineExceeded, match=r"nothing was staged for 0.2 s: 4000 bytes are, 5000 are needed"):
        staged.take(WHOLE, 4000, 5000)
    assert time.monotonic() - begun >= 0.3  # it counts from the last that was copied
    filling.join()


def test_who_cancels_ends_the_wait(arena: Arena) -> None:
    asked: list[int] = []

    def watch(nbytes: int) -> None:
        asked.append(nbytes)
        if len(asked) == 3:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        ArenaSource(arena, watch).take(WHOLE, 0, 1)
    assert asked == [0, 0, 0]


@pytest.mark.parametrize("gap", [0, 24])
@pytest.mark.parametrize("shift", [0, 100])
@pytest.mark.parametrize("begin", [0, 301])
def test_many_slices_are_gathered_as_they_are_to_lie(arena: Arena, gap: int, shift: int, begin: int) -> None:
    arena.memory[:] = np.arange(NBYTES, dtype=np.uint64).astype(np.uint8)
    arena.fill_to(NBYTES)
    slices = [Slice(0, k, 0, 40, 64 + k * (40 + shift)) for k in range(9)]
    places = [begin + k * (40 + gap) for k in range(9)]
    into = np.full(2 * begin + 8 * (40 + gap) + 40, 7, dtype=np.uint8)
    ArenaSource(arena, unwatched).gather(slices, places, into)
    expected = np.full_like(into, 7)
    for at, place in zip(slices, places, strict=True):
        expected[place : place + 40] = arena.memory[at.offset : at.offset + 40]
    assert into.tobytes() == expected.tobytes()
