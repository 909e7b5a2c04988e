"""Boxes that are put together of several pieces hold their own bytes, each once; the others are left alone."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.format.arrays import Box
from elastickpt.format.piece_columns import FragmentColumns, columns_of
from elastickpt.format.records import StoredFile, StoredPiece
from elastickpt.loading.box_parts import MANY, Boxes, BoxParts
from elastickpt.loading.targets import Rows, copy_rows

BLOCK, WIDTH = 64, 24  # bytes; of a row


def piece_of(box: Box, *, stride: int | None = None) -> StoredPiece:
    nbytes = box.count
    row = nbytes if stride is None else box.shape[-1]
    return StoredPiece("k", box, 0, 0, nbytes, row, stride or nbytes, (0,) * -(-nbytes // BLOCK))


def map_of(writer: int, pieces: list[StoredPiece]) -> FragmentColumns:
    return FragmentColumns(writer, "a", BLOCK, (StoredFile(0, "p", 1 << 20),), columns_of(pieces))


def proven(maps: list[FragmentColumns], boxes: list[Box]) -> tuple[list[tuple[int, ...]], list[bool]]:
    """Stretches as rows, and whether each box is held by them; every piece is looked at beside every box."""
    parts = BoxParts(Boxes.of(boxes))
    for number, columns in enumerate(maps):
        count = len(columns.pieces)
        of = np.repeat(np.arange(len(boxes)), count)
        parts.add(number, columns, np.tile(np.arange(count), len(boxes)), of)
    found, held = parts.proven()
    return list(zip(*(column.tolist() for column in found.columns), strict=True)), held.tolist()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=8), st.data())
def test_rows_of_several_pieces_are_the_bytes_of_the_box(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    rows = sum(count for count, _ in pieces)
    whole = np.random.default_rng(rows).integers(0, 256, (rows, WIDTH), dtype=np.uint8)
    cuts = np.cumsum([0, *(count for count, _ in pieces)]).tolist()
    of_writer: dict[int, list[StoredPiece]] = {writer: [] for _, writer in pieces}
    for (count, writer), low in zip(pieces, cuts, strict=False):
        of_writer[writer].append(piece_of(Box((low, 0), (low + count, WIDTH))))
    maps = [map_of(writer, data.draw(st.permutations(own))) for writer, own in of_writer.items()]
    ends = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(1, rows)), min_size=1, max_size=3))
    boxes = [Box((min(low, high - 1), 0), (max(high, low + 1), WIDTH)) for low, high in ends]
    found, held = proven(maps, boxes)
    assert held == [True] * len(boxes)
    filled = [np.zeros(box.count, dtype=np.uint8) for box in boxes]
    times = [np.zeros(box.count, dtype=np.int64) for box in boxes]
    for number, piece, start, end, low, high, target, at, *rows_of in found:
        assert rows_of == [0, 0, 0]
        stored = maps[number].pieces.piece(piece)
        data_of = whole[stored.box.start[0] : stored.box.stop[0]].reshape(-1)
        assert start % BLOCK == 0
        assert end % BLOCK == 0 or end == stored.nbytes
        assert start <= low < start + BLOCK
        assert end - BLOCK < high <= end
        filled[target][at : at + high - low] = data_of[low:high]
        times[target][at : at + high - low] += 1
    for box, own, count in zip(boxes, filled, times, strict=True):
        assert own.tobytes() == whole[box.start[0] : box.stop[0]].tobytes()
        assert set(count.tolist()) == {1}


def test_what_is_not_whole_rows_once_is_left() -> None:
    lower, upper = Box((0, 0), (4, WIDTH)), Box((4, 0), (8, WIDTH))
    box = Box((2, 0), (6, WIDTH))
    for pieces, right in (
        ([piece_of(lower), piece_of(upper)], True),
        ([piece_of(lower)], False),  # a gap at the end
        ([piece_of(upper)], False),  # and at the start
        ([piece_of(Box((0, 0), (3, WIDTH))), piece_of(upper)], False),  # and inside
        ([piece_of(lower), piece_of(Box((3, 0), (8, WIDTH)))], False),  # an overlap
        ([piece_of(lower), piece_of(upper), piece_of(upper)], False),
        ([piece_of(lower), piece_of(Box((4, 0), (8, 12))), piece_of(Box((4, 11), (8, WIDTH)))], False),  # halves that overlap
        ([piece_of(lower), piece_of(Box((4, 0), (8, 12))), piece_of(Box((4, 13), (8, WIDTH)))], False),  # or leave a gap
        ([piece_of(lower, stride=WIDTH + 8), piece_of(upper)], False),  # rows with gaps
        ([], False),
    ):
        found, held = proven([map_of(0, pieces)] if pieces else [], [box])
        assert held == [right]
        assert len(found) == (2 if right else 0)


@given(st.data())
def test_parts_along_any_axes_are_the_bytes_of_the_box(data: st.DataObject) -> None:
    """Pieces that lie on a grid, of a box that lies anywhere; each stretch is read in parts of whole blocks."""
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    whole = np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)
    cuts = [sorted({0, extent, *data.draw(st.lists(st.integers(0, extent), max_size=2))}) for extent in shape]
    cells = [Box(tuple(low for low, _ in cell), tuple(high for _, high in cell)) for cell in product(*map(pairwise, cuts))]
    first = data.draw(st.sets(st.sampled_from(range(len(cells)))))
    of_writer = {writer: [cell for k, cell in enumerate(cells) if (k in first) == (writer == 0)] for writer in range(2)}
    maps = [map_of(writer, [piece_of(cell) for cell in own]) for writer, own in of_writer.items() if own]
    lows = [data.draw(st.integers(0, extent - 1)) for extent in shape]
    highs = [data.draw(st.integers(low + 1, extent)) for low, extent in zip(lows, shape, strict=True)]
    box = Box(tuple(lows), tuple(highs))
    found, held = proven(maps, [box])
    wide = any(math.prod(cell.shape[1:]) - 1 >= BLOCK for cell in cells)
    assert held == [True] or len(shape) > 2 or wide  # what lies otherwise is looked at alone
    filled, times = np.zeros(box.count, dtype=np.uint8), np.zeros(box.count, dtype=np.uint8)
    for number, piece, start, end, low, high, _, at, *rows in found:
        stored = maps[number].pieces.piece(piece).box
        source = whole[tuple(map(slice, stored.start, stored.stop))].tobytes()
        assert start % BLOCK == 0
        assert end % BLOCK == 0 or end == len(source)
        assert start <= low < start + BLOCK
        assert end - BLOCK < high <= end
        bounds = [start, *sorted(data.draw(st.sets(st.sampled_from(range(start, end, BLOCK)))) - {start}), end]
        for begin, stop in pairwise(bounds):
            for into, of in ((filled, source), (times, bytes([1]) * len(source))):
                fresh = np.zeros_like(into)
                part = memoryview(of)[begin:stop]
                copy_rows(part, low - begin, high - begin, fresh, at, Rows(*(rows if rows[0] else [high - low] * 3)))
                into += fresh
    if held == [True]:
        assert filled.tobytes() == whole[tuple(map(slice, box.start, box.stop))].tobytes()
        assert set(times.tolist()) == {1}


def test_many_parts_along_two_axes_are_looked_at_alone() -> None:
    side = 6
    pieces = [piece_of(Box((row, column), (row + 1, column + 1))) for row in range(side) for column in range(side)]
    assert proven([map_of(0, pieces)], [Box((0, 0), (side, side))])[1] == [side * side <= MANY]
    assert proven([map_of(0, pieces)], [Box((0, 0), (2, side))])[1] == [True]
    assert proven([map_of(0, pieces)], [Box((0, 0), (side, 1))])[1] == [True]


def test_a_piece_beside_the_box_is_no_matter_of_it() -> None:
    pieces = [piece_of(Box((0, 0), (4, WIDTH))), piece_of(Box((8, 0), (9, 12))), piece_of(Box((8, 12), (9, WIDTH)))]
    assert proven([map_of(0, pieces)], [Box((1, 0), (3, WIDTH))])[1] == [True]


def test_an_array_without_axes_is_left() -> None:
    assert proven([map_of(0, [piece_of(Box((), ()))])], [Box((), ())])[1] == [False]
