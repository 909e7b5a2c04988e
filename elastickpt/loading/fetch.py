"""Carries out reads: ranges of chunk files straight into the destination, every block verified on the way. [FRAG-32, FRAG-33]

Threads take the units of a plan in order, so that files are read front to back, each opened once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elastickpt.errors import ChecksumMismatch, StateMismatch, WrongLength
from elastickpt.format.digest import block_checksum
from elastickpt.format.records import StoredFile, StoredPiece
from elastickpt.layout.reads import Direct, segments
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import (
    UNIT_NBYTES,
    Bytes,
    Elements,
    FetchPlan,
    ReadTarget,
    Unit,
    Wanted,
    joined,
    plan_fetch,
    require_length,
    span_of,
)
from elastickpt.ranks.threads import Pool
from elastickpt.storage.store import RangeReader

THREADS = 8  # a cold disk wants several reads under way; warm ones do not mind
SPAN_RATIO = 4  # rows closer than this are read as one span: a call costs more than the bytes between them

Verify = Literal["on", "off"]


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
) -> FetchReport:
    """Fills every destination; blocking. `progress` is called with numbers of bytes read, from several threads.

    `threads` are those of a caller that reads one plan after the other; else there are `THREADS` for this plan.

    Raises Damaged kinds naming file, block and array for what is not what was written, StorageFailed kinds for what cannot
    be read, StateMismatch for a destination that cannot hold it; destinations then hold anything.
    """
    reads = joined(plan.units)
    _Fetching(opened, reads, verify, progress).run(threads)
    for target in plan.targets:
        _settle(target)
    return FetchReport(
        sum(unit.end - unit.start for unit in plan.units),
        sum(target.data.size for target in plan.targets),
        len(reads),
    )


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


class _Open:
    """One file: opened by its first unit, closed by its last."""

    def __init__(self, units: int) -> None:
        self.lock = threading.Lock()
        self.left = units
        self.reader: RangeReader | None = None


class _Fetching:
    """One call of `fetch` under way: threads take what is read at once, in order."""

    def __init__(
        self, opened: Opened, reads: Sequence[tuple[Unit, ...]], verify: Verify, progress: Callable[[int], None]
    ) -> None:
        self._opened = opened
        self._reads = reads
        self._verify = verify
        self._progress = progress
        self._scratch = threading.local()
        self._files: dict[StoredFile, _Open] = {}
        for unit, *_ in reads:
            if unit.file in self._files:
                self._files[unit.file].left += 1
            else:
                self._files[unit.file] = _Open(1)

    def run(self, threads: Pool | None) -> None:
        pool = threads or Pool("elastickpt-read", THREADS)
        try:
            pool.share_out(self._reads, self._carry_out)
        finally:
            if threads is None:
                pool.close()
            for file in self._files.values():
                if file.reader is not None:
                    file.reader.close()

    def _reader(self, unit: Unit) -> RangeReader:
        file = self._files[unit.file]
        with file.lock:
            if file.reader is None:
                file.reader = self._opened.store.open_reader(self._opened.where(unit.file), cache=unit.target.wanted.cache)
                require_length(unit, file.reader.nbytes)
            return file.reader

    def _done(self, unit: Unit) -> None:
        file = self._files[unit.file]
        with file.lock:
            file.left -= 1
            if file.left == 0 and file.reader is not None:
                file.reader.close()
                file.reader = None

    def _buffer(self, nbytes: int) -> Bytes:
        found: Bytes | None = getattr(self._scratch, "data", None)
        if found is None or found.size < nbytes:
            found = np.empty(max(nbytes, UNIT_NBYTES), dtype=np.uint8)
            self._scratch.data = found
        return found[:nbytes]

    def _carry_out(self, units: tuple[Unit, ...]) -> None:
        reader = self._reader(units[0])
        if len(units) == 1:
            self._one(reader, units[0])
        else:
            self._in_a_row(reader, units)
        self._done(units[0])
        self._progress(sum(unit.end - unit.start for unit in units))

    def _in_a_row(self, reader: RangeReader, units: tuple[Unit, ...]) -> None:
        spans = [span for unit in units if (span := span_of(unit)) is not None]
        target, first, last = units[0].target, spans[0], spans[-1]
        with _naming(units[0]):
            reader.read_into(first.offset, target.data[first.at : last.at + last.nbytes].data)
        for unit, span in zip(units, spans, strict=True):
            self._verify_blocks(unit, unit.start, target.data[span.at : span.at + span.nbytes])

    def _one(self, reader: RangeReader, unit: Unit) -> None:
        step = unit.read.steps[0] if len(unit.read.steps) == 1 else None
        if isinstance(step, Direct):
            self._direct(reader, unit, step)
        else:
            data = self._buffer(unit.end - unit.start)
            self._read_blocks(reader, unit, unit.start, data)
            for one in unit.read.steps:
                if isinstance(one, Direct):
                    low = one.source - unit.start
                    unit.target.data[one.target : one.target + one.nbytes] = data[low : low + one.nbytes]
                    continue
                dtype = unit.target.wanted.into.dtype
                source: Elements = np.ndarray(one.part.shape, dtype, data.data, one.source - unit.start, one.source_strides)
                into: Elements = np.ndarray(one.part.shape, dtype, unit.target.data.data, one.target, one.target_strides)
                np.copyto(into, source)

    def _direct(self, reader: RangeReader, unit: Unit, step: Direct) -> None:
        """Blocks wholly inside go straight to the destination; one that only partly belongs there goes through a buffer."""
        block, stop = unit.block_nbytes, step.source + step.nbytes
        first = max(unit.start, -(-step.source // block) * block)
        last = unit.end if unit.end <= stop else stop // block * block
        edges = [(unit.start, unit.end)]
        if first < last:
            at = step.target + first - step.source
            self._read_blocks(reader, unit, first, unit.target.data[at : at + last - first])
            edges = [(unit.start, first), (last, unit.end)]
        for low, high in edges:
            if low < high:
                data = self._buffer(high - low)
                self._read_blocks(reader, unit, low, data)
                begin, end = max(low, step.source), min(high, stop)
                at = step.target + begin - step.source
                unit.target.data[at : at + end - begin] = data[begin - low : end - low]

    def _read_blocks(self, reader: RangeReader, unit: Unit, start: int, into: Bytes) -> None:
        """Fills `into` with the piece's bytes from `start`, a multiple of the block size, and verifies them."""
        with _naming(unit):
            _read(reader, unit.piece, start, into)
        self._verify_blocks(unit, start, into)

    def _verify_blocks(self, unit: Unit, start: int, into: Bytes) -> None:
        """Raises ChecksumMismatch unless `into` are the piece's bytes from `start`. [FRAG-32]"""
        if self._verify == "off":
            return
        block = unit.block_nbytes
        for begin in range(0, into.size, block):
            number = (start + begin) // block
            found = block_checksum(into[begin : begin + block].data)
            if found != unit.piece.checksums[number]:
                record = unit.target.wanted.record
                raise ChecksumMismatch(
                    f"{unit.file.path}: block {number} of piece {unit.piece.box} of array {record.spec.id} "
                    f"(file offset {_file_offset(unit.piece, start + begin)}): expected checksum "
                    f"{unit.piece.checksums[number]:016x} (in the fragment map), found {found:016x}"
                )


@contextmanager
def _naming(unit: Unit) -> Iterator[None]:
    """Says in an error of its file what the file holds."""
    try:
        yield
    except WrongLength as error:
        raise WrongLength(f"{error.message}; it holds array {unit.target.wanted.record.spec.id}") from error


def _read(reader: RangeReader, piece: StoredPiece, start: int, into: Bytes) -> None:
    if piece.row_nbytes in (piece.row_stride, piece.nbytes):
        reader.read_into(piece.offset + start, into.data)
    elif piece.row_stride <= SPAN_RATIO * piece.row_nbytes or piece.row_stride <= 4096:
        _read_span(reader, piece, start, into)
    else:
        done = 0
        for segment in segments(piece, start, start + into.size):
            reader.read_into(segment.offset, into[done : done + segment.nbytes].data)
            done += segment.nbytes


def _read_span(reader: RangeReader, piece: StoredPiece, start: int, into: Bytes) -> None:
    """Rows that lie close together: everything from the first to the last is read, then the gaps are left out."""
    row, stride = piece.row_nbytes, piece.row_stride
    first, stop = start // row, -(-(start + into.size) // row)
    span = np.empty((stop - first) * stride, dtype=np.uint8)
    used = (stop - first - 1) * stride + row
    reader.read_into(piece.offset + first * stride, span[:used].data)
    rows = span.reshape(stop - first, stride)[:, :row]
    skip = start - first * row
    into[:] = rows.reshape(-1)[skip : skip + into.size]


def _file_offset(piece: StoredPiece, position: int) -> int:
    row, inside = divmod(position, piece.row_nbytes)
    return piece.offset + row * piece.row_stride + inside
