"""Boxes that are put together of several pieces: nearly all of a load at another layout. In columns, pure.

           wanted        pieces of any writers
rows  0  +--------+    +--------+  piece 7, rows 0 to 6: its rows 3 to 6 are the first four wanted
      .  |  3..9  |    |  0..6  |
      .  |        |    +--------+
      .  +--------+    |  6..12 |  piece 2 of another writer
                       +--------+
Where axis k is cut beside the first one, a piece and a box are rows, one for each index on the axes before k, of which parts
belong to each other. The axes between the first and k must be whole in both, so that rows follow each other evenly.
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
Axes = npt.NDArray[np.int64]  # one row an entry, one column an axis

MANY = 32  # parts of one box: two of which may only be told apart along one axis


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes in global coordinates, one row each; behind their own axes they have others of one element."""

    start: Axes
    shape: Axes
    ndims: IntColumn

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> Boxes:
        ndims = np.array([box.ndim for box in boxes], dtype=np.int64)
        low = np.array([low for box in boxes for low in box.start], dtype=np.int64)
        high = np.array([high for box in boxes for high in box.stop], dtype=np.int64)
        return cls.of_axes(low, high - low, ndims, np.arange(len(boxes)), starts(ndims)[:-1], int(ndims.max(initial=1)))

    @classmethod
    def of_axes(cls, start: IntColumn, shape: IntColumn, ndims: IntColumn, of: IntColumn, head: IntColumn, most: int) -> Boxes:
        """From flat columns, in which the axes of box `of[k]` begin at `head[of[k]]`, with room for `most` axes."""
        own = ndims[of]
        found = cls(np.zeros((len(of), most), dtype=np.int64), np.ones((len(of), most), dtype=np.int64), own)
        entry, axis = repeated(own)
        flat = head[of][entry] + axis
        found.start[entry, axis], found.shape[entry, axis] = start[flat], shape[flat]
        return found

    def __len__(self) -> int:
        return len(self.ndims)

    @property
    def stop(self) -> Axes:
        return self.start + self.shape

    @property
    def count(self) -> IntColumn:
        """Elements of each."""
        count: IntColumn = self.shape.prod(axis=1)
        return count

    def take(self, places: IntColumn) -> Boxes:
        return Boxes(self.start[places], self.shape[places], self.ndims[places])


class BoxParts:
    """What pieces hold of some boxes, map by map; and of which boxes that is not in rows of pieces that lie in a row."""

    def __init__(self, boxes: Boxes) -> None:
        self._boxes = boxes
        self._parts: list[tuple[Stretches, Axes, Axes]] = []  # with the part of the box that each is, from and to
        self.odd: Flags = boxes.ndims == 0

    def add(self, number: int, columns: FragmentColumns, pieces: IntColumn, of: IntColumn) -> None:
        """Pieces of map `number`, each beside the box that it may hold some of. All pieces have their box's number of axes."""
        known = columns.pieces
        of, pieces = of[~self.odd[of]], pieces[~self.odd[of]]
        boxes = self._boxes.take(of)
        ndims = np.diff(known.axis_start)
        held = Boxes.of_axes(known.start, known.shape, ndims, pieces, known.axis_start[:-1], self._boxes.shape.shape[1])
        low, high = np.maximum(held.start, boxes.start), np.minimum(held.stop, boxes.stop)
        meets = np.flatnonzero((high > low).all(axis=1))
        if len(meets) < len(of):
            of, pieces, low, high = of[meets], pieces[meets], low[meets], high[meets]
            held, boxes = held.take(meets), boxes.take(meets)
        row, nbytes, block = known.row_nbytes[pieces], known.nbytes[pieces], columns.block_nbytes
        laid = _Laid.of(held, boxes, low, high, nbytes)
        odd = ~laid.even | ((row != nbytes) & (row != known.row_stride[pieces]))
        odd |= (laid.row > 0) & (laid.row - laid.width >= block)  # blocks of which nothing is wanted, which are not to be read
        self.odd[of[odd]] = True
        blocks = laid.low // block * block, np.minimum(-(-laid.high // block) * block, nbytes)
        own = (np.zeros(len(of), dtype=np.int64) + number, pieces, *blocks, laid.low, laid.high, of, laid.at)
        self._parts.append((Stretches(*own, laid.row, laid.width, laid.step), low, high))

    def proven(self) -> tuple[Stretches, Flags]:
        """The parts of those boxes of which every element is held exactly once, their targets being numbers of boxes; and which
        boxes these are. [FRAG-30, FRAG-31]"""
        parts = Stretches.together([part for part, _, _ in self._parts])
        none = np.zeros((0, self._boxes.shape.shape[1]), dtype=np.int64)
        low, high = (
            np.concatenate([none, *rows]) for rows in zip((none, none), *(part[1:] for part in self._parts), strict=True)
        )
        held = ~(self.odd | _overlap(self._boxes, parts.target, low, high))
        count = np.zeros(len(self._boxes), dtype=np.int64)
        np.add.at(count, parts.target, (high - low).prod(axis=1))
        held &= count == self._boxes.count
        mine = np.flatnonzero(held[parts.target])
        return parts.take(mine[np.lexsort((*low[mine].T[::-1], parts.target[mine]))]), held


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """Where parts lie in their pieces and in their boxes, in bytes: as in `Stretches`. `even`: all is of this form."""

    low: IntColumn
    high: IntColumn
    at: IntColumn
    row: IntColumn
    width: IntColumn
    step: IntColumn
    even: Flags

    @classmethod
    def of(cls, held: Boxes, boxes: Boxes, low: Axes, high: Axes, nbytes: IntColumn) -> _Laid:
        """Parts [low, high) of pieces, which have so many bytes, and of boxes."""
        axes, entry = np.arange(held.shape.shape[1]), np.arange(len(held))
        whole = (held.start == boxes.start) & (held.shape == boxes.shape)
        cut = np.where(whole, 0, axes).max(axis=1)  # the last axis that is cut, or the first
        if not cut.any():  # whole rows, the usual case
            each, none = nbytes // held.shape[:, 0], np.zeros(len(held), dtype=np.int64)
            first, at, last = (
                (one - two)[:, 0] * each for one, two in ((low, held.start), (low, boxes.start), (high, held.start))
            )
            return cls(first, last, at, none, none, none, none == 0)
        between = (axes > 0) & (axes < cut[:, None])
        even: Flags = (whole | ~between).all(axis=1)
        element = nbytes // held.count
        width = np.where(axes > cut[:, None], held.shape, 1).prod(axis=1) * element  # of a step along the axis
        rows_each = np.where(between, held.shape, 1).prod(axis=1)  # for a step along the first axis
        along = cut > 0
        wide = (high[entry, cut] - low[entry, cut]) * width
        row, step = held.shape[entry, cut] * width, boxes.shape[entry, cut] * width
        inside, there = (low[entry, cut] - held.start[entry, cut]) * width, (low[entry, cut] - boxes.start[entry, cut]) * width
        first, at = (low[:, 0] - held.start[:, 0]) * rows_each, (low[:, 0] - boxes.start[:, 0]) * rows_each
        rows = np.where(along, (high[:, 0] - low[:, 0]) * rows_each, 1)
        begin = np.where(along, first * row + inside, inside)
        target = np.where(along, at * step + there, there)
        strided = rows > 1
        row, step = np.where(strided, row, 0), np.where(strided, step, 0)
        return cls(begin, begin + (rows - 1) * row + wide, target, row, np.where(strided, wide, 0), step, even)


def _overlap(boxes: Boxes, of: IntColumn, low: Axes, high: Axes) -> Flags:
    """Of which boxes two parts may have an element in common. Parts along one axis alone are looked at in order."""
    cut = (low != boxes.start[of]) | (high != boxes.stop[of])
    every = np.stack([np.bincount(of[one], minlength=len(boxes)) for one in cut.T], axis=1) > 0
    axis = np.argmax(every, axis=1)[of]
    order = np.lexsort((low[np.arange(len(of)), axis], of))
    mine, along = of[order], axis[order]
    entry = np.arange(len(of))
    begin, end = low[order][entry, along], high[order][entry, along]
    found = np.zeros(len(boxes), dtype=np.bool_)
    found[mine[1:][(mine[1:] == mine[:-1]) & (begin[1:] < end[:-1])]] = True
    several = every.sum(axis=1) > 1
    found[several] = False
    counts = np.bincount(of, minlength=len(boxes))
    found[several & (counts > MANY)] = True
    few = several & (counts <= MANY)
    among, first = order[few[mine]], starts(np.where(few, counts, 0))[of]  # parts of those, and where a box's begin there
    one, inside = repeated(counts[of[among]])
    other = first[among[one]] + inside
    one, other = among[one[one < other]], among[other[one < other]]
    common = (np.maximum(low[one], low[other]) < np.minimum(high[one], high[other])).all(axis=1)
    found[of[one[common]]] = True
    return found
