"""The bytes of a checkpoint's files against the checksums of its fragment maps; pads read as zero. [UCF-3, UCF-4, FRAG-32]"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elastickpt.errors import CheckpointError, ChecksumMismatch, CoverageOverlap, StorageFailed, WrongLength
from elastickpt.format.digest import block_checksum
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import StoredFile, StoredPiece
from elastickpt.layout.reads import place_in_file, segments
from elastickpt.loading.opened import Opened
from elastickpt.ranks.threads import Pool
from elastickpt.storage.store import RangeReader

THREADS = 4
READ_NBYTES = 4 << 20
SHARE_NBYTES = 64 << 20  # of a file that several threads look at, each at so much of its pieces

Pads = Literal["zero", "unknown"]


@dataclass(frozen=True, slots=True)
class FileTask:
    """All pieces of one file, each with the block size of its writer."""

    file: StoredFile
    pieces: tuple[tuple[StoredPiece, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece, _ in self.pieces)

    def shares(self) -> Iterator[range]:
        """Numbers of its pieces, some `SHARE_NBYTES` at a time: a pack may be all of a checkpoint."""
        first = nbytes = 0
        for number, (piece, _) in enumerate(self.pieces):
            nbytes += piece.nbytes
            if nbytes >= SHARE_NBYTES:
                yield range(first, number + 1)
                first, nbytes = number + 1, 0
        if first < len(self.pieces) or not self.pieces:
            yield range(first, len(self.pieces))


def file_tasks(maps: Sequence[FragmentColumns]) -> tuple[FileTask, ...]:
    """The files that these maps name, by base and path."""
    found: dict[StoredFile, list[tuple[StoredPiece, int]]] = {}
    for columns in maps:
        for number in range(len(columns.pieces)):
            piece = columns.pieces.piece(number)
            found.setdefault(columns.files[piece.file], []).append((piece, columns.block_nbytes))
    return tuple(FileTask(file, tuple(found[file])) for file in sorted(found, key=lambda file: (file.base, file.path)))


def verify_files(
    opened: Opened, tasks: Sequence[FileTask], *, pads: Pads, progress: Callable[[int, int], None]
) -> Iterator[CheckpointError]:
    """What is wrong with these files, in their order; every one is read whole. Raises StorageFailed kinds.

    `pads`: bytes outside of all pieces read as "zero"; "unknown" where pieces are missing, so that nobody knows which they are.
    """
    checking = _Checking(opened, sum(task.nbytes for task in tasks), pads, progress)
    shares = [(task, share) for task in tasks for share in task.shares()]
    found: list[list[CheckpointError]] = [[] for _ in shares]
    with Pool("elastickpt-verify", THREADS) as pool:
        pool.share_out(range(len(shares)), lambda number: found[number].extend(checking.file(*shares[number])))
    for errors in found:
        yield from errors


class _Checking:
    def __init__(self, opened: Opened, total: int, pads: Pads, progress: Callable[[int, int], None]) -> None:
        self._opened, self._total, self._zeros, self._progress = opened, total, pads == "zero", progress
        self._counting = threading.Lock()
        self._done = 0

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._done += nbytes
            self._progress(self._done, self._total)

    def file(self, task: FileTask, share: range) -> Iterator[CheckpointError]:
        """What is wrong with a share of a file's pieces; with the first one, also with the file."""
        says = share.start == 0
        try:
            reader = self._opened.store.open_reader(self._opened.where(task.file))
        except StorageFailed:
            raise
        except CheckpointError as error:
            if says:
                yield type(error)(f"{error.message}; it holds {_arrays(task)}")
            return
        try:
            path, expected = task.file.path, task.file.nbytes
            if reader.nbytes != expected:
                if says:
                    yield WrongLength(f"{path}: expected {expected} bytes (in the fragment map), found {reader.nbytes}")
                return
            for number in share:
                yield from self._piece(path, reader, *task.pieces[number])
            if says:
                yield from self._between(task, reader)
        finally:
            reader.close()

    def _between(self, task: FileTask, reader: RangeReader) -> Iterator[CheckpointError]:
        """What is wrong with where the pieces lie, and with what lies between them."""
        used = _used_ranges(task)
        if sum(stop - start for start, stop in used) < task.nbytes:  # [FRAG-34]
            yield CoverageOverlap(f"{task.file.path}: bytes of it are in two pieces, of {_arrays(task)}")
        if self._zeros and task.file.base == 0:  # in a base's file others have their pieces too
            yield from self._pads(task, reader, used)

    def _piece(self, path: str, reader: RangeReader, piece: StoredPiece, block_nbytes: int) -> Iterator[CheckpointError]:
        step = max(READ_NBYTES // block_nbytes, 1) * block_nbytes
        for start in range(0, piece.nbytes, step):
            data = np.empty(min(step, piece.nbytes - start), dtype=np.uint8)
            done = 0
            for segment in segments(piece, start, start + data.size):
                reader.read_into(segment.offset, data[done : done + segment.nbytes].data)
                done += segment.nbytes
            for begin in range(0, data.size, block_nbytes):
                number = (start + begin) // block_nbytes
                found = block_checksum(data[begin : begin + block_nbytes].data)
                if found != piece.checksums[number]:
                    yield ChecksumMismatch(
                        f"{path}: block {number} of piece {piece.box} of array {piece.array} "
                        f"(file offset {place_in_file(piece, start + begin)}): expected checksum "
                        f"{piece.checksums[number]:016x} (in the fragment map), found {found:016x}",
                    )
            self._count(data.size)

    def _pads(self, task: FileTask, reader: RangeReader, used: Sequence[tuple[int, int]]) -> Iterator[CheckpointError]:
        """Bytes of a file that belong to no element read as zero. [UCF-18]"""
        position = 0
        for start, stop in (*used, (task.file.nbytes, task.file.nbytes)):
            while position < start:
                data = np.empty(min(READ_NBYTES, start - position), dtype=np.uint8)
                reader.read_into(position, data.data)
                if data.any():
                    at = position + int(np.flatnonzero(data)[0])
                    yield ChecksumMismatch(f"{task.file.path}: byte {at} is padding, expected 0, found {data[at - position]}")
                    return
                position += data.size
            position = max(position, stop)


def _arrays(task: FileTask) -> str:
    keys = sorted({piece.array for piece, _ in task.pieces})
    return f"array {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"


def _used_ranges(task: FileTask) -> list[tuple[int, int]]:
    """The byte ranges of the file that hold elements, merged, in order."""
    starts, stops = [], []
    for piece, _ in task.pieces:
        rows = piece.nbytes // piece.row_nbytes if piece.nbytes else 0
        first = piece.offset + np.arange(rows, dtype=np.int64) * piece.row_stride
        starts.append(first)
        stops.append(first + piece.row_nbytes)
    if not starts:
        return []
    begin, end = np.concatenate(starts), np.concatenate(stops)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    breaks = np.flatnonzero(begin[1:] > np.maximum.accumulate(end)[:-1])
    first = np.concatenate(([0], breaks + 1))
    last = np.concatenate((breaks, [len(begin) - 1]))
    highest = np.maximum.accumulate(end)
    return [(int(begin[a]), int(highest[b])) for a, b in zip(first, last, strict=True)]
