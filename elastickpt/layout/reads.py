"""From stored pieces to what a reader fetches: which blocks of a piece, where their bytes are, and where they go.

Three frames, all in bytes but the first: *global* (elements of the array), *of the piece* (its stored bytes in its
own C order, which block checksums count in), *of the wanted box* (its elements in its own C order, as a fresh buffer
holds them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul, sub
from typing import Protocol

import numpy as np
import numpy.typing as npt

from elastickpt.errors import Malformed
from elastickpt.format.arrays import Box
from elastickpt.format.version import MIB
from elastickpt.layout.algebra import intersect
from elastickpt.layout.grid import c_strides, fold, slices
from elastickpt.layout.placement import flat_boxes

SCATTER_NBYTES = 16 * MIB  # of a read that goes through a buffer: bounds a reader's memory, long enough for any disk


class ReadablePiece(Protocol):
    """What a plan needs to know of a stored piece; `StoredPiece` has it."""

    @property
    def box(self) -> Box: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def row_nbytes(self) -> int: ...
    @property
    def row_stride(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Direct:
    """`nbytes` consecutive bytes, at `source` in the piece and at `target` in the wanted box: the elements of `part`.

    Blocks that lie wholly inside may be read straight to where they belong.
    """

    part: Box  # global
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Scatter:
    """The elements of `part`, strided in the piece, the wanted box or both: first byte and strides of each side."""

    part: Box  # global
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Blocks `[first, stop)` of one piece, to be fetched and verified whole, and what they deliver.

    They are bytes `[start, end)` of the piece; `segments` says where in its file. `piece` is a number in the input.
    """

    piece: int
    blocks: tuple[int, int]
    start: int
    end: int
    steps: tuple[Direct | Scatter, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """`nbytes` consecutive bytes of a file, from `offset` on."""

    offset: int
    nbytes: int


def plan_reads(
    wanted: Box, pieces: Sequence[ReadablePiece], *, block_nbytes: int, itemsize: int, scatter_nbytes: int = SCATTER_NBYTES
) -> tuple[Read, ...]:
    """The reads that deliver every element of `wanted` that lies in `pieces`, in the order of pieces, then of blocks.

    `pieces` are of one writer, whose `block_nbytes` it is. Every block of a read holds needed bytes and no block is
    in two reads: the bytes read are those needed, and less than 2 blocks more for each contiguous run of them in the
    piece. A read has at most `scatter_nbytes`, or one block, unless a Direct is its only step. Raises Malformed for a
    piece whose numbers contradict each other. Whether pieces cover `wanted` is not looked at here.
    """
    if block_nbytes < 1 or block_nbytes % itemsize:
        raise Malformed(f"blocks of {block_nbytes} bytes do not hold whole elements of {itemsize} bytes")
    reads: list[Read] = []
    for number, piece in enumerate(pieces):
        part = intersect(wanted, piece.box)
        if part is None:
            continue
        _check(piece, itemsize)
        if part == piece.box and part.start[1:] == wanted.start[1:] and part.stop[1:] == wanted.stop[1:]:
            # whole rows of what is wanted: the usual case, in 5 µs, where finding the same out takes 12
            target = (part.start[0] - wanted.start[0]) * (piece.nbytes // (part.stop[0] - part.start[0])) if part.start else 0
            blocks = (0, -(-piece.nbytes // block_nbytes))
            reads.append(Read(number, blocks, 0, piece.nbytes, (Direct(part, 0, target, piece.nbytes),)))
            continue
        strides = c_strides(piece.box.shape, itemsize), c_strides(wanted.shape, itemsize)
        frames = _Frames(piece.box, wanted, itemsize, *strides)
        for first, stop, only in _ranges(frames, part, block_nbytes):
            step = frames.step(only) if only else None
            most = max(scatter_nbytes // block_nbytes, 1) if not isinstance(step, Direct) else stop - first
            for low in range(first, stop, most):
                high = min(low + most, stop)
                start, end = low * block_nbytes, min(high * block_nbytes, piece.nbytes)
                steps = (step,) if step and (low, high) == (first, stop) else frames.steps(part, start, end)
                reads.append(Read(number, (low, high), start, end, steps))
    return tuple(reads)


def segments(piece: ReadablePiece, start: int, end: int) -> Iterator[Segment]:
    """Where bytes `[start, end)` of a piece are in its file, in order; one segment unless it is stored as rows."""
    if piece.row_nbytes == piece.row_stride:
        if start < end:
            yield Segment(piece.offset + start, end - start)
        return
    while start < end:
        row, within = divmod(start, piece.row_nbytes)
        nbytes = min(end - start, piece.row_nbytes - within)
        yield Segment(piece.offset + row * piece.row_stride + within, nbytes)
        start += nbytes


def place_in_file(piece: ReadablePiece, position: int) -> int:
    """Where a byte of a piece is in its file."""
    row, inside = divmod(position, piece.row_nbytes)
    return piece.offset + row * piece.row_stride + inside


def match_pieces(wanted: Box, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Which of many piece boxes have an element in common with `wanted`: their numbers, rising.

    `starts`, `stops`: shape=[piece, axis], global coordinates. Raises Malformed for another number of axes than
    `wanted` has.
    """
    if starts.shape != stops.shape or starts.ndim != 2 or starts.shape[1] != wanted.ndim:
        raise Malformed(f"piece boxes as arrays of shapes {starts.shape} and {stops.shape}, for box {wanted}")
    hit = np.ones(len(starts), dtype=np.bool_)
    for axis, (low, high) in enumerate(zip(wanted.start, wanted.stop, strict=True)):
        hit &= np.maximum(starts[:, axis], low) < np.minimum(stops[:, axis], high)
    return np.flatnonzero(hit)


@dataclass(frozen=True, slots=True)
class _Frames:
    """One piece and the wanted box, with the strides of the bytes of each."""

    piece: Box
    wanted: Box
    itemsize: int
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    def source(self, part: Box) -> int:
        """The byte of the piece at which `part` starts."""
        return sum(map(mul, map(sub, part.start, self.piece.start), self.source_strides))

    def step(self, part: Box) -> Direct | Scatter:
        extents, source = part.shape, self.source(part)
        target = sum(map(mul, map(sub, part.start, self.wanted.start), self.target_strides))
        for strides in (self.source_strides, self.target_strides):
            if fold(extents, strides, below=len(extents), stride=self.itemsize)[0]:
                return Scatter(part, source, self.source_strides, target, self.target_strides)
        return Direct(part, source, target, part.count * self.itemsize)

    def steps(self, part: Box, start: int, end: int) -> tuple[Direct | Scatter, ...]:
        """What bytes `[start, end)` of the piece hold of `part`."""
        boxes = flat_boxes(self.piece, start // self.itemsize, end // self.itemsize)
        return tuple(self.step(common) for box in boxes if (common := intersect(box, part)) is not None)


def _ranges(frames: _Frames, part: Box, block_nbytes: int) -> Iterator[tuple[int, int, Box | None]]:
    """(first, stop, box): the blocks of the piece that hold any of `part`, as ranges that do not touch.

    `box` is what of `part` they hold, where one span makes the range, else None.
    """
    low = high = 0
    only: Box | None = None
    for start, end, span in _spans(frames, part, block_nbytes):
        first, stop = start // block_nbytes, -(-end // block_nbytes)
        if high and first <= high:
            high, only = stop, None
            continue
        if high:
            yield low, high, only
        low, high, only = first, stop, span
    yield low, high, only


def _spans(frames: _Frames, part: Box, block_nbytes: int) -> Iterator[tuple[int, int, Box]]:
    """(start, end, box): `part` as spans of bytes of the piece, rising, a block or more between any two.

    Gaps inside a span are smaller than a block, so that every block a span touches holds some of it; and there are
    never more spans than blocks, however short the rows are.
    """
    extents, strides = part.shape, frames.source_strides
    axis, count = fold(extents, strides, below=len(extents), stride=frames.itemsize)
    nbytes = count * frames.itemsize
    while axis and (extents[axis - 1] == 1 or strides[axis - 1] - nbytes < block_nbytes):
        axis -= 1
        nbytes += (extents[axis] - 1) * strides[axis]
    for _, span in slices(part, axis):
        start = frames.source(span)
        yield start, start + nbytes, span


def _check(piece: ReadablePiece, itemsize: int) -> None:
    nbytes, row, stride = piece.nbytes, piece.row_nbytes, piece.row_stride
    if nbytes != piece.box.count * itemsize or not 0 < row <= stride or nbytes % row or piece.offset < 0:
        raise Malformed(
            f"stored piece {piece.box} of elements of {itemsize} bytes: offset {piece.offset}, nbytes {nbytes}, "
            f"row_nbytes {row}, row_stride {stride} do not fit together"
        )
