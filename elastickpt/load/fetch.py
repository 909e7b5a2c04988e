"""Carries out reads: ranges of chunk files straight into the destination, every block verified on the way.

    wanted boxes --> pieces of the fragment maps --> reads (layout.reads) --> units, by file and offset --> threads

A unit is at most `UNIT_NBYTES` of whole blocks, so that a block is hashed while it is still in the cache.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import ChecksumMismatch, CoverageGap, CoverageOverlap, Malformed, WrongLength
from elastickpt.format.box import Box
from elastickpt.format.digest import block_checksum
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, StoredFile, StoredPiece
from elastickpt.layout.algebra import intersect
from elastickpt.layout.coverage import prove_box_coverage
from elastickpt.layout.reads import Direct, Read, plan_reads, segments
from elastickpt.load.opened import Opened
from elastickpt.storage.store import RangeReader

UNIT_NBYTES = 2 << 20
THREADS = 4
SPAN_RATIO = 4  # rows closer than this are read as one span: a call costs more than the bytes between them

Bytes = NDArray[np.uint8]
Elements = NDArray[np.generic]
Verify = Literal["on", "off"]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A box of one array, in global coordinates, and the elements to fill: words of the element size, any strides."""

    record: ArrayRecord
    box: Box
    into: Elements


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What reading cost: bytes fetched from the store, bytes delivered, number of read calls."""

    read_nbytes: int
    wanted_nbytes: int
    reads: int


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """The wanted box as bytes in its own C order: the destination's own memory, or a buffer that is copied at the end."""

    wanted: Wanted
    data: Bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """Some blocks of one read: bytes [start, end) of a piece, and what they deliver to `target`."""

    file: StoredFile
    piece: StoredPiece
    block_nbytes: int
    start: int
    end: int
    read: Read
    target: _Target


def fetch(
    opened: Opened, wanted: Sequence[Wanted], *, verify: Verify = "on", progress: Callable[[int], None] = lambda _: None
) -> FetchReport:
    """Fills every destination; blocking. `progress` is called with numbers of bytes read, from several threads.

    Raises Damaged kinds naming file, block and array for what is not what was written, StorageFailed kinds for what cannot
    be read; destinations then hold anything.
    """
    targets = [_target(want) for want in wanted]
    units = [unit for target in targets for unit in _units_of(opened, target)]
    units.sort(key=lambda unit: (unit.file.path, unit.piece.offset + unit.start))
    _Fetching(opened, units, verify, progress).run()
    for target in targets:
        into = target.wanted.into
        if not into.flags.c_contiguous:
            into[...] = target.data.view(into.dtype).reshape(into.shape)
    return FetchReport(
        sum(unit.end - unit.start for unit in units),
        sum(target.data.size for target in targets),
        len(units),
    )


def _target(wanted: Wanted) -> _Target:
    into = wanted.into
    if into.shape != wanted.box.shape:
        raise Malformed(f"array {wanted.record.spec.id}: a destination of shape {into.shape} for box {wanted.box}")
    if into.flags.c_contiguous:
        return _Target(wanted, into.reshape(-1).view(np.uint8))
    return _Target(wanted, np.empty(into.size * into.dtype.itemsize, dtype=np.uint8))


# -- planning ----------------------------------------------------------------------------------------------------------


def pieces_of(opened: Opened, record: ArrayRecord, within: Box) -> list[tuple[FragmentColumns, StoredPiece]]:
    """The stored pieces of an array that hold any of `within`, with their fragment maps."""
    found = []
    for writer in record.writers:
        columns = opened.fragments(writer)
        pieces = columns.pieces
        number = bisect_left(pieces.arrays, record.key)  # keys are sorted
        if number == len(pieces.arrays) or pieces.arrays[number] != record.key:
            raise Malformed(f"fragment map of writer {writer}: no piece of {record.key}, which the index says it holds")
        for place in pieces.of_array(number):
            box = pieces.box(place)
            if len(box.start) != len(record.spec.shape):
                raise Malformed(f"array {record.spec.id}: a piece {box} for shape {record.spec.shape}")
            if intersect(box, within) is not None:
                found.append((columns, pieces.piece(place)))
    return found


def _units_of(opened: Opened, target: _Target) -> list[_Unit]:
    want = target.wanted
    if want.box.count == 0:
        return []
    found = pieces_of(opened, want.record, want.box)
    _require_whole(want, [piece for _, piece in found])
    units = []
    itemsize = want.record.spec.type.itemsize
    for columns, piece in found:
        file = columns.files[piece.file]
        for read in plan_reads(want.box, [piece], block_nbytes=columns.block_nbytes, itemsize=itemsize):
            step = max(UNIT_NBYTES // columns.block_nbytes, 1) * columns.block_nbytes
            if not isinstance(read.steps[0], Direct) or len(read.steps) > 1:
                step = read.nbytes
            for start in range(read.start, read.end, step):
                end = min(start + step, read.end)
                units.append(_Unit(file, piece, columns.block_nbytes, start, end, read, target))
    return units


def _require_whole(want: Wanted, pieces: Sequence[StoredPiece]) -> None:
    """Raises CoverageGap or CoverageOverlap unless the pieces hold every wanted element exactly once. [FRAG-30]"""
    parts = [part for piece in pieces if (part := intersect(piece.box, want.box)) is not None]
    if len(parts) == 1 and parts[0] == want.box:
        return
    report = prove_box_coverage(want.box, parts)
    if report.overlaps:
        raise CoverageOverlap(f"array {want.record.spec.id}: elements {report.overlaps[0][2]} are stored twice")
    if report.gaps:
        raise CoverageGap(f"array {want.record.spec.id}: elements {report.gaps[0]} are stored nowhere")


# -- reading -----------------------------------------------------------------------------------------------------------


class _Open:
    """One file: opened by its first unit, closed by its last."""

    def __init__(self, units: int) -> None:
        self.lock = threading.Lock()
        self.left = units
        self.reader: RangeReader | None = None


class _Fetching:
    """One call of `fetch` under way: threads take units in order."""

    def __init__(self, opened: Opened, units: Sequence[_Unit], verify: Verify, progress: Callable[[int], None]) -> None:
        self._opened = opened
        self._pending = iter(units)
        self._count = len(units)
        self._verify = verify
        self._progress = progress
        self._taking = threading.Lock()
        self._failed = threading.Event()
        self._scratch = threading.local()
        self._files: dict[str, _Open] = {}
        for unit in units:
            if unit.file.path in self._files:
                self._files[unit.file.path].left += 1
            else:
                self._files[unit.file.path] = _Open(1)

    def run(self) -> None:
        try:
            if self._count <= 1:
                self._work()
                return
            with ThreadPoolExecutor(THREADS, thread_name_prefix="elastickpt-read") as pool:
                futures = [pool.submit(self._work) for _ in range(min(THREADS, self._count))]
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in sorted(futures, key=lambda future: not (future.done() and future.exception())):
                    future.result()
        finally:
            for file in self._files.values():
                if file.reader is not None:
                    file.reader.close()

    def _work(self) -> None:
        while not self._failed.is_set():
            with self._taking:
                unit = next(self._pending, None)
            if unit is None:
                return
            try:
                self._carry_out(unit)
            except BaseException:
                self._failed.set()
                raise

    def _reader(self, unit: _Unit) -> RangeReader:
        file = self._files[unit.file.path]
        with file.lock:
            if file.reader is None:
                file.reader = self._opened.store.open_reader(self._opened.path(unit.file.path))
                if file.reader.nbytes != unit.file.nbytes:
                    raise WrongLength(
                        f"{unit.file.path}: expected {unit.file.nbytes} bytes (in the fragment map), "
                        f"found {file.reader.nbytes}; it holds array {unit.target.wanted.record.spec.id}"
                    )
            return file.reader

    def _done(self, unit: _Unit) -> None:
        file = self._files[unit.file.path]
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

    def _carry_out(self, unit: _Unit) -> None:
        reader = self._reader(unit)
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
        self._done(unit)
        self._progress(unit.end - unit.start)

    def _direct(self, reader: RangeReader, unit: _Unit, step: Direct) -> None:
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

    def _read_blocks(self, reader: RangeReader, unit: _Unit, start: int, into: Bytes) -> None:
        """Fills `into` with the piece's bytes from `start`, a multiple of the block size, and verifies them."""
        self._read(reader, unit, start, into)
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

    def _read(self, reader: RangeReader, unit: _Unit, start: int, into: Bytes) -> None:
        piece = unit.piece
        try:
            if piece.row_nbytes == piece.row_stride or piece.row_nbytes == piece.nbytes:
                reader.read_into(piece.offset + start, into.data)
            elif piece.row_stride <= SPAN_RATIO * piece.row_nbytes or piece.row_stride <= 4096:
                _read_span(reader, piece, start, into)
            else:
                done = 0
                for segment in segments(piece, start, start + into.size):
                    reader.read_into(segment.offset, into[done : done + segment.nbytes].data)
                    done += segment.nbytes
        except WrongLength as error:
            raise WrongLength(f"{error.message}; it holds array {unit.target.wanted.record.spec.id}") from error


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
