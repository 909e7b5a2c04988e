"""Boxes that are put together of whole rows of several pieces: nearly all of a load at another layout. In columns, pure.

           wanted        pieces of any writers
rows  0  +--------+    +--------+  piece 7, rows 0 to 6: its rows 3 to 6 are the first four wanted
      .  |  3..9  |    |  0..6  |
      .  |        |    +--------+
      .  +--------+    |  6..12 |  piece 2 of another writer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastickpt.format.arrays import Box
from elastickpt.format.piece_columns import FragmentColumns, starts
from elastickpt.format.strict_reading import IntColumn
from elastickpt.loading.stretches import Stretches, repeated

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes in global coordinates, one entry each but for `start` and `shape`, which are flat: those of box b are
    `[axis_start[b]:axis_start[b + 1]]`."""

    start: IntColumn
    shape: IntColumn
    axis_start: IntColumn

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> Boxes:
        start = np.array([low for box in boxes for low in box.start], dtype=np.int64)
        stop = np.array([high for box in boxes for high in box.stop], dtype=np.int64)
        return cls(start, stop - start, starts(np.array([box.ndim for box in boxes], dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.axis_start) - 1


class RowParts:
    """What pieces hold of some boxes, map by map; and of which boxes that is not whole rows of pieces that lie in a row."""

    def __init__(self, boxes: Boxes) -> None:
        self._boxes = boxes
        self._parts: list[tuple[Stretches, IntColumn, IntColumn]] = []  # with the rows of the box that each part is
        self.odd = np.array(np.diff(boxes.axis_start) == 0, dtype=np.bool_)

    def add(self, number: int, columns: FragmentColumns, pieces: IntColumn, of: IntColumn) -> None:
        """Pieces of map `number`, each beside the box that it may hold some of. All pieces have their box's number of axes."""
        known, boxes = columns.pieces, self._boxes
        of, pieces = of[~self.odd[of]], pieces[~self.odd[of]]
        head, own = known.axis_start[pieces], boxes.axis_start[of]
        which, inside = repeated(known.axis_start[pieces + 1] - head)
        axes, others = head[which] + inside, own[which] + inside
        differs = (known.start[axes] != boxes.start[others]) | (known.shape[axes] != boxes.shape[others])
        cut = np.zeros(len(pieces), dtype=np.bool_)
        cut[which[differs & (inside > 0)]] = True
        first, rows, wanted = known.start[head], known.shape[head], boxes.start[own]
        low, high = np.maximum(first, wanted), np.minimum(first + rows, wanted + boxes.shape[own])
        meets, row, nbytes = high > low, known.row_nbytes[pieces], known.nbytes[pieces]
        odd = meets & (cut | ((row != nbytes) & (row != known.row_stride[pieces])))
        self.odd[of[odd]] = True
        good = np.flatnonzero(meets & ~odd)
        low, high, first, wanted = (column[good] for column in (low, high, first, wanted))
        each, block = nbytes[good] // rows[good], columns.block_nbytes
        begin, end = (low - first) * each, (high - first) * each
        blocks = begin // block * block, np.minimum(-(-end // block) * block, nbytes[good])
        zeros = np.zeros(len(good), dtype=np.int64)
        found = Stretches(zeros + number, pieces[good], *blocks, begin, end, of[good], (low - wanted) * each)
        self._parts.append((found, low, high))

    def proven(self) -> tuple[Stretches, Flags]:
        """The parts of those boxes of which every row is held exactly once, their targets being numbers of boxes; and which
        boxes these are. [FRAG-30, FRAG-31]"""
        parts = Stretches.together([part for part, _, _ in self._parts])
        low, high = (np.concatenate([np.zeros(0, dtype=np.int64), *rows]) for rows in zip(*self._bounds(), strict=True))
        order = np.lexsort((low, parts.target))
        parts, low, high = parts.take(order), low[order], high[order]
        begins = np.ones(len(parts), dtype=np.bool_)
        begins[1:] = parts.target[1:] != parts.target[:-1]
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(parts)) - 1 if len(first) else first
        wrong = self.odd.copy()
        wrong[parts.target[1:][~begins[1:] & (low[1:] != high[:-1])]] = True
        own = parts.target[first]
        head = self._boxes.axis_start[own]
        whole = (low[first] == self._boxes.start[head]) & (high[last] == self._boxes.start[head] + self._boxes.shape[head])
        wrong[own[~whole]] = True
        missing = np.ones(len(wrong), dtype=np.bool_)
        missing[own] = False
        held = ~(wrong | missing)
        return parts.take(np.flatnonzero(held[parts.target])), held

    def _bounds(self) -> list[tuple[IntColumn, IntColumn]]:
        none = np.zeros(0, dtype=np.int64)
        return [(none, none), *((low, high) for _, low, high in self._parts)]
