"""Carries out reads: ranges of chunk files straight into the destination, every block verified on the way. [FRAG-32, FRAG-33]

Threads take the units of a plan in order, so that files are read front to back, each opened once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastickpt.errors import ChecksumMismatch, StateMismatch, WrongLength
from elastickpt.format.digest import block_checksum, block_checksums, whole_checksums
from elastickpt.format.records import ArrayRecord, StoredFile
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import UNIT_NBYTES, FetchPlan, Unit, plan_fetch, require_length
from elastickpt.loading.stretches import ReadRuns, runs_of
from elastickpt.loading.targets import Bytes, ReadTarget, Rows, Wanted, copy_rows, scatter
from elastickpt.loading.units import Scratch, UnitReader, holding, mismatch
from elastickpt.loading.units import Verify as Verify
from elastickpt.ranks.threads import Pool
from elastickpt.storage.store import Caching, Lend, RangeReader, Store, is_in_memory, lender

THREADS = 8  # a cold disk wants several reads under way; warm ones do not mind
SHARED_THREADS = 4  # of a process beside others on its host: more reads of all together only take turns
GIVEN_AWAY_NBYTES = 64 << 10  # numpy copies so much without the interpreter's lock, and begins later than a memoryview


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What reading cost: bytes fetched from the store, bytes delivered, number of read calls."""

    read_nbytes: int
    wanted_nbytes: int
    reads: int


def fetch(opened: Opened, wanted: Sequence[Wanted], *, verify: Verify = "on") -> FetchReport:
    """Plans and carries out at once; see `plan_fetch` and `carry_out`."""
    return carry_out(opened, plan_fetch(opened, wanted), verify=verify)


def carry_out(
    opened: Opened,
    plan: FetchPlan,
    *,
    verify: Verify = "on",
    progress: Callable[[int], None] = lambda _: None,
    threads: Pool | None = None,
    processes: int = 1,
) -> FetchReport:
    """Fills every destination; blocking. `progress` is called with numbers of bytes read, from several threads.

    `threads` are those of a caller that reads one plan after the other; else this plan has its own. So many `processes` of this
    host read at the same time, this one among them.

    Raises Damaged kinds naming file, block and array for what is not what was written, StorageFailed kinds for what cannot
    be read, StateMismatch for a destination that cannot hold it; destinations then hold anything.
    """
    pace = pace_of(opened.store, processes=processes)
    fetching = _Fetching(opened, plan, verify, progress, pace)
    if threads is None:
        with Pool("elastickpt-read", pace.threads) as pool:
            fetching.run(pool)
    else:
        fetching.run(threads)
    for target in plan.targets.alone:
        _settle(target)
    return FetchReport(fetching.nbytes, plan.targets.wanted_nbytes, len(fetching.reads))


def _settle(target: ReadTarget) -> None:
    """Copies what was read into a buffer to where it belongs."""
    into = target.wanted.into
    if into.flags.c_contiguous:
        return
    into[...] = target.data.view(into.dtype).reshape(into.shape)
    if any(stride == 0 and extent > 1 for stride, extent in zip(into.strides, into.shape, strict=True)) and (
        into.tobytes() != target.data.tobytes()
    ):
        raise StateMismatch(
            f"array {target.wanted.record.spec.id}: elements of this process's tensor share memory (it was expanded, strides "
            f"{into.strides} in bytes), and those in the checkpoint differ: load into a tensor with memory for each element"
        )


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """How many threads read at most, and how much at once, in bytes; and how much of one piece a thread takes to read."""

    threads: int
    unit_nbytes: int
    long_nbytes: int


DEVICE = Pace(THREADS, UNIT_NBYTES, UNIT_NBYTES)
MEMORY = Pace(
    2, 256 << 10, 8 << 20
)  # of reads that are copies: more threads fight for the cores, larger ones leave their caches


def pace_of(store: Store, *, processes: int = 1) -> Pace:
    """What suits a store, where so many processes of this host read at the same time."""
    if not is_in_memory(store):
        return replace(DEVICE, threads=max(SHARED_THREADS, DEVICE.threads // processes))
    cores = len(os.sched_getaffinity(0))
    return replace(MEMORY, threads=max(1, min(MEMORY.threads, cores // processes)))


class _Open:
    """One file: opened by its first read, closed by its last."""

    def __init__(self, file: StoredFile) -> None:
        self.lock = threading.Lock()
        self.file = file
        self.left = 0
        self.spared = 0  # bytes more that nobody else wants than that others want too
        self.reader: RangeReader | None = None
        self.lend: Lend | None = None  # of the reader, once it is open


class _Fetching:
    """One call of `fetch` under way: threads take what is read at once, in order."""

    def __init__(
        self,
        opened: Opened,
        plan: FetchPlan,
        verify: Verify,
        progress: Callable[[int], None],
        pace: Pace,
    ) -> None:
        self._opened = opened
        self._plan = plan
        self._runs = runs_of(plan.maps, plan.stretches, plan.file, unit_nbytes=pace.unit_nbytes, long_nbytes=pace.long_nbytes)
        self._unit_nbytes = pace.unit_nbytes
        self._columns = _Columns.of(self._runs, len(plan.targets.alone))
        self._verify = verify
        self._progress = progress
        self._scratch = Scratch()
        self._units = UnitReader(verify, self._scratch)
        self._files = {file: _Open(file) for file in plan.files}
        self._of_runs = [self._files[plan.files[number]] for number in self._runs.file.tolist()]
        for opening, nbytes, first in zip(self._of_runs, self._columns.run_nbytes, self._columns.first, strict=False):
            self._expect(opening, plan.targets.cache_of(self._columns.target[first]), nbytes)
        for unit in plan.units:
            self._expect(self._files.setdefault(unit.file, _Open(unit.file)), unit.target.wanted.cache, unit.end - unit.start)
        self.reads = self._in_order()

    def _expect(self, opening: _Open, cache: Caching, nbytes: int) -> None:
        opening.left += 1
        opening.spared += nbytes if cache == "spare" else -nbytes

    def _in_order(self) -> list[int | Unit]:
        """Numbers of runs, and units, in the order in which they lie."""
        if not self._plan.units:
            return list(range(len(self._runs)))
        runs = [
            (opening.file.path, at, 0, run)
            for run, (opening, at) in enumerate(zip(self._of_runs, self._columns.run_offset, strict=True))
        ]
        units = [(unit.file.path, unit.piece.offset + unit.start, 1, place) for place, unit in enumerate(self._plan.units)]
        return [self._plan.units[number] if kind else number for _, _, kind, number in sorted(runs + units)]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(self._columns.run_nbytes) + sum(unit.end - unit.start for unit in self._plan.units)

    def run(self, pool: Pool) -> None:
        try:
            pool.share_out(self.reads, self._carry_out)
        finally:
            for opening in self._files.values():
                if opening.reader is not None:
                    opening.reader.close()

    def _reader(self, opening: _Open, array: Callable[[], ArrayRecord]) -> RangeReader:
        with opening.lock:
            if opening.reader is None:
                where = self._opened.where(opening.file)
                opening.reader = self._opened.store.open_reader(where, cache="spare" if opening.spared > 0 else "fill")
                require_length(opening.file, opening.reader.nbytes, array)
                opening.lend = lender(opening.reader)
            return opening.reader

    def _done(self, opening: _Open, nbytes: int) -> None:
        with opening.lock:
            opening.left -= 1
            if opening.left == 0 and opening.reader is not None:
                opening.reader.close()
                opening.reader = opening.lend = None
        self._progress(nbytes)

    def _carry_out(self, read: int | Unit) -> None:
        if isinstance(read, Unit):
            opening = self._files[read.file]
            self._units.read(self._reader(opening, lambda: read.target.wanted.record), read)
            self._done(opening, read.end - read.start)
        else:
            self._run(read)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, run: int) -> None:
        opening, columns, targets = self._of_runs[run], self._columns, self._plan.targets
        first, nbytes, offset = columns.first[run], columns.run_nbytes[run], columns.run_offset[run]
        number = columns.target[first]
        lend = opening.lend or lender(self._reader(opening, lambda: targets.record_of(number)))
        try:
            if columns.straight[run]:
                self._straight(run, lend, targets.data_of(number)[columns.at[first] : columns.at[first] + nbytes])
            else:
                lent = lend(offset, self._scratch.take(nbytes).data)
                (self._scatter if columns.small[run] else self._hand_out)(run, lent)
        except WrongLength as error:
            raise holding(error, targets.record_of(number)) from error
        self._done(opening, nbytes)

    def _straight(self, run: int, lend: Lend, into: Bytes) -> None:
        """Reads what belongs in a row as it lies, unit by unit: a block is hashed while it is still in the cache."""
        columns, view = self._columns, into.data
        first, stop, offset = columns.first[run], columns.first[run + 1], columns.run_offset[run]
        step = max(self._unit_nbytes // columns.block[first], 1) * columns.block[first] if stop - first == 1 else into.size
        for low in range(0, into.size, step):
            own = view[low : low + step]
            lent = lend(offset + low, own)
            if stop - first == 1:
                self._require_blocks(first, low, lent)
            else:
                for stretch in range(first, stop):
                    at = columns.offset[stretch] - offset
                    self._require_blocks(stretch, 0, lent[at : at + columns.nbytes[stretch]])
            if lent is not own:
                into[low : low + step] = np.frombuffer(lent, dtype=np.uint8)

    def _hand_out(self, run: int, lent: memoryview) -> None:
        """Verifies stretches that were read at once, and copies what is wanted of each to where it belongs."""
        columns, targets = self._columns, self._plan.targets
        begin = columns.run_offset[run]
        for stretch in range(columns.first[run], columns.first[run + 1]):
            low, at, wanted = columns.offset[stretch] - begin, columns.at[stretch], columns.wanted[stretch]
            self._require_blocks(stretch, 0, lent[low : low + columns.nbytes[stretch]])
            skipped, rows = columns.skipped[stretch], columns.rows[stretch]
            if rows is not None:
                own, target = lent[low : low + columns.nbytes[stretch]], targets.data_of(columns.target[stretch])
                copy_rows(own, skipped, skipped + wanted, target, at, rows)
                continue
            low += skipped
            into = targets.data_of(columns.target[stretch])[at : at + wanted]
            if wanted < GIVEN_AWAY_NBYTES:
                into.data[:] = lent[low : low + wanted]
            else:
                into[:] = np.frombuffer(lent, np.uint8, wanted, low)

    def _scatter(self, run: int, lent: memoryview) -> None:
        """The same of small pieces that are targets in columns, at once."""
        columns, targets = self._columns, self._plan.targets
        own, begin = slice(columns.first[run], columns.first[run + 1]), columns.run_offset[run]
        low, nbytes = self._runs.offsets[own] - begin, self._runs.nbytes_of[own]
        if self._verify == "on":
            first = columns.checksum_start[own.start]
            found = block_checksums(lent, zip(low.tolist(), (low + nbytes).tolist(), strict=True))
            if found != (wanted := columns.checksums[first : first + len(found)]):
                wrong = next(k for k, two in enumerate(zip(found, wanted, strict=True)) if two[0] != two[1])
                start = int(low[wrong])
                raise self._mismatch(own.start + wrong, 0, lent[start : start + int(nbytes[wrong])])
        cut = self._runs.stretches
        scatter(lent, low, nbytes, targets.address[cut.target[own] - len(targets.alone)] + cut.at[own])

    def _require_blocks(self, stretch: int, begin: int, data: memoryview) -> None:
        """Raises ChecksumMismatch unless this is what was stored from byte `begin` of a stretch, a multiple of its block, on.
        [FRAG-32]"""
        columns = self._columns
        block = columns.block[stretch]
        number = columns.checksum_start[stretch] + begin // block
        if self._verify == "off":
            return
        if data.nbytes <= block:
            if block_checksum(data) != columns.checksums[number]:
                raise self._mismatch(stretch, begin, data)
            return
        found = whole_checksums(data, block)
        if found != (wanted := columns.checksums[number : number + len(found)]):
            at = block * next(k for k, two in enumerate(zip(found, wanted, strict=True)) if two[0] != two[1])
            raise self._mismatch(stretch, begin + at, data[at : at + block])

    def _mismatch(self, stretch: int, begin: int, data: memoryview) -> ChecksumMismatch:
        columns, cut = self._columns, self._runs.stretches
        pieces = self._plan.maps[int(cut.map[stretch])]
        piece = pieces.pieces.piece_of(number := int(cut.piece[stretch]), pieces.pieces.box(number))
        at = int(cut.start[stretch]) + begin
        record = self._plan.targets.record_of(columns.target[stretch])
        return mismatch(pieces.files[piece.file], piece, record, at // pieces.block_nbytes, at, block_checksum(data))


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of runs as lists, which threads go through one by one."""

    rows: list[Rows | None]  # of each stretch of which parts of rows are wanted
    target: list[int]
    at: list[int]
    offset: list[int]
    nbytes: list[int]
    skipped: list[int]
    wanted: list[int]
    block: list[int]
    checksums: list[int]
    checksum_start: list[int]
    run_offset: list[int]
    run_nbytes: list[int]
    first: list[int]
    straight: list[bool]  # of each run: all of it belongs in a row to one target, as it lies
    small: list[bool]  # of each run: nothing but small pieces, each of one block and a target in columns

    @classmethod
    def of(cls, runs: ReadRuns, alone: int) -> _Columns:
        cut, nbytes = runs.stretches, runs.nbytes_of
        own = (cut.target, cut.at, runs.offsets, nbytes, cut.low - cut.start, cut.high - cut.low)
        columns = (*own, runs.block, runs.checksums, runs.checksum_start, runs.offset, runs.nbytes, runs.first)
        small = (cut.target >= alone) & (nbytes < GIVEN_AWAY_NBYTES) & (nbytes <= runs.block)
        small &= (cut.start == 0) & (cut.low == 0) & (cut.high == nbytes) & (cut.row == 0)
        wanted = cut.high - cut.low
        straight = (wanted == nbytes) & (cut.row == 0)
        follows = np.ones(len(cut), dtype=np.bool_)
        follows[1:] = (cut.target[1:] == cut.target[:-1]) & (cut.at[1:] == cut.at[:-1] + wanted[:-1])
        follows[1:] &= runs.offsets[1:] == runs.offsets[:-1] + nbytes[:-1]
        follows[runs.first[:-1]] = True
        every = (np.logical_and.reduceat(one, runs.first[:-1]) if len(runs) else one for one in (straight & follows, small))
        rows: list[Rows | None] = [None] * len(cut)
        for stretch in np.flatnonzero(cut.row).tolist():
            rows[stretch] = Rows(int(cut.row[stretch]), int(cut.width[stretch]), int(cut.step[stretch]))
        return cls(rows, *(column.tolist() for column in (*columns, *every)))
