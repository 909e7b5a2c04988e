"""Where what is read belongs: boxes of arrays, most of them in columns.

10,000 small tensors are 10,000 addresses: a view of each costs as much as to read it.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import Malformed
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import Box
from elastickpt.format.memory_views import Memory, address_of, bytes_at
from elastickpt.format.piece_columns import distinct
from elastickpt.format.records import ArrayRecord
from elastickpt.format.strict_reading import IntColumn
from elastickpt.storage.store import Caching

Bytes = NDArray[np.uint8]
AnyArray = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A box of one array, in global coordinates, and the elements to fill: words of the element size, any strides.

    `cache`: "spare" where nobody else on this host is known to want these bytes.
    """

    record: ArrayRecord
    box: Box
    into: AnyArray
    cache: Caching = "fill"


@dataclass(frozen=True, slots=True, eq=False)
class WantedColumns:
    """Boxes of arrays to fill, each in host memory without gaps, in C order: the `places` of their arrays in the index, which
    of `boxes` each is, and the address of its first byte. `owner` keeps that memory. `cache` as of `Wanted`. A box stands among
    `boxes` once for each shape of an array that it is one of."""

    places: IntColumn
    boxes: Sequence[Box]
    box: IntColumn
    address: IntColumn
    owner: object
    cache: Caching = "fill"


@dataclass(frozen=True, slots=True, eq=False)
class ReadTarget:
    """The wanted box as bytes in its own C order: the destination's own memory, or a buffer that is copied at the end."""

    wanted: Wanted
    data: Bytes


class Targets(Sequence[ReadTarget]):
    """All that a plan fills, by number: `alone`, and behind them what is wanted in columns, which are objects for who asks.

    `place` (in the index), `box` (a number among `boxes`) and `nbytes` are columns of all of them, `address` of these only.
    """

    def __init__(self, arrays: ArrayColumns, alone: Sequence[Wanted], columns: Sequence[WantedColumns]) -> None:
        self.alone = tuple(map(_target, alone))
        self._arrays, self._columns = arrays, tuple(columns)
        self._ends = list(accumulate((len(one.places) for one in columns), initial=len(alone)))[1:]
        self.boxes = (*(one.box for one in alone), *(box for one in columns for box in one.boxes))
        before = accumulate((len(one.boxes) for one in columns), initial=len(alone))
        none = np.zeros(0, dtype=np.int64)
        keys = [one.record.key for one in alone]
        self.place = np.concatenate([arrays.places_of(keys) if keys else none, *(one.places for one in columns)])
        own = (one.box + first for one, first in zip(columns, before, strict=False))
        self.box = np.concatenate([np.arange(len(alone)), *own])
        self.address = np.concatenate([none, *(one.address for one in columns)])
        counts = np.array([box.count for box in self.boxes], dtype=np.int64)
        self.nbytes = arrays.itemsize[self.place] * counts[self.box] if len(self.place) else none

    def __len__(self) -> int:
        return len(self.alone) + len(self.place)

    def __iter__(self) -> Iterator[ReadTarget]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, number: int) -> ReadTarget: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[ReadTarget]: ...

    def __getitem__(self, number: int | slice) -> ReadTarget | Sequence[ReadTarget]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        if number < len(self.alone):
            return self.alone[number]
        record, box, data = self.record_of(number), self.boxes[int(self.box[number])], self.data_of(number)
        into = data.view(_WORDS[record.spec.type.itemsize]).reshape(box.shape)
        return ReadTarget(Wanted(record, box, into, self._with(number).cache), data)

    @property
    def wanted_nbytes(self) -> int:
        return int(self.nbytes.sum())

    @property
    def addresses(self) -> IntColumn:
        """Where the bytes of each target begin; valid while it lives."""
        alone = np.array([address_of(target.data.data) for target in self.alone], dtype=np.int64)
        return np.concatenate([alone, self.address])

    @property
    def spared(self) -> NDArray[np.bool_]:
        """Of each target, whether nobody else on this host is known to want its bytes."""
        alone = np.array([target.wanted.cache == "spare" for target in self.alone], dtype=np.bool_)
        return np.concatenate([alone, *(np.full(len(one.places), one.cache == "spare") for one in self._columns)])

    def record_of(self, number: int) -> ArrayRecord:
        """The array of a target."""
        if number < len(self.alone):
            return self.alone[number].wanted.record
        return self._arrays.record(int(self.place[number]))

    def data_of(self, number: int) -> Bytes:
        """The bytes of a target."""
        if number < len(self.alone):
            return self.alone[number].data
        address = int(self.address[number - len(self.alone)])
        return bytes_at(address, int(self.nbytes[number]), self._with(number).owner)

    def _with(self, number: int) -> WantedColumns:
        return self._columns[bisect_right(self._ends, number)]


_WORDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}  # of an element size


def _target(wanted: Wanted) -> ReadTarget:
    into = wanted.into
    if into.shape != wanted.box.shape:
        raise Malformed(f"array {wanted.record.spec.id}: a destination of shape {into.shape} for box {wanted.box}")
    if into.flags.c_contiguous:
        return ReadTarget(wanted, into.reshape(-1).view(np.uint8))
    return ReadTarget(wanted, np.empty(into.size * into.dtype.itemsize, dtype=np.uint8))


# -- parts of rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """`width` bytes of every `row`, which lie `step` bytes apart where they belong."""

    row: int
    width: int
    step: int


def copy_rows(source: memoryview, low: int, high: int, target: Bytes, at: int, rows: Rows) -> None:
    """Copies what stands of rows in `source`: the first begins at its byte `low` and belongs at byte `at` of `target`, the last
    one ends at `high`. Rows may have begun before the source, and may end behind it."""
    row, width, step, end = rows.row, rows.width, rows.step, min(high, source.nbytes)
    skipped = -(low // row) if low < 0 else 0  # rows that begin before it
    if skipped and (inside := row - (low + skipped * row)) < width:
        nbytes = min(width - inside, end)
        target[at + (skipped - 1) * step + inside :][:nbytes] = np.frombuffer(source, np.uint8, nbytes)
    low, at = low + skipped * row, at + skipped * step
    whole = (end - low - width) // row + 1  # that also end here
    if whole > 0:
        element = f"V{width}"
        into: NDArray[Any] = np.ndarray((whole,), element, target.data, at, (step,))
        into[...] = np.ndarray((whole,), element, source, low, (row,))
        low, at = low + whole * row, at + whole * step
    if low < end:
        target[at : at + end - low] = np.frombuffer(source, np.uint8, end - low, low)


# -- many small copies -------------------------------------------------------------------------------------------------

_MOST = 1 << 62  # bytes that an array of numpy may seem to have
FEW = 4  # copies of one length: no dearer one by one


def scatter(source: memoryview, low: IntColumn, nbytes: IntColumn, address: IntColumn) -> None:
    """Copies `nbytes[k]` bytes from byte `low[k]` of `source` to `address[k]`, for each k; the memory there must be alive.

    Copies of one length are one call each: as elements of arrays that begin at the lowest address and at the start of `source`.
    A call for each costs 0.7 µs, and this 0.25.
    """
    begin = address_of(source)
    for length in distinct(nbytes)[0].tolist():
        mine = nbytes == length
        targets, sources = address[mine], low[mine]
        base = int(targets.min())
        step = int(np.gcd.reduce(targets - base)) or length
        count = (int(targets.max()) - base) // step + 1
        if len(targets) < FEW or count > _MOST // length:
            for start, at in zip(sources.tolist(), targets.tolist(), strict=True):
                ctypes.memmove(at, begin + start, length)
            continue
        every = int(np.gcd.reduce(sources)) or length
        elements: NDArray[Any] = np.ndarray(((source.nbytes - length) // every + 1,), f"V{length}", source, 0, (every,))
        every_target = np.asarray(Memory(base, (count,), f"|V{length}", (step,), owner=None))  # most of them are never touched
        every_target[(targets - base) // step] = elements[sources // every]
