"""Carries out reads: ranges of chunk files straight into the destination, every block verified on the way. [FRAG-32, FRAG-33]

Threads take the units of a plan in order, so that files are read front to back, each opened once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elastickpt.errors import StateMismatch, WrongLength
from elastickpt.format.records import ArrayRecord, StoredFile
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import UNIT_NBYTES, FetchPlan, Unit, plan_fetch, require_length
from elastickpt.loading.read_runs import RunReader
from elastickpt.loading.stretches import runs_of
from elastickpt.loading.targets import ReadTarget, Wanted
from elastickpt.loading.units import Scratch, UnitReader, holding
from elastickpt.loading.units import Verify as Verify
from elastickpt.ranks.threads import Pool
from elastickpt.storage.several_reads import MOST
from elastickpt.storage.store import KnowsItsMedium, Lending, RangeReader, Store, is_in_memory, lending_of

THREADS = 8  # a cold disk wants several reads under way; warm ones do not mind
SHARED_THREADS = 4  # of a process beside others on its host: more reads of all together only take turns


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
    return FetchReport(fetching.nbytes, plan.targets.wanted_nbytes, fetching.count)


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
    """How many threads read at most, and how much at once, in bytes; how much of one piece a thread takes to read; and how much
    of short reads it takes together."""

    threads: int
    unit_nbytes: int
    long_nbytes: int
    together_nbytes: int


DEVICE = Pace(THREADS, UNIT_NBYTES, UNIT_NBYTES, 0)
DISK = replace(DEVICE, together_nbytes=UNIT_NBYTES)  # of this host: its reads may be handed to the kernel together
MEMORY = Pace(2, 256 << 10, 8 << 20, 0)  # reads are copies: more threads fight for cores, larger ones leave their caches


def pace_of(store: Store, *, processes: int = 1) -> Pace:
    """What suits a store, where so many processes of this host read at the same time."""
    if not is_in_memory(store):
        pace = DISK if isinstance(store, KnowsItsMedium) else DEVICE
        return replace(pace, threads=max(SHARED_THREADS, pace.threads // processes))
    cores = len(os.sched_getaffinity(0))
    return replace(MEMORY, threads=max(1, min(MEMORY.threads, cores // processes)))


class _Open:
    """One file: opened by its first read, closed by its last."""

    def __init__(self, file: StoredFile, left: int = 0, spared: int = 0) -> None:
        self.lock = threading.Lock()
        self.file = file
        self.left = left  # reads
        self.spared = spared  # bytes more that nobody else wants than that others want too
        self.reader: RangeReader | None = None
        self.lending: Lending | None = None  # of the reader, once it is open


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
        runs = runs_of(plan.maps, plan.stretches, plan.file, unit_nbytes=pace.unit_nbytes, long_nbytes=pace.long_nbytes)
        self._progress = progress
        scratch = Scratch()
        self._units = UnitReader(verify, scratch)
        self._runs = RunReader(plan, runs, verify, scratch, unit_nbytes=pace.unit_nbytes)
        spared = np.where(plan.targets.spared[runs.stretches.target[runs.first[:-1]]], runs.nbytes, -runs.nbytes)
        left = np.bincount(runs.file, minlength=len(plan.files)).tolist()
        more = np.bincount(runs.file, weights=spared, minlength=len(plan.files)).astype(np.int64).tolist()
        files = list(map(_Open, plan.files, left, more))
        self._of_runs = [files[number] for number in runs.file.tolist()]
        self._files = dict(zip(plan.files, files, strict=True))
        for unit in plan.units:
            opening = self._files.setdefault(unit.file, _Open(unit.file))
            opening.left += 1
            opening.spared += (unit.end - unit.start) * (1 if unit.target.wanted.cache == "spare" else -1)
        self._reads = self._in_order(pace.together_nbytes)

    def _in_order(self, together_nbytes: int) -> list[tuple[int, ...] | Unit]:
        """Numbers of runs, and units, in the order in which they lie; runs of one file together up to so many bytes."""
        if not self._plan.units and (together_nbytes == 0 or len(self._files) == len(self._of_runs)):
            return [(run,) for run in range(len(self._of_runs))]
        runs = [
            (opening.file.path, at, 0, run)
            for run, (opening, at) in enumerate(zip(self._of_runs, self._runs.offset, strict=True))
        ]
        units = [(unit.file.path, unit.piece.offset + unit.start, 1, place) for place, unit in enumerate(self._plan.units)]
        found: list[tuple[int, ...] | Unit] = []
        own, left = None, 0
        for path, _, kind, number in sorted(runs + units) if units else runs:
            if kind:
                found.append(self._plan.units[number])
                continue
            nbytes = self._runs.nbytes[number]
            last = found[-1] if found else None
            if isinstance(last, tuple) and own == path and nbytes <= left and len(last) < MOST:
                found[-1] = (*last, number)
            else:
                found.append((number,))
                own, left = path, together_nbytes
            left -= nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(self._runs.nbytes) + sum(unit.end - unit.start for unit in self._plan.units)

    @property
    def count(self) -> int:
        """Of reads, though some are handed to the kernel together."""
        return len(self._of_runs) + len(self._plan.units)

    def run(self, pool: Pool) -> None:
        try:
            pool.share_out(self._reads, self._carry_out)
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
                opening.lending = lending_of(opening.reader)
            return opening.reader

    def _done(self, opening: _Open, nbytes: int, reads: int = 1) -> None:
        with opening.lock:
            opening.left -= reads
            if opening.left == 0 and opening.reader is not None:
                opening.reader.close()
                opening.reader = opening.lending = None
        self._progress(nbytes)

    def _carry_out(self, read: tuple[int, ...] | Unit) -> None:
        if isinstance(read, Unit):
            opening = self._files[read.file]
            self._units.read(self._reader(opening, lambda: read.target.wanted.record), read)
            self._done(opening, read.end - read.start)
            return
        runs, opening = self._runs, self._of_runs[read[0]]
        lending = opening.lending
        if lending is None:
            lending = lending_of(self._reader(opening, lambda: runs.record_of(read[0])))
        lent = None if len(read) == 1 else lending.lend_several([(runs.offset[run], runs.nbytes[run]) for run in read])
        if lent is not None:
            for run, own in zip(read, lent, strict=True):
                runs.deliver(run, own)
        else:
            for run in read:
                try:
                    runs.read(run, lending)
                except WrongLength as error:
                    raise holding(error, runs.record_of(run)) from error
        self._done(opening, sum(map(runs.nbytes.__getitem__, read)), len(read))
