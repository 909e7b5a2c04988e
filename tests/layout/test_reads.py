"""Read plans, carried out by a simple engine on byte buffers, against slices of a dense array."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import Malformed
from elastickpt.format.arrays import Box
from elastickpt.layout import reads as reads_module
from elastickpt.layout.algebra import contains, intersect, prove_box_coverage, relative
from elastickpt.layout.grid import ByteRun, chunk_count, chunk_nbytes, runs_of, slices
from elastickpt.layout.reads import Direct, Read, Scatter, Segment, match_pieces, plan_reads, segments

law = settings(max_examples=200, deadline=None)
Shape = tuple[int, ...]
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Stored:
    """A dense array and the chunk buffers that hold it, `chunks` by index on the grid."""

    whole: np.ndarray
    chunks: dict[Shape, bytearray]
    runs: tuple[ByteRun, ...]

    @property
    def itemsize(self) -> int:
        return self.whole.itemsize


def inside(whole: np.ndarray, box: Box) -> np.ndarray:
    return whole[tuple(map(slice, box.start, box.stop))]


def store(shape: Shape, boxes: list[Box], *, chunk_shape: Shape, itemsize: int) -> Stored:
    """The boxes of an array of distinct-looking elements, written run by run."""
    whole = (np.arange(prod(shape), dtype=np.uint64) * 2_654_435_761 + 1).astype(DTYPES[itemsize]).reshape(shape)
    runs = tuple(run for box in boxes for run in runs_of(box, shape=shape, chunk_shape=chunk_shape, itemsize=itemsize))
    chunks: dict[Shape, bytearray] = {}
    for run in runs:
        chunk = chunks.setdefault(run.chunk, bytearray(chunk_nbytes(chunk_shape, itemsize=itemsize)))
        data = inside(whole, run.box).tobytes()
        for row in range(run.nbytes // run.row_nbytes):
            at = run.offset + row * run.row_stride
            chunk[at : at + run.row_nbytes] = data[row * run.row_nbytes : (row + 1) * run.row_nbytes]
    return Stored(whole, chunks, runs)


def fetch(stored: Stored, read: Read) -> bytes:
    run = stored.runs[read.piece]
    file = stored.chunks[run.chunk]
    return b"".join(bytes(file[s.offset : s.offset + s.nbytes]) for s in segments(run, read.start, read.end))


def carry_out(stored: Stored, reads: tuple[Read, ...], wanted: Box) -> tuple[np.ndarray, np.ndarray]:
    """(the wanted box as read, how often each of its elements was delivered)."""
    found = np.zeros(wanted.shape, dtype=stored.whole.dtype)
    times = np.zeros(wanted.shape, dtype=int)
    flat = found.reshape(-1).view(np.uint8)
    for read in reads:
        data = np.frombuffer(fetch(stored, read), dtype=np.uint8)
        for step in read.steps:
            times[tuple(map(slice, relative(step.part, wanted).start, relative(step.part, wanted).stop))] += 1
            source = step.source - read.start
            if isinstance(step, Direct):
                flat[step.target : step.target + step.nbytes] = data[source : source + step.nbytes]
            else:
                views = [
                    np.ndarray(step.part.shape, found.dtype, buffer, offset, strides)
                    for buffer, offset, strides in (
                        (flat, step.target, step.target_strides),
                        (data, source, step.source_strides),
                    )
                ]
                views[0][...] = views[1]
    return found, times


def needed_bytes(run: ByteRun, wanted: Box, itemsize: int) -> np.ndarray:
    """shape=[nbytes]: which bytes of a piece are wanted."""
    mask = np.zeros(run.box.shape, dtype=bool)
    part = intersect(run.box, wanted)
    if part is not None:
        inside(mask, relative(part, run.box))[...] = True
    return np.repeat(mask.reshape(-1), itemsize)


def assert_frugal(stored: Stored, reads: tuple[Read, ...], wanted: Box, *, block_nbytes: int, limit: int) -> None:
    """At most 2 blocks beyond what is needed for each contiguous run; every block read holds some of it, none twice."""
    for number, run in enumerate(stored.runs):
        needed = needed_bytes(run, wanted, stored.itemsize)
        count = int(np.count_nonzero(np.diff(needed.astype(int), prepend=0) == 1))
        of_piece = [read for read in reads if read.piece == number]
        assert sum(read.nbytes for read in of_piece) <= needed.sum() + 2 * block_nbytes * count
        blocks = [block for read in of_piece for block in range(*read.blocks)]
        holding = {at // block_nbytes for at in np.flatnonzero(needed).tolist()}
        assert blocks == sorted(holding), "in order, none twice, none in vain"
        for before, after in pairwise(of_piece):
            whole = before.blocks[1] - before.blocks[0] == max(limit // block_nbytes, 1)
            assert whole or before.blocks[1] < after.blocks[0], "reads touch only where the limit has cut them"
        for read in of_piece:
            assert read.start == read.blocks[0] * block_nbytes
            assert read.end == min(read.blocks[1] * block_nbytes, run.nbytes)
            direct = len(read.steps) == 1 and isinstance(read.steps[0], Direct)
            assert direct or read.nbytes <= max(limit, block_nbytes)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    pairs = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Stored, Box, int, int]:
    """A stored array of 1 to 4 axes, a wanted box, a block size and a limit for scattered reads."""
    longest = draw(st.sampled_from([30, 30, 9, 9]))
    shape = tuple(draw(st.lists(st.integers(1, longest), min_size=1, max_size=2 if longest == 30 else 4)))
    chunk_shape = tuple(draw(st.integers(1, n + 2)) for n in shape)
    itemsize = draw(st.sampled_from(sorted(DTYPES)))
    stored = store(shape, draw(st.lists(boxes_in(shape), max_size=4)), chunk_shape=chunk_shape, itemsize=itemsize)
    block_nbytes = itemsize * draw(st.sampled_from([1, 2, 4, 8, 16, 64]))
    return stored, draw(boxes_in(shape)), block_nbytes, draw(st.sampled_from([0, 16, 100, 1 << 20]))


@law
@given(cases())
def test_a_plan_delivers_the_elements_that_pieces_hold_and_reads_little_else(
    case: tuple[Stored, Box, int, int],
) -> None:
    stored, wanted, block_nbytes, limit = case
    reads = plan_reads(wanted, stored.runs, block_nbytes=block_nbytes, itemsize=stored.itemsize, scatter_nbytes=limit)
    found, times = carry_out(stored, reads, wanted)
    held = np.zeros(stored.whole.shape, dtype=int)
    for run in stored.runs:
        inside(held, run.box)[...] += 1
    assert np.array_equal(times, inside(held, wanted))
    assert np.array_equal(found, np.where(times > 0, inside(stored.whole, wanted), 0))
    assert_frugal(stored, reads, wanted, block_nbytes=block_nbytes, limit=limit)


@law
@given(cases())
def test_steps_say_what_they_are(case: tuple[Stored, Box, int, int]) -> None:
    """A Direct is contiguous on both sides, a Scatter is not; parts are in the piece, the wanted box and the read."""
    stored, wanted, block_nbytes, limit = case
    numbers = np.arange(max(wanted.count, 1))[: wanted.count].reshape(wanted.shape)
    for read in plan_reads(wanted, stored.runs, block_nbytes=block_nbytes, itemsize=stored.itemsize, scatter_nbytes=limit):
        run = stored.runs[read.piece]
        own = np.arange(run.box.count).reshape(run.box.shape)
        for step in read.steps:
            assert contains(wanted, step.part)
            assert contains(run.box, step.part)
            sides = [inside(own, relative(step.part, run.box)), inside(numbers, relative(step.part, wanted))]
            contiguous = all((np.diff(side.reshape(-1)) == 1).all() for side in sides)
            assert isinstance(step, Direct) == contiguous
            assert [step.source, step.target] == [int(side.flat[0]) * stored.itemsize for side in sides]
            assert read.start <= step.source
            assert (int(sides[0].max()) + 1) * stored.itemsize <= read.end


def test_the_same_layout_is_one_direct_read_however_long() -> None:
    box = Box((1024, 0), (4096, 4096))
    runs = runs_of(box, shape=(4096, 4096), chunk_shape=(4096, 4096), itemsize=4)
    (read,) = plan_reads(box, runs, block_nbytes=1 << 18, itemsize=4)
    assert read == Read(0, (0, 192), 0, 48 << 20, (Direct(box, 0, 0, 48 << 20),))
    assert list(segments(runs[0], read.start, read.end)) == [Segment(16 << 20, 48 << 20)]


def test_a_row_range_reads_whole_blocks_at_its_edges() -> None:
    (run,) = runs_of(Box.whole((1000, 100)), shape=(1000, 100), chunk_shape=(1000, 100), itemsize=4)
    (read,) = plan_reads(Box((3, 0), (700, 100)), [run], block_nbytes=1024, itemsize=4)
    assert read.blocks == (1, 274)
    assert read.steps == (Direct(Box((3, 0), (700, 100)), source=1200, target=0, nbytes=278_800),)


def test_narrow_columns_are_one_covering_read_and_wide_ones_many() -> None:
    """Gaps under one block are read along; wider ones are skipped, and what is then one row is Direct."""
    shape = (16, 4096)
    (run,) = runs_of(Box.whole(shape), shape=shape, chunk_shape=shape, itemsize=1)
    wanted = Box((0, 0), (16, 1024))
    (covering,) = plan_reads(wanted, [run], block_nbytes=4096, itemsize=1)
    assert covering.blocks == (0, 16)
    assert covering.steps == (Scatter(wanted, 0, (4096, 1), 0, (1024, 1)),)
    rows = plan_reads(wanted, [run], block_nbytes=512, itemsize=1)
    assert [(read.start, read.end) for read in rows] == [(4096 * k, 4096 * k + 1024) for k in range(16)]
    assert [read.steps for read in rows] == [(Direct(Box((k, 0), (k + 1, 1024)), 4096 * k, 1024 * k, 1024),) for k in range(16)]


def test_a_gap_of_a_whole_block_is_skipped_where_it_is_one() -> None:
    """Rows of 4 blocks of which 3 are wanted; then rows that are no whole blocks, so that no block is a gap."""

    def blocks(shape: Shape, wanted: Box) -> list[tuple[int, int]]:
        (run,) = runs_of(Box.whole(shape), shape=shape, chunk_shape=shape, itemsize=1)
        return [read.blocks for read in plan_reads(wanted, [run], block_nbytes=4, itemsize=1)]

    assert blocks((3, 16), Box((0, 0), (3, 12))) == [(0, 3), (4, 7), (8, 11)]
    assert blocks((3, 9), Box((0, 0), (3, 5))) == [(0, 6)]


def test_tiny_rows_do_not_explode_and_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows of one element, of a piece of 256 MiB: looked at together, in reads of 16 MiB of a few steps."""
    looked_at = []
    monkeypatch.setattr(reads_module, "slices", lambda box, axis: looked_at.extend(slices(box, axis)) or looked_at)
    shape = (1 << 20, 64)
    (run,) = runs_of(Box.whole(shape), shape=shape, chunk_shape=shape, itemsize=4)
    wanted = Box((0, 5), (1 << 20, 6))
    reads = plan_reads(wanted, [run], block_nbytes=1 << 18, itemsize=4)
    assert [read.nbytes for read in reads] == [16 << 20] * 16
    assert sum(len(read.steps) for read in reads) <= 3 * 16
    assert len(looked_at) == 1
    assert prove_box_coverage(wanted, [step.part for read in reads for step in read.steps]).exact


def test_segments_follow_the_rows_of_a_strided_piece() -> None:
    (run,) = runs_of(Box((0, 2), (4, 5)), shape=(4, 8), chunk_shape=(4, 8), itemsize=1)
    assert list(segments(run, 0, 12)) == [Segment(2, 3), Segment(10, 3), Segment(18, 3), Segment(26, 3)]
    assert list(segments(run, 4, 8)) == [Segment(11, 2), Segment(18, 2)]
    assert list(segments(run, 4, 4)) == []


def test_points_are_read_and_empty_boxes_are_not() -> None:
    point = Box((), ())
    (run,) = runs_of(point, shape=(), chunk_shape=(), itemsize=8)
    assert plan_reads(point, [run], block_nbytes=64, itemsize=8) == (Read(0, (0, 1), 0, 8, (Direct(point, 0, 0, 8),)),)
    (line,) = runs_of(Box.whole((9,)), shape=(9,), chunk_shape=(9,), itemsize=8)
    assert plan_reads(Box((4,), (4,)), [line], block_nbytes=64, itemsize=8) == ()


@pytest.mark.parametrize(
    ("nbytes", "row_nbytes", "row_stride", "offset"),
    [(28, 28, 28, 0), (32, 0, 8, 0), (32, 16, 8, 0), (32, 5, 8, 0), (32, 32, 32, -4), (32, 64, 64, 0)],
)
def test_pieces_whose_numbers_contradict_each_other_are_refused(
    nbytes: int, row_nbytes: int, row_stride: int, offset: int
) -> None:
    """What a damaged or malicious fragment map could say of 8 elements of 4 bytes."""
    run = ByteRun((0,), Box.whole((8,)), offset, nbytes, row_nbytes, row_stride)
    with pytest.raises(Malformed, match=r"stored piece \[0:8\] of elements of 4 bytes"):
        plan_reads(Box.whole((8,)), [run], block_nbytes=64, itemsize=4)


@pytest.mark.parametrize("block_nbytes", [0, 6])
def test_blocks_hold_whole_elements(block_nbytes: int) -> None:
    with pytest.raises(Malformed, match="do not hold whole elements of 4 bytes"):
        plan_reads(Box.whole((8,)), [], block_nbytes=block_nbytes, itemsize=4)


@law
@given(st.integers(0, 3).flatmap(lambda n: st.tuples(boxes_in((6,) * n), st.lists(boxes_in((6,) * n)))))
def test_matched_pieces_are_those_that_intersect(case: tuple[Box, list[Box]]) -> None:
    wanted, boxes = case
    starts, stops = (
        np.array([getattr(box, side) for box in boxes], dtype=np.int64).reshape(len(boxes), wanted.ndim)
        for side in ("start", "stop")
    )
    expected = [k for k, box in enumerate(boxes) if intersect(box, wanted) is not None]
    assert match_pieces(wanted, starts, stops).tolist() == expected


def test_matching_refuses_another_number_of_axes() -> None:
    columns = np.zeros((3, 2), dtype=np.int64)
    with pytest.raises(Malformed, match=r"shapes \(3, 2\) and \(3, 2\), for box \[0:4\]"):
        match_pieces(Box.whole((4,)), columns, columns)


def test_resharding_rows_to_columns_reads_every_byte_once_per_target() -> None:
    """Two ranks wrote rows, three read columns, in a grid of several chunks: what each wants is delivered, no more."""
    shape, chunk_shape = (10, 12), (4, 12)
    stored = store(shape, [Box((0, 0), (5, 12)), Box((5, 0), (10, 12))], chunk_shape=chunk_shape, itemsize=4)
    assert len(stored.chunks) == chunk_count(shape, chunk_shape)
    for low, high in ((0, 4), (4, 8), (8, 12)):
        wanted = Box((0, low), (10, high))
        reads = plan_reads(wanted, stored.runs, block_nbytes=16, itemsize=4)
        found, times = carry_out(stored, reads, wanted)
        assert (times == 1).all()
        assert np.array_equal(found, stored.whole[:, low:high])
        assert sum(read.nbytes for read in reads) == wanted.count * 4
