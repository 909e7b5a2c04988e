"""Reads what lies in a row on both sides: runs of stretches, verified, and put where they belong. [FRAG-32, FRAG-33]

A load from memory is thousands of such reads, each of which takes some 60 µs without any Python: so all that can be known
before the first one stands in columns, and a step of Python for each read, stretch or block must have a reason.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import ChecksumMismatch
from elastickpt.format.digest import block_checksum, block_checksums, whole_checksums
from elastickpt.format.memory_views import address_of, view_at
from elastickpt.format.records import ArrayRecord
from elastickpt.loading.plan import FetchPlan
from elastickpt.loading.stretches import ReadRuns, repeated
from elastickpt.loading.targets import Rows, copy_rows, scatter
from elastickpt.loading.units import Scratch, Verify, mismatch
from elastickpt.storage.store import Lending

GIVEN_AWAY_NBYTES = 64 << 10  # a copy of so much lets other threads of Python run meanwhile
_MANY = 16  # small copies: numpy's way to make many costs 20 µs, and 100 where large copies have emptied the core's cache
_FILLED_NBYTES = 16 << 10  # the mean of stretches that are read straight to where they belong: each takes 1 µs more so

_copy, _copy_quickly = ctypes.memmove, ctypes.PyDLL(None).memmove  # the second keeps the interpreter's lock
_copy_quickly.argtypes, _copy_quickly.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None


class RunReader:
    """Reads the runs of a plan, from several threads. `nbytes` and `offset` are those of each run in its file."""

    def __init__(self, plan: FetchPlan, runs: ReadRuns, verify: Verify, scratch: Scratch, *, unit_nbytes: int) -> None:
        self._plan, self._runs, self._verify, self._scratch, self._unit_nbytes = plan, runs, verify, scratch, unit_nbytes
        self._columns = _Columns.of(runs, plan.targets.addresses, len(plan.targets.alone))
        self.offset: list[int] = runs.offset.tolist()
        self.nbytes: list[int] = runs.nbytes.tolist()

    def record_of(self, run: int) -> ArrayRecord:
        """The first array that a run holds anything of."""
        return self._plan.targets.record_of(self._columns.target[self._columns.first[run]])

    def read(self, run: int, lending: Lending) -> None:
        """Blocking. Raises ChecksumMismatch, and as `lending` does."""
        columns, offset, nbytes = self._columns, self.offset[run], self.nbytes[run]
        if columns.straight[run]:
            return self._straight(run, lending)
        if columns.filled[run] and self._fill(run, lending):
            return None
        self.deliver(run, lending.lend(offset, self._scratch.take(nbytes).data))
        return None

    def deliver(self, run: int, lent: memoryview) -> None:
        """Verifies the bytes of a run, and puts them where they belong. Raises ChecksumMismatch."""
        columns = self._columns
        self._verify_all(run, lent)
        if columns.small[run]:
            own = slice(columns.first[run], columns.first[run + 1])
            scatter(lent, self._runs.offsets[own] - self.offset[run], self._runs.nbytes_of[own], columns.addresses[own])
        else:
            self._hand_out(run, lent)

    def _straight(self, run: int, lending: Lending) -> None:
        """Reads what belongs in a row as it lies, some blocks at a call: they are hashed while still in the core's cache."""
        columns, offset, nbytes = self._columns, self.offset[run], self.nbytes[run]
        first = columns.first[run]
        address, block = columns.address[first], columns.block[first]
        into, together = view_at(address, nbytes), max(self._unit_nbytes // block, 1)
        if nbytes <= together * block or columns.first[run + 1] > first + 1:
            if (lent := lending.lend(offset, into)) is not into:
                _copy(address, address_of(lent), nbytes)
            return self._verify_all(run, lent)
        blocks = [into[low : low + block] for low in range(0, nbytes, block)]
        groups = [blocks[one : one + together] for one in range(0, len(blocks), together)]
        if self._verify == "off":
            lending.fill_each(offset, groups, len)
        else:
            self._require(run, lending.fill_each(offset, groups, block_checksum))
        return None

    def _fill(self, run: int, lending: Lending) -> bool:
        """Reads stretches to where they belong, and what lies between them nowhere; False where that would be no less work."""
        columns, end = self._columns, 0
        parts: list[memoryview] = []
        own: list[tuple[memoryview, int]] = []
        for stretch in range(columns.first[run], columns.first[run + 1]):
            if columns.inside[stretch] > end:
                parts.append(self._scratch.take(columns.inside[stretch] - end).data)
            part = view_at(columns.address[stretch], columns.nbytes[stretch])
            parts.append(part)
            own.append((part, columns.block[stretch]))
            end = columns.inside[stretch] + columns.nbytes[stretch]
        if not lending.fill(self.offset[run], parts):
            return False
        if self._verify == "on":
            self._require(run, [found for part, block in own for found in whole_checksums(part, block)])
        return True

    def _hand_out(self, run: int, lent: memoryview) -> None:
        """Copies what is wanted of stretches that were read at once to where it belongs."""
        columns, begin = self._columns, address_of(lent)
        for stretch in range(columns.first[run], columns.first[run + 1]):
            low, wanted, skipped = columns.inside[stretch], columns.wanted[stretch], columns.skipped[stretch]
            if (rows := columns.rows[stretch]) is not None:
                own, target = lent[low : low + columns.nbytes[stretch]], self._plan.targets.data_of(columns.target[stretch])
                copy_rows(own, skipped, skipped + wanted, target, columns.at[stretch], rows)
            else:
                copy = _copy_quickly if wanted < GIVEN_AWAY_NBYTES else _copy
                copy(columns.address[stretch], begin + low + skipped, wanted)

    # -- checksums -----------------------------------------------------------------------------------------------------

    def _verify_all(self, run: int, lent: memoryview) -> None:
        """Raises ChecksumMismatch unless these bytes are a whole run as it was stored. [FRAG-32]"""
        if self._verify == "off":
            return
        columns, first = self._columns, self._columns.first[run]
        if columns.first[run + 1] == first + 1:
            self._require(run, whole_checksums(lent, columns.block[first]))
        else:
            own = slice(columns.checksum_start[first], columns.checksum_start[columns.first[run + 1]])
            self._require(run, block_checksums(lent, zip(columns.block_begin[own], columns.block_end[own], strict=True)))

    def _require(self, run: int, found: list[int]) -> None:
        """Raises ChecksumMismatch unless these are the checksums of all blocks of a run. [FRAG-32]"""
        columns = self._columns
        first, stop = (columns.checksum_start[columns.first[one]] for one in (run, run + 1))
        if found != (stored := columns.checksums[first:stop]):
            wrong = next(number for number, two in enumerate(zip(found, stored, strict=True)) if two[0] != two[1])
            raise self._mismatch(first + wrong, found[wrong])

    def _mismatch(self, number: int, found: int) -> ChecksumMismatch:
        """Of a block, by its number among all."""
        columns, cut = self._columns, self._runs.stretches
        stretch = bisect_right(columns.checksum_start, number) - 1
        pieces = self._plan.maps[int(cut.map[stretch])]
        piece = pieces.pieces.piece_of(own := int(cut.piece[stretch]), pieces.pieces.box(own))
        at = int(cut.start[stretch]) + (number - columns.checksum_start[stretch]) * columns.block[stretch]
        record = self._plan.targets.record_of(columns.target[stretch])
        return mismatch(pieces.files[piece.file], piece, record, at // pieces.block_nbytes, at, found)


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of runs as lists, which threads go through one by one; `addresses` once more as numpy takes them."""

    addresses: NDArray[np.int64]  # as `address`
    rows: list[Rows | None]  # of each stretch of which parts of rows are wanted
    target: list[int]
    at: list[int]
    nbytes: list[int]
    skipped: list[int]
    wanted: list[int]
    block: list[int]
    inside: list[int]  # where each stretch begins in its run
    block_begin: list[int]  # of each block, in its run
    block_end: list[int]
    address: list[int]  # where what is wanted of it belongs
    checksums: list[int]
    checksum_start: list[int]  # of each stretch, and the end of the last one's
    first: list[int]
    straight: list[bool]  # of each run: all of it belongs in a row to one target, as it lies
    small: list[bool]  # of each run: nothing but many small pieces, each of one block and a target in columns
    filled: list[bool]  # of each run: each of its stretches belongs in a row as it lies, and most are not small

    @classmethod
    def of(cls, runs: ReadRuns, addresses: NDArray[np.int64], alone: int) -> _Columns:
        cut, nbytes, counts = runs.stretches, runs.nbytes_of, np.diff(runs.first)
        wanted, address = cut.high - cut.low, addresses[cut.target] + cut.at
        inside = runs.offsets - np.repeat(runs.offset, counts)
        checksum_start = np.append(runs.checksum_start, len(runs.checksums))
        which, number = repeated(np.diff(checksum_start))
        block_begin = inside[which] + number * runs.block[which]
        block_end = np.minimum(block_begin + runs.block[which], (inside + nbytes)[which])
        whole = (wanted == nbytes) & (cut.row == 0)
        small = (cut.target >= alone) & (nbytes < GIVEN_AWAY_NBYTES) & (nbytes <= runs.block) & whole & (cut.start == 0)
        follows = np.ones(len(cut), dtype=np.bool_)
        follows[1:] = (cut.target[1:] == cut.target[:-1]) & (cut.at[1:] == cut.at[:-1] + wanted[:-1])
        follows[1:] &= runs.offsets[1:] == runs.offsets[:-1] + nbytes[:-1]
        follows[runs.first[:-1]] = True
        every = [np.logical_and.reduceat(one, runs.first[:-1]) if len(runs) else one for one in (whole & follows, small, whole)]
        every[1] &= counts >= _MANY
        every[2] &= runs.nbytes >= counts * _FILLED_NBYTES
        rows: list[Rows | None] = [None] * len(cut)
        for stretch in np.flatnonzero(cut.row).tolist():
            rows[stretch] = Rows(int(cut.row[stretch]), int(cut.width[stretch]), int(cut.step[stretch]))
        own = (cut.target, cut.at, nbytes, cut.low - cut.start, wanted, runs.block, inside, block_begin, block_end, address)
        lists = (column.tolist() for column in (*own, runs.checksums, checksum_start, runs.first, *every))
        return cls(address, rows, *lists)
