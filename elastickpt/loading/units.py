"""Reads what does not lie in a row on both sides: strided pieces, parts of rows, blocks of which only a part is wanted.

[FRAG-32, FRAG-33]
"""

from __future__ import annotations

import threading
from typing import Literal

import numpy as np

from elastickpt.errors import ChecksumMismatch, WrongLength
from elastickpt.format.digest import block_checksum
from elastickpt.format.records import ArrayRecord, StoredFile, StoredPiece
from elastickpt.layout.reads import Direct, place_in_file, segments
from elastickpt.loading.plan import UNIT_NBYTES, Unit
from elastickpt.loading.targets import AnyArray, Bytes
from elastickpt.storage.store import RangeReader, lending_of

SPAN_RATIO = 4  # rows closer than this are read as one span: a call costs more than the bytes between them

Verify = Literal["on", "off"]


class Scratch:
    """Memory of each thread, which its next use overwrites."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def take(self, nbytes: int) -> Bytes:
        found: Bytes | None = getattr(self._of_thread, "data", None)
        if found is None or found.size < nbytes:
            found = np.empty(max(nbytes, UNIT_NBYTES), dtype=np.uint8)
            self._of_thread.data = found
        return found[:nbytes]


class UnitReader:
    """Reads units, from several threads; each verified, and put where it belongs."""

    def __init__(self, verify: Verify, scratch: Scratch) -> None:
        self._verify, self._scratch = verify, scratch

    def read(self, reader: RangeReader, unit: Unit) -> None:
        step = unit.read.steps[0] if len(unit.read.steps) == 1 else None
        if isinstance(step, Direct):
            return self._direct(reader, unit, step)
        data = self._lent(reader, unit)
        for one in unit.read.steps:
            if isinstance(one, Direct):
                low = one.source - unit.start
                unit.target.data[one.target : one.target + one.nbytes] = data[low : low + one.nbytes]
                continue
            dtype = unit.target.wanted.into.dtype
            source: AnyArray = np.ndarray(one.part.shape, dtype, data.data, one.source - unit.start, one.source_strides)
            into: AnyArray = np.ndarray(one.part.shape, dtype, unit.target.data.data, one.target, one.target_strides)
            np.copyto(into, source)
        return None

    def _lent(self, reader: RangeReader, unit: Unit) -> Bytes:
        """The unit's bytes, verified, in memory that this thread's next read overwrites."""
        data = self._scratch.take(unit.end - unit.start)
        if not _in_a_row(unit.piece):
            self._read_blocks(reader, unit, unit.start, data)
            return data
        try:
            lent = np.frombuffer(lending_of(reader).lend(unit.piece.offset + unit.start, data.data), dtype=np.uint8)
        except WrongLength as error:
            raise holding(error, unit.target.wanted.record) from error
        self._verify_blocks(unit, unit.start, lent)
        return lent

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
                data = self._scratch.take(high - low)
                self._read_blocks(reader, unit, low, data)
                begin, end = max(low, step.source), min(high, stop)
                at = step.target + begin - step.source
                unit.target.data[at : at + end - begin] = data[begin - low : end - low]

    def _read_blocks(self, reader: RangeReader, unit: Unit, start: int, into: Bytes) -> None:
        """Fills `into` with the piece's bytes from `start`, a multiple of the block size, and verifies them."""
        try:
            _read(reader, unit.piece, start, into)
        except WrongLength as error:
            raise holding(error, unit.target.wanted.record) from error
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
                raise mismatch(unit.file, unit.piece, unit.target.wanted.record, number, start + begin, found)


def mismatch(file: StoredFile, piece: StoredPiece, record: ArrayRecord, number: int, at: int, found: int) -> ChecksumMismatch:
    """Block `number` of a piece, which begins at byte `at` of it, has the checksum `found`."""
    return ChecksumMismatch(
        f"{file.path}: block {number} of piece {piece.box} of array {record.spec.id} "
        f"(file offset {place_in_file(piece, at)}): expected checksum "
        f"{piece.checksums[number]:016x} (in the fragment map), found {found:016x}"
    )


def holding(error: WrongLength, record: ArrayRecord) -> WrongLength:
    """The error of a file, saying what the file holds."""
    return WrongLength(f"{error.message}; it holds array {record.spec.id}")


def _in_a_row(piece: StoredPiece) -> bool:
    return piece.row_nbytes in (piece.row_stride, piece.nbytes)


def _read(reader: RangeReader, piece: StoredPiece, start: int, into: Bytes) -> None:
    if _in_a_row(piece):
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
