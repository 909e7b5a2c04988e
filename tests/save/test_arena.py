"""Arenas, their layout, and what is staged into them; no process but this one."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import LimitExceeded, NoSpace, Refused
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.layout.grid import ByteRun, runs_of
from elastickpt.ranks.threads import Pool
from elastickpt.saving import staging
from elastickpt.saving.staging import MIN_THREADED_NBYTES, PART_NBYTES, Stager, gather, part_of, slices_of
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES
from elastickpt.training.held import HeldArray
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import ArenaPlan, decode_prepared, prepare
from elastickpt.writer.plans import (
    BLOCK_NBYTES,
    MIN_ARENA_NBYTES,
    PAGE,
    Document,
    PlannedDocument,
    PlannedFile,
    PlannedPiece,
    WritePlan,
    lay_out,
)

MIB = 1 << 20


def descriptors_of(file: os.stat_result) -> int:
    """How many of this process's descriptors are of that file."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # another thread's, closed meanwhile
            found += os.path.samestat(os.fstat(int(name)), file)
    return found


def file_of(*pieces: tuple[int, int]) -> PlannedFile:
    """A file with contiguous pieces of bytes, each (offset, nbytes)."""
    planned = [PlannedPiece(0, Box((at,), (at + n,)), ByteRun((0,), Box((at,), (at + n,)), at, n, n, n)) for at, n in pieces]
    return PlannedFile("p/c.0", max(at + n for at, n in pieces), tuple(planned))


def plan_of(*boxes: Box, shape: tuple[int, ...], itemsize: int, held: Box) -> WritePlan:
    """What a rank that holds `held` writes of these boxes of an array that is one chunk."""
    runs = [run for box in boxes for run in runs_of(box, shape=shape, chunk_shape=shape, itemsize=itemsize)]
    low = held.start
    pieces = [
        PlannedPiece(
            0,
            Box(
                tuple(a - b for a, b in zip(run.box.start, low, strict=True)),
                tuple(a - b for a, b in zip(run.box.stop, low, strict=True)),
            ),
            run,
        )
        for run in runs
    ]
    nbytes = int(np.prod(shape)) * itemsize
    return WritePlan(("p",), (PlannedFile("p/c.0.0", nbytes, tuple(pieces)),), (PlannedDocument(0, True),))


def test_an_arena_is_zero_and_starts_at_a_page_and_two_mappings_share_it() -> None:
    arena = Arena.create(3 * PAGE + 5)
    assert (arena.memory.size, arena.memory.ctypes.data % mmap.PAGESIZE, int(arena.memory.sum())) == (3 * PAGE + 5, 0, 0)
    other = Arena.attach(os.dup(arena.descriptor), arena.nbytes)
    arena.memory[-1] = 7
    assert other.memory[-1] == 7
    with pytest.raises(ValueError, match="read-only"):
        other.memory[0] = 1
    arena.close()
    assert other.memory[-1] == 7


def test_an_arena_is_resident_when_it_is_made() -> None:
    before = int(Path("/proc/self/statm").read_text().split()[2])
    arena = Arena.create(16 * MIB)
    assert int(Path("/proc/self/statm").read_text().split()[2]) - before >= 16 * MIB // mmap.PAGESIZE
    arena.close()


def test_no_process_can_shrink_an_arena_under_another() -> None:
    arena = Arena.create(2 * PAGE)
    for nbytes in (0, PAGE, 3 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()


def test_a_closed_arena_leaves_no_memory() -> None:
    for _ in range(20):
        arena = Arena.create(MIB)
        file = os.fstat(arena.descriptor)
        assert descriptors_of(file) == 2  # the mapping keeps one of its own
        arena.close()
        assert descriptors_of(file) == 0
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert not [line for line in maps if "memfd:elastickpt" in line and f" {file.st_ino} " in line]


def test_an_arena_that_nobody_holds_leaves_no_descriptor() -> None:
    arena = Arena.create(4096)
    kept = os.dup(arena.descriptor)
    file = os.fstat(kept)
    assert descriptors_of(file) == 3  # with that of its mapping
    del arena
    assert descriptors_of(file) == 1
    os.close(kept)


def test_an_arena_beyond_the_hosts_memory_is_refused_before_it_is_touched() -> None:
    with pytest.raises(NoSpace, match=r"arena of 1125899906842624 bytes: the host has memory for \d+"):
        Arena.create(1 << 50)


# -- layout ------------------------------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 5000), st.integers(MIN_DIRECT_NBYTES - 2, 5 * MIB))


@given(st.lists(st.lists(st.tuples(st.integers(0, 3 * PAGE), sizes), min_size=1, max_size=5), max_size=6), st.data())
def test_slices_are_the_plan_in_order_and_never_share_a_byte(gaps: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    files = []
    for pieces in gaps:
        at = 0
        placed = []
        for gap, nbytes in pieces:
            placed.append((at + gap, nbytes))
            at += gap + nbytes
        files.append(file_of(*placed))
    limit = data.draw(st.one_of(st.none(), st.integers(MIN_ARENA_NBYTES, 8 * MIB)))
    portions = lay_out(files, arena_nbytes=limit)
    if limit is None:
        assert len(portions) == 1
    flat = [s for one in portions for s in one.slices]
    seen: list[tuple[int, int, int]] = []
    for s in flat:
        assert s.start % BLOCK_NBYTES == 0
        assert s.stop > s.start
        if seen and seen[-1][:2] == (s.file, s.piece):
            assert seen[-1][2] == s.start
            seen[-1] = (s.file, s.piece, s.stop)
        else:
            assert s.start == 0
            seen.append((s.file, s.piece, s.stop))
    assert seen == [(f, p, piece.run.nbytes) for f, file in enumerate(files) for p, piece in enumerate(file.pieces)]
    for one in portions:
        end = 0
        for s in one.slices:
            assert s.offset >= end
            end = s.offset + s.stop - s.start
            run = files[s.file].pieces[s.piece].run
            if run.nbytes >= MIN_DIRECT_NBYTES:
                assert (s.offset - run.offset - s.start) % PAGE == 0
        assert end == one.nbytes <= (limit or end)


def test_an_arena_that_could_not_take_a_direct_write_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="expected at least"):
        lay_out((), arena_nbytes=MIN_ARENA_NBYTES - 1)
    assert [one.nbytes for one in lay_out(())] == [0]


def test_small_pieces_do_not_take_a_page_each() -> None:
    files = [file_of((0, 1024)) for _ in range(1000)]
    (one,) = lay_out(files)
    assert one.nbytes == 1000 * 1024


# -- staging -----------------------------------------------------------------------------------------------------------


def held_of(source: np.ndarray) -> HeldArray:
    """The array as a whole that this rank alone holds; its bits as integers of their size, which torch has."""
    tensor = torch.from_numpy(source.view(f"i{source.itemsize}"))
    spec = ArraySpec(ArrayId("extra", "t", "x", ""), source.shape, f"int{8 * source.itemsize}")
    return HeldArray(spec, Box.whole(source.shape), tensor, "other", "declared", replicas=(0,))


def staged(prepared: ArenaPlan, sources: Sequence[np.ndarray], *, threads: int = 1) -> bytes:
    """All bytes in the order of the plan, through one arena."""
    arena = Arena.create(prepared.arena_nbytes)
    stager, pool = Stager(prepared), Pool("elastickpt-stage", threads)
    held = [held_of(source) for source in sources]
    found = b""
    for number in range(len(prepared.portions)):
        arena.memory[:] = 0xEE
        arena.empty()
        assert stager.stage(arena, number, held, (), pool) == sum(s.stop - s.start for s in prepared.portions[number].slices)
        found += b"".join(one.into.tobytes() for one in slices_of(prepared, arena, number))
    pool.close()
    arena.close()
    return found


def expected(plan: WritePlan, source: np.ndarray) -> bytes:
    return b"".join(
        np.ascontiguousarray(part_of(source, piece.local)).tobytes() for file in plan.files for piece in file.pieces
    )


def test_strided_tensors_and_parts_of_them_are_staged_in_c_order() -> None:
    source = np.arange(700 * 64, dtype=np.uint32).reshape(64, 700).T
    held = Box((10, 5), (710, 69))
    inner = Box((20, 9), (650, 50))
    plan = plan_of(inner, shape=(800, 90), itemsize=4, held=held)
    assert staged(prepare(plan, ()), [source]) == expected(plan, source)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rounds_of_a_small_arena_carry_the_same_bytes(threads: int, order: str) -> None:
    source = np.asarray(np.random.default_rng(0).integers(0, 1 << 30, (3000, 700), dtype=np.uint32), order=order)
    whole = Box((0, 0), source.shape)
    plan = plan_of(whole, shape=source.shape, itemsize=4, held=whole)
    small = prepare(plan, (), arena_nbytes=2 * MIB)
    assert len(small.portions) == 5
    assert staged(small, [source], threads=threads) == staged(prepare(plan, ()), [source], threads=threads) == source.tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_the_mark_says_is_staged_lies_there(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-92]"""
    source = np.asarray(np.random.default_rng(2).integers(1, 255, (3000, 1000), dtype=np.uint8), order=order)
    whole = Box((0, 0), source.shape)
    parts = [Box((row, 0), (row + 100, 1000)) for row in range(0, 3000, 100)]
    pieces = tuple(plan_of(part, shape=source.shape, itemsize=1, held=whole).files[0].pieces[0] for part in parts)
    prepared = prepare(WritePlan(("p",), (PlannedFile("p/c.0.0", source.size, pieces),), (PlannedDocument(0, True),)), ())
    arena = Arena.create(prepared.arena_nbytes)
    marks: list[int] = []
    real = Arena.fill_to

    def fill_to(self: Arena, nbytes: int) -> None:
        real(self, nbytes)
        marks.append(nbytes)
        for one in slices_of(prepared, arena, 0):
            if one.at.offset + one.at.stop - one.at.start <= nbytes:
                assert one.into.tobytes() == source[one.at.piece * 100 : one.at.piece * 100 + 100].tobytes()

    monkeypatch.setattr(staging, "PART_NBYTES", 250_000)
    monkeypatch.setattr(Arena, "fill_to", fill_to)
    Stager(prepared).stage(arena, 0, [held_of(source)])
    assert marks == sorted(marks)
    assert len(marks) >= 10
    assert marks[-1] == arena.filled == prepared.portions[0].nbytes
    with pytest.raises(Refused, match="emptied before it is filled again"):
        Stager(prepared).stage(arena, 0, [held_of(source)])
    arena.empty()
    Stager(prepared).stage(arena, 0, [held_of(source)], skip={0})
    assert arena.filled == 0, "whoever stages what was skipped says it"
    arena.close()


def test_several_threads_stage_what_one_does() -> None:
    source = np.random.default_rng(1).integers(0, 255, (MIN_THREADED_NBYTES + 12345,), dtype=np.uint8)
    whole = Box((0,), source.shape)
    plan = plan_of(whole, shape=source.shape, itemsize=1, held=whole)
    assert staged(prepare(plan, ()), [source], threads=3) == source.tobytes()


def test_nobody_copies_any_more_once_one_thread_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena is somebody else's then."""
    source = np.zeros((MIN_THREADED_NBYTES + PART_NBYTES,), dtype=np.uint8)
    whole = Box((0,), source.shape)
    prepared = prepare(plan_of(whole, shape=source.shape, itemsize=1, held=whole), ())
    arena = Arena.create(prepared.arena_nbytes)
    stager, pool = Stager(prepared), Pool("elastickpt-stage", 3)
    together, failed, copying = threading.Barrier(3), threading.Event(), Counter(begun=0, ended=0)

    def copy(target: int, start: int, nbytes: int) -> None:
        copying["begun"] += 1
        if copying["begun"] <= 3:
            together.wait(60)
        if not failed.is_set():
            failed.set()
            copying["ended"] += 1
            raise OSError("no such page")
        assert failed.wait(60)
        time.sleep(0.05)  # the others are at it while it fails
        copying["ended"] += 1

    monkeypatch.setattr(staging, "ctypes", SimpleNamespace(memmove=copy))
    with pytest.raises(OSError, match="no such page"):
        stager.stage(arena, 0, [held_of(source)], (), pool)
    assert copying["ended"] == copying["begun"] >= 3
    assert arena.filled == 0
    pool.close()
    arena.close()


def test_a_partial_slice_of_a_strided_piece() -> None:
    source = np.arange(24, dtype=np.uint16).reshape(4, 6).T
    into = np.empty(10, dtype=np.uint8)
    gather(source, 8, into)
    assert into.tobytes() == source.tobytes()[8:18]


def test_an_arena_that_is_too_small_for_the_plan_is_refused() -> None:
    whole = Box((0,), (2 * PAGE,))
    prepared = prepare(plan_of(whole, shape=(2 * PAGE,), itemsize=1, held=whole), ())
    arena = Arena.create(PAGE)
    with pytest.raises(LimitExceeded, match=f"needs an arena of {2 * PAGE} bytes, found one of {PAGE}"):
        Stager(prepared).stage(arena, 0, [])
    arena.close()


def test_a_prepared_plan_is_the_same_on_the_other_side() -> None:
    held = Box((10, 5), (3710, 669))
    plan = plan_of(Box((20, 9), (2650, 550)), shape=(4000, 900), itemsize=4, held=held)
    documents = (Document("p/zarr.json", b"{}"), Document("zarr.json", b"[]"))
    for limit in (None, 2 * MIB):
        prepared = prepare(plan, documents, arena_nbytes=limit)
        other = decode_prepared(prepared.encoded)
        assert (other.plan, other.documents, other.portions, other.digest) == (
            plan,
            documents,
            prepared.portions,
            prepared.digest,
        )
    assert prepare(plan, documents).digest != prepare(plan, documents[:1]).digest
    empty = prepare(WritePlan((), (), ()), ())
    assert decode_prepared(empty.encoded).plan == empty.plan
