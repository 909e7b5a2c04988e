"""What lies in a row in a file and belongs in a row in memory, in columns: nearly all of a load. Pure.

stored pieces --> stretches of whole blocks --> sorted by file and offset, cut to units --> runs, each read at once

A load of 10,000 small tensors has as many stretches, and an object for each costs more than to read it. Stretches that lie
close together in their file are read at once, whatever array they are of: a read costs 0.1 ms apart from its bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from elastickpt.format.piece_columns import FragmentColumns, distinct, starts
from elastickpt.format.records import StoredFile
from elastickpt.format.strict_reading import IntColumn, UintColumn

_IN_A_ROW = 8  # columns
GAP_NBYTES = 4096  # between two stretches that are read at once: the most that slots of a pack leave free


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Whole blocks of pieces, one entry each: bytes [start, end) of a piece, of which [low, high) belong at `at` of a target.

    `map` is a number among the fragment maps of the plan, `piece` one in that map, `target` one among the plan's. Where `row`
    is not 0, parts of rows are wanted: from `low` on the first `width` of every `row` bytes, which lie `step` bytes apart in
    the target; `low`, `high` and `at` are then those of the whole, though [start, end) may be a part of it.
    """

    map: IntColumn
    piece: IntColumn
    start: IntColumn
    end: IntColumn
    low: IntColumn
    high: IntColumn
    target: IntColumn
    at: IntColumn
    row: IntColumn
    width: IntColumn
    step: IntColumn

    def __len__(self) -> int:
        return len(self.map)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int, int, int, int, int]]) -> Stretches:
        """Those that lie in a row, without the last three."""
        return cls.in_a_row(*np.array(rows, dtype=np.int64).reshape(len(rows), _IN_A_ROW).T)

    @classmethod
    def in_a_row(cls, *columns: IntColumn) -> Stretches:
        """The same, column by column."""
        none = np.zeros(len(columns[0]), dtype=np.int64)
        return cls(*(*columns, none, none, none))

    @property
    def columns(self) -> tuple[IntColumn, ...]:
        own = (self.map, self.piece, self.start, self.end, self.low, self.high, self.target, self.at)
        return *own, self.row, self.width, self.step

    @classmethod
    def together(cls, several: Sequence[Stretches]) -> Stretches:
        columns = zip(*(one.columns for one in several), strict=True)
        return cls(*map(np.concatenate, columns)) if several else cls.of(())

    def of_targets(self, targets: IntColumn) -> Stretches:
        """The same for these targets."""
        return replace(self, target=targets)

    def take(self, places: IntColumn) -> Stretches:
        return Stretches(*(column[places] for column in self.columns))


@dataclass(frozen=True, slots=True, eq=False)
class ReadRuns:
    """Stretches in the order of files and offsets, none longer than a unit, and which of them are read at once.

    Run r reads `nbytes[r]` at `offset[r]` of file `file[r]`; it holds stretches `first[r]` to `first[r + 1]`. The blocks of
    stretch s have the checksums from `checksum_start[s]` to the next one's.
    """

    stretches: Stretches
    offsets: IntColumn  # of each stretch in its file
    block: IntColumn  # bytes of a block of each stretch
    checksums: UintColumn
    checksum_start: IntColumn
    file: IntColumn
    offset: IntColumn
    nbytes: IntColumn
    first: IntColumn

    def __len__(self) -> int:
        return len(self.file)

    @property
    def nbytes_of(self) -> IntColumn:
        """Of each stretch."""
        return self.stretches.end - self.stretches.start


def number_files(maps: Sequence[FragmentColumns], stretches: Stretches) -> tuple[tuple[StoredFile, ...], IntColumn]:
    """The files that stretches lie in, by path, and the number of each stretch's among them."""
    known: dict[StoredFile, int] = {}
    numbers = np.zeros(len(stretches), dtype=np.int64)
    for columns, mine in _by_map(maps, stretches.map):
        used, _, inverse = distinct(columns.pieces.file[stretches.piece[mine]])
        own = [known.setdefault(columns.files[place], len(known)) for place in used.tolist()]
        numbers[mine] = np.array(own, dtype=np.int64)[inverse]
    ordered = sorted(known, key=lambda file: (file.path, file.base, file.nbytes))
    place = np.zeros(len(ordered), dtype=np.int64)
    for new, file in enumerate(ordered):
        place[known[file]] = new
    return tuple(ordered), place[numbers]


def _by_map(maps: Sequence[FragmentColumns], of: IntColumn) -> Iterator[tuple[FragmentColumns, IntColumn]]:
    """Each map that some entries of a column name, with their places."""
    order = np.argsort(of, kind="stable")
    bounds = np.searchsorted(of[order], np.arange(len(maps) + 1)).tolist()
    for columns, (first, stop) in zip(maps, pairwise(bounds), strict=True):
        if first < stop:
            yield columns, order[first:stop]


def runs_of(
    maps: Sequence[FragmentColumns], stretches: Stretches, files: IntColumn, *, unit_nbytes: int, long_nbytes: int = 0
) -> ReadRuns:
    """How stretches are read: cut to `unit_nbytes` or one block, in the order of files, close ones together up to that. Those
    of which all is wanted are cut to `long_nbytes`, where that is more: whoever reads them takes a unit after the other."""
    offset = np.zeros(len(stretches), dtype=np.int64)
    block = np.array([columns.block_nbytes for columns in maps], dtype=np.int64)[stretches.map]
    for columns, mine in _by_map(maps, stretches.map):
        offset[mine] = columns.pieces.offset[stretches.piece[mine]]
    offset += stretches.start
    wanted = (stretches.row == 0) & (stretches.low == stretches.start) & (stretches.high == stretches.end)
    step = np.maximum(np.where(wanted, max(long_nbytes, unit_nbytes), unit_nbytes) // block, 1) * block
    whole, inside = repeated(-(-(stretches.end - stretches.start) // step))
    cut = stretches.take(whole)
    start = cut.start + inside * step[whole]
    end = np.minimum(start + step[whole], cut.end)
    own = cut.row > 0
    low, high = np.where(own, cut.low, np.maximum(cut.low, start)), np.where(own, cut.high, np.minimum(cut.high, end))
    cut = replace(cut, start=start, end=end, low=low, high=high, at=cut.at + low - cut.low)
    offset, file = offset[whole] + inside * step[whole], files[whole]
    order = np.lexsort((offset, file))
    cut, offset, file, block = cut.take(order), offset[order], file[order], block[whole][order]
    checksums, checksum_start = _checksums(maps, cut, block)
    first = _joined(file, offset, cut.end - cut.start, unit_nbytes)
    last = np.append(first[1:], len(cut)).astype(np.int64) - 1
    ends = offset + (cut.end - cut.start)
    return ReadRuns(
        cut,
        offset,
        block,
        checksums,
        checksum_start,
        file[first],
        offset[first],
        ends[last] - offset[first] if len(first) else offset[:0],
        np.append(first, len(cut)),
    )


def repeated(counts: IntColumn) -> tuple[IntColumn, IntColumn]:
    """(2, 1, 3) -> (0, 0, 1, 2, 2, 2) and (0, 1, 0, 0, 1, 2)."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - starts(counts)[which]


def _checksums(maps: Sequence[FragmentColumns], cut: Stretches, block: IntColumn) -> tuple[UintColumn, IntColumn]:
    counts = -(-(cut.end - cut.start) // block)
    begin = starts(counts)
    which, inside = repeated(counts)
    place = cut.start[which] // block[which] + inside
    found = np.zeros(len(which), dtype=np.uint64)
    for columns, mine in _by_map(maps, cut.map[which]):
        found[mine] = columns.pieces.checksums[columns.pieces.checksum_start[cut.piece[which[mine]]] + place[mine]]
    return found, begin


def _joined(file: IntColumn, offset: IntColumn, nbytes: IntColumn, most: int) -> IntColumn:
    """Which stretches begin a run."""
    ends = offset + nbytes
    apart = np.ones(len(file), dtype=np.bool_)
    apart[1:] = (file[1:] != file[:-1]) | (offset[1:] < ends[:-1]) | (offset[1:] > ends[:-1] + GAP_NBYTES)
    first: list[int] = []
    low, high = offset.tolist(), ends.tolist()
    for begin, stop in pairwise((*np.flatnonzero(apart).tolist(), len(file))):
        while begin < stop:
            first.append(begin)
            begin = bisect_right(high, low[begin] + most, begin + 1, stop)
    return np.array(first, dtype=np.int64)


def whole_pieces(
    columns: FragmentColumns, pieces: IntColumn, start: IntColumn, shape: IntColumn, nbytes: IntColumn
) -> IntColumn:
    """Which of these pieces are boxes of so many bytes, and lie in one row.

    `start` and `shape` are flat, in global coordinates: as many axes of each box as its piece has.
    """
    known = columns.pieces
    which, inside = repeated(known.axis_start[pieces + 1] - known.axis_start[pieces])
    axes = known.axis_start[pieces][which] + inside
    fits = known.nbytes[pieces] == nbytes
    row = known.row_nbytes[pieces]
    fits &= (row == known.nbytes[pieces]) | (row == known.row_stride[pieces])
    fits[which[(known.start[axes] != start) | (known.shape[axes] != shape)]] = False
    return np.flatnonzero(fits)
