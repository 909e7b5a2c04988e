"""Chunk shapes by rule and example; runs against copying a box into padded chunks byte by byte."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.arrays import Box
from elastickpt.format.version import MAX_CHUNKS, MIB
from elastickpt.layout.algebra import prove_coverage
from elastickpt.layout.grid import (
    CHUNK_NBYTES,
    ByteRun,
    c_strides,
    chunk_count,
    chunk_nbytes,
    chunk_shape,
    chunks,
    fold,
    runs_of,
)

law = settings(max_examples=200, deadline=None)
Shape = tuple[int, ...]


@pytest.mark.parametrize(
    ("shape", "itemsize", "cuts", "expected"),
    [
        ((), 4, (), ()),
        ((10,), 4, (), (10,)),
        ((0, 5), 4, (), (1, 5)),
        ((4096, 4096), 4, (), (4096, 4096)),
        ((32_768, 8192), 4, (), (8192, 8192)),  # rows of 32 KiB: 8192 of them make 256 MiB
        ((3, 100 * MIB), 4, (), (1, 64 * MIB)),  # one row exceeds 256 MiB: the next axis is cut
        ((2, 3, 80 * MIB), 4, (), (1, 1, 64 * MIB)),
        ((128_256, 4096), 2, (), (32_768, 4096)),
        ((1 << 33,), 1, (), (256 * MIB,)),
    ],
)
def test_axes_are_cut_in_order_to_256_mib(shape: Shape, itemsize: int, cuts: Shape, expected: Shape) -> None:
    assert chunk_shape(shape, itemsize=itemsize, cuts=cuts) == expected


@pytest.mark.parametrize(
    ("shape", "cuts", "expected"),
    [
        ((4096, 4096), (1024, 0), (4096, 4096)),  # rows are byte ranges: no cut of the first axis
        ((4096, 4096), (0, 2048), (4096, 2048)),
        ((10, 10), (0, 3), (10, 3)),
        ((10, 10), (0, 30), (10, 10)),
        ((32_768, 8192), (0, 4096), (16_384, 4096)),  # the step is shorter by the cut, so that more rows fit
        ((8, 64, 64), (0, 16, 32), (8, 16, 32)),
        ((3, 100 * MIB), (0, 50 * MIB), (1, 50 * MIB)),
        ((3, 200 * MIB), (0, 100 * MIB), (1, 64 * MIB)),
        ((1 << 26, 8), (0, 4), (16 * MIB, 4)),
    ],
)
def test_later_axes_are_also_cut_where_the_layout_cuts_them(shape: Shape, cuts: Shape, expected: Shape) -> None:
    assert chunk_shape(shape, itemsize=4, cuts=cuts) == expected


@law
@given(st.integers(0, 3), st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_a_chunk_is_never_over_256_mib_and_none_is_empty(ndim: int, itemsize: int, data: st.DataObject) -> None:
    extents = st.integers(0, 1 << 36 // max(ndim, 1))
    dims, cuts = (tuple(data.draw(extents) for _ in range(ndim)) for _ in range(2))
    found = chunk_shape(dims, itemsize=itemsize, cuts=cuts)
    assert chunk_nbytes(found, itemsize=itemsize) <= CHUNK_NBYTES
    assert all(1 <= step <= max(extent, 1) for step, extent in zip(found, dims, strict=True))
    assert chunk_count(dims, found) <= MAX_CHUNKS
    assert found == chunk_shape(dims, itemsize=itemsize, cuts=(0, *cuts[1:]) if cuts else ())


def test_cuts_that_make_too_many_chunks_are_dropped() -> None:
    assert chunk_shape((4, 1 << 25), itemsize=1, cuts=(0, 1)) == (4, 1 << 25)
    with pytest.raises(LimitExceeded, match="more than 16777216 chunks"):
        chunk_shape((1 << 25, (256 << 20) + 1), itemsize=1)


def test_cuts_of_another_number_of_axes_are_refused() -> None:
    with pytest.raises(Malformed, match=r"cuts \(1,\) for an array of shape \(2, 2\)"):
        chunk_shape((2, 2), itemsize=4, cuts=(1,))


def test_chunks_cover_the_array_once_in_c_order() -> None:
    found = list(chunks((5, 7), (2, 3)))
    assert [index for index, _ in found] == list(product(range(3), range(3)))
    assert prove_coverage((5, 7), [box for _, box in found]).exact
    assert chunk_count((5, 7), (2, 3)) == 9
    assert list(chunks((), ())) == [((), Box((), ()))]
    assert list(chunks((0, 3), (1, 3))) == []


@st.composite
def boxes_on_grids(draw: st.DrawFn) -> tuple[Shape, Shape, Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    steps = tuple(draw(st.integers(1, n + 1)) for n in shape)
    pairs = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, steps, Box(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))


def places(shape: Shape, steps: Shape, box: Box) -> dict[tuple[Shape, int], int]:
    """(chunk, element's place in it) → element's number in the array, for every element of a box: one by one."""
    found = {}
    for index in product(*map(range, box.start, box.stop)):
        chunk = tuple(at // step for at, step in zip(index, steps, strict=True))
        within = tuple(at % step for at, step in zip(index, steps, strict=True))
        place = int(np.ravel_multi_index(within, steps)) if steps else 0
        found[chunk, place] = int(np.ravel_multi_index(index, shape)) if shape else 0
    return found


def rows_of(run: ByteRun, itemsize: int) -> list[int]:
    """The places of a run's elements in its chunk, in the order of its bytes."""
    assert run.nbytes % run.row_nbytes == run.row_nbytes % itemsize == run.offset % itemsize == 0
    starts = range(run.offset, run.offset + run.nbytes // run.row_nbytes * run.row_stride, run.row_stride)
    return [at // itemsize for start in starts for at in range(start, start + run.row_nbytes, itemsize)]


@law
@given(boxes_on_grids(), st.sampled_from([1, 2, 4]))
def test_runs_are_the_bytes_of_the_box_each_once(case: tuple[Shape, Shape, Box], itemsize: int) -> None:
    shape, steps, box = case
    runs = runs_of(box, shape=shape, chunk_shape=steps, itemsize=itemsize)
    found = {}
    for run in runs:
        assert run.nbytes == run.box.count * itemsize
        elements = places(shape, steps, run.box)  # in C order of the run's box
        assert [(run.chunk, place) for place in rows_of(run, itemsize)] == list(elements)
        assert not found.keys() & elements.keys()
        found |= elements
    assert found == places(shape, steps, box)


@law
@given(boxes_on_grids())
def test_runs_are_in_order_and_as_few_as_one_stride_allows(case: tuple[Shape, Shape, Box]) -> None:
    shape, steps, box = case
    runs = runs_of(box, shape=shape, chunk_shape=steps, itemsize=1)
    assert [(run.chunk, run.box.start) for run in runs] == sorted((run.chunk, run.box.start) for run in runs)
    for run in runs:
        jumps = set(np.diff(rows_of(run, 1)).tolist())
        assert (run.row_nbytes == run.row_stride == run.nbytes) == (jumps <= {1})
    for before, after in pairwise(runs):
        if before.chunk == after.chunk:
            starts = [rows_of(run, 1)[:: run.row_nbytes] for run in (before, after)]
            assert min(map(len, starts)) > 1
            assert len(set(np.diff(starts[0] + starts[1]).tolist())) > 1, "two runs that could have been one"


def test_the_shapes_of_runs() -> None:
    shape = steps = (8, 8)

    def only(box: Box, chunk: Shape = steps) -> ByteRun:
        (run,) = runs_of(box, shape=shape, chunk_shape=chunk, itemsize=4)
        return run

    rows = Box((2, 0), (5, 8))
    assert only(rows) == ByteRun((0, 0), rows, offset=64, nbytes=96, row_nbytes=96, row_stride=96)
    columns = Box((0, 2), (8, 5))
    assert only(columns) == ByteRun((0, 0), columns, offset=8, nbytes=96, row_nbytes=12, row_stride=32)
    regular = Box((0, 4), (8, 8))  # the grid is cut there too: contiguous
    assert only(regular, (8, 4)) == ByteRun((0, 1), regular, offset=0, nbytes=128, row_nbytes=128, row_stride=128)
    padded = Box((0, 6), (8, 8))  # the last chunk is stored with its full shape: rows of 2 at a stride of 3
    assert only(padded, (8, 3)) == ByteRun((0, 2), padded, offset=0, nbytes=64, row_nbytes=8, row_stride=12)


def test_inner_whole_axes_share_one_stride_and_outer_ones_split() -> None:
    shape = (4, 3, 5)
    whole_middle = runs_of(Box((0, 0, 1), (4, 3, 4)), shape=shape, chunk_shape=shape, itemsize=1)
    assert [(run.nbytes, run.row_nbytes, run.row_stride) for run in whole_middle] == [(36, 3, 5)]
    part_middle = runs_of(Box((0, 0, 1), (4, 2, 4)), shape=shape, chunk_shape=shape, itemsize=1)
    assert [(run.offset, run.nbytes, run.row_stride) for run in part_middle] == [(1 + 15 * k, 6, 5) for k in range(4)]


def test_boxes_without_elements_have_no_runs_and_points_have_one() -> None:
    assert runs_of(Box((3,), (3,)), shape=(8,), chunk_shape=(8,), itemsize=4) == ()
    assert runs_of(Box((0, 0), (0, 4)), shape=(0, 4), chunk_shape=(1, 4), itemsize=4) == ()
    assert runs_of(Box((), ()), shape=(), chunk_shape=(), itemsize=4) == (ByteRun((), Box((), ()), 0, 4, 4, 4),)


def test_a_box_beyond_the_array_is_refused() -> None:
    for box in (Box((0,), (9,)), Box((0, 0), (1, 1))):
        with pytest.raises(Malformed, match=r"in an array of shape \(8,\)"):
            runs_of(box, shape=(8,), chunk_shape=(8,), itemsize=4)


def test_fold_of_the_documented_example() -> None:
    strides = c_strides((5, 3, 6), 1)
    assert strides == (18, 6, 1)
    assert fold((2, 3, 4), strides, below=3, stride=1) == (2, 4)
    assert fold((2, 3, 4), strides, below=2, stride=6) == (0, 6)
