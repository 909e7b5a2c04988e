"""Stored pieces as integer columns: what a fragment map of a million pieces is in memory. [FRAG-10..19]"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add

import numpy as np

from elastickpt.format.arrays import Box
from elastickpt.format.records import OptimizerTable, StoredFile, StoredPiece
from elastickpt.format.strict_reading import IntColumn, UintColumn
from elastickpt.format.values import Value


@dataclass(frozen=True, slots=True, eq=False)
class PieceColumns:
    """Stored pieces, one entry a piece in every column but those named flat.

    `array` indexes `arrays` (keys, sorted) and never falls; `ndims` has one entry an array. `start` and `shape` are
    flat: piece p's axes are `start[axis_start[p]:axis_start[p + 1]]`, in global coordinates. Its checksums are
    `checksums[checksum_start[p]:checksum_start[p + 1]]`. All columns are read-only.
    """

    arrays: tuple[str, ...]
    ndims: IntColumn
    array: IntColumn
    file: IntColumn
    offset: IntColumn
    nbytes: IntColumn
    row_nbytes: IntColumn
    row_stride: IntColumn
    start: IntColumn
    shape: IntColumn
    axis_start: IntColumn
    checksums: UintColumn
    checksum_start: IntColumn

    def __len__(self) -> int:
        return len(self.array)

    def by_array(self) -> dict[str, range]:
        """The pieces of each array, by its key."""
        ends = np.searchsorted(self.array, np.arange(len(self.arrays) + 1)).tolist()
        return {key: range(first, stop) for key, (first, stop) in zip(self.arrays, pairwise(ends), strict=True)}

    def box(self, piece: int) -> Box:
        """A piece's box in global coordinates of its array."""
        axes = slice(int(self.axis_start[piece]), int(self.axis_start[piece + 1]))
        start = tuple(self.start[axes].tolist())
        return Box(start, tuple(low + n for low, n in zip(start, self.shape[axes].tolist(), strict=True)))

    def piece(self, piece: int) -> StoredPiece:
        """One piece as an object of its own."""
        return self.piece_of(piece, self.box(piece))

    def piece_of(self, piece: int, box: Box) -> StoredPiece:
        """The same for who has its box already."""
        blocks = slice(int(self.checksum_start[piece]), int(self.checksum_start[piece + 1]))
        return StoredPiece(
            self.arrays[int(self.array[piece])],
            box,
            int(self.file[piece]),
            int(self.offset[piece]),
            int(self.nbytes[piece]),
            int(self.row_nbytes[piece]),
            int(self.row_stride[piece]),
            tuple(self.checksums[blocks].tolist()),
        )

    def boxes(self) -> list[Box]:
        """The boxes of all pieces."""
        start, shape, ends = self.start.tolist(), self.shape.tolist(), self.axis_start.tolist()
        lows = [tuple(start[first:stop]) for first, stop in pairwise(ends)]
        extents = [shape[first:stop] for first, stop in pairwise(ends)]
        return [Box(low, tuple(map(add, low, extent))) for low, extent in zip(lows, extents, strict=True)]

    def objects(self) -> tuple[StoredPiece, ...]:
        """All pieces as objects: about 4 µs and 600 bytes each."""
        start, shape, checksums = self.start.tolist(), self.shape.tolist(), self.checksums.tolist()
        axes, blocks = self.axis_start.tolist(), self.checksum_start.tolist()
        columns = (self.array, self.file, self.offset, self.nbytes, self.row_nbytes, self.row_stride)
        found = []
        for p, (array, file, offset, nbytes, row, stride) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            low = tuple(start[axes[p] : axes[p + 1]])
            box = Box(low, tuple(map(add, low, shape[axes[p] : axes[p + 1]])))
            own = tuple(checksums[blocks[p] : blocks[p + 1]])
            found.append(StoredPiece(self.arrays[array], box, file, offset, nbytes, row, stride, own))
        return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class FragmentColumns:
    """A fragment map with its pieces in columns; otherwise what `FragmentMap` is. [FRAG-20]"""

    writer: int
    attempt: str
    block_nbytes: int
    files: tuple[StoredFile, ...]
    pieces: PieceColumns
    tables: tuple[OptimizerTable, ...] = ()
    values: Value = None


def starts(counts: IntColumn) -> IntColumn:
    """Where each run of a flat column begins, and its end: (2, 0, 3) -> (0, 2, 2, 5)."""
    found = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=found[1:])
    found.flags.writeable = False
    return found


def distinct(column: IntColumn) -> tuple[IntColumn, IntColumn, IntColumn]:
    """Its values, each once and rising, where each stands first, and of each entry the place among them. `numpy.unique` does
    the same, and takes 15 ms at its first call: it loads masked arrays."""
    order = np.argsort(column, kind="stable")
    rising = column[order]
    begins = np.ones(len(column), dtype=np.bool_)
    begins[1:] = rising[1:] != rising[:-1]
    inverse = np.empty(len(column), dtype=np.int64)
    inverse[order] = np.cumsum(begins) - 1
    return rising[begins], order[begins], inverse


def _ints(values: Iterable[int], count: int) -> IntColumn:
    column = np.fromiter(values, dtype=np.int64, count=count)
    column.flags.writeable = False
    return column


def columns_of(pieces: Sequence[StoredPiece]) -> PieceColumns:
    """The columns of pieces, put in the order of their arrays' keys; pieces of one array keep their order."""
    ordered = sorted(pieces, key=lambda piece: piece.array)
    ndim = {piece.array: piece.box.ndim for piece in ordered}
    place = {key: k for k, key in enumerate(ndim)}
    count = len(ordered)
    ndims = _ints((piece.box.ndim for piece in ordered), count)
    blocks = _ints((len(piece.checksums) for piece in ordered), count)
    axes, sums = int(ndims.sum()), int(blocks.sum())
    checksums = np.fromiter((one for piece in ordered for one in piece.checksums), dtype=np.uint64, count=sums)
    checksums.flags.writeable = False
    return PieceColumns(
        arrays=tuple(ndim),
        ndims=_ints(ndim.values(), len(ndim)),
        array=_ints((place[piece.array] for piece in ordered), count),
        file=_ints((piece.file for piece in ordered), count),
        offset=_ints((piece.offset for piece in ordered), count),
        nbytes=_ints((piece.nbytes for piece in ordered), count),
        row_nbytes=_ints((piece.row_nbytes for piece in ordered), count),
        row_stride=_ints((piece.row_stride for piece in ordered), count),
        start=_ints((low for piece in ordered for low in piece.box.start), axes),
        shape=_ints((n for piece in ordered for n in piece.box.shape), axes),
        axis_start=starts(ndims),
        checksums=checksums,
        checksum_start=starts(blocks),
    )
