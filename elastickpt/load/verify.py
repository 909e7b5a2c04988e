"""`verify`: every byte of a checkpoint against its records, and nothing besides. Needs no torch. [UCF-80..89]"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from elastickpt.commit.prove import prove, require_distinct_ranges
from elastickpt.errors import (
    CheckpointError,
    ChecksumMismatch,
    Damaged,
    DocumentMismatch,
    Malformed,
    StrayFile,
    WrongLength,
)
from elastickpt.format.digest import block_checksum
from elastickpt.format.documents import documents
from elastickpt.format.keys import MANIFEST, array_keys, chunk_file
from elastickpt.format.limits import MAX_MANIFEST_NBYTES
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, StoredPiece
from elastickpt.layout.grid import runs_of
from elastickpt.layout.reads import segments
from elastickpt.load.opened import Opened
from elastickpt.storage.store import RangeReader

THREADS = 4
READ_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written: an error kind, what and where."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at, and what it found; `problems` is empty for a sound checkpoint."""

    path: str
    arrays: int
    files: int
    nbytes: int
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        return not self.problems


def verify(opened: Opened, *, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Looks at everything: records, names, coverage, documents, every block, pads, stray files. Blocking.

    Damage does not raise: it is in the report. `progress(done, total)` counts bytes, from several threads. Raises
    StorageFailed kinds where the store cannot be read.
    """
    return _Verification(opened, progress).run()


@dataclass(frozen=True, slots=True)
class _Task:
    """Pieces of one file, to be read and hashed together."""

    path: str
    nbytes: int
    pieces: tuple[tuple[StoredPiece, int], ...]  # with the block size of their writer


class _Verification:
    """One call of `verify` under way; what is wrong is collected, so that one problem does not hide another."""

    def __init__(self, opened: Opened, progress: Callable[[int, int], None]) -> None:
        self._opened = opened
        self._progress = progress
        self._problems: list[Problem] = []
        self._done = 0

    def run(self) -> VerifyReport:
        opened = self._opened
        maps = self._records()
        tasks = self._tasks(maps)
        total = sum(piece.nbytes for task in tasks for piece, _ in task.pieces)
        expected = {task.path for task in tasks}
        if self._index_readable():
            expected |= self._documents()
        expected |= {MANIFEST, *(e.file.path for e in opened.manifest.index), *(f.path for f in opened.manifest.fragments)}
        self._strays(expected)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="elastickpt-verify") as pool:
            for problems in pool.map(lambda task: list(self._file(task, total)), tasks):
                self._problems.extend(problems)
        arrays = len(opened.records) if self._index_readable() else 0
        return VerifyReport(f"{opened.store.url}/{opened.name}", arrays, len(expected), total, tuple(self._problems))

    def _note(self, error: CheckpointError) -> None:
        self._problems.append(Problem(error.kind, error.message))

    def _index_readable(self) -> bool:
        try:
            return self._opened.records is not None
        except Damaged:
            return False

    # -- records -------------------------------------------------------------------------------------------------------

    def _records(self) -> list[FragmentColumns]:
        """All fragment maps that can be read; index, keys, grids and coverage are checked on the way."""
        maps: list[FragmentColumns] = []
        whole = True
        for writer in range(len(self._opened.manifest.fragments)):
            try:
                maps.append(self._opened.fragments(writer))
            except Damaged as error:
                whole = False
                self._note(error)
        try:
            records = tuple(self._opened.records.values())
        except Damaged as error:
            self._note(error)
            return maps
        self._names()
        if self._opened.manifest.placement == "plain":
            self._places(maps)
        if whole:
            self._proof(records, maps)
        return maps

    def _names(self) -> None:
        """Keys are what the rule makes of the true names. [UCF-30]"""
        records = self._opened.records
        keys = array_keys(records)
        for identity, record in records.items():
            if record.key != keys[identity]:
                self._note(Malformed(f"index: array {identity} has key {record.key!r}, expected {keys[identity]!r}"))

    def _places(self, maps: Sequence[FragmentColumns]) -> None:
        """In plain placement every piece lies where zarr's chunk grid has it, so that plain readers see the same. [FRAG-15]"""
        for columns in maps:
            for number in range(len(columns.pieces)):
                piece = columns.pieces.piece(number)
                record = self._opened.by_key.get(piece.array)
                if record is None:
                    continue  # reported by the proof
                spec = record.spec
                try:
                    runs = runs_of(piece.box, shape=spec.shape, chunk_shape=record.chunk_shape, itemsize=spec.type.itemsize)
                except Malformed as error:
                    self._note(Malformed(f"fragment map of writer {columns.writer}: array {spec.id}: {error.message}"))
                    continue
                file = columns.files[piece.file].path
                found = (file, piece.offset, piece.nbytes, piece.row_nbytes, piece.row_stride)
                run = runs[0] if len(runs) == 1 else None
                if run is None or found != (
                    chunk_file(record.key, run.chunk),
                    run.offset,
                    run.nbytes,
                    run.row_nbytes,
                    run.row_stride,
                ):
                    self._note(
                        Malformed(
                            f"fragment map of writer {columns.writer}: piece {piece.box} of {piece.array} "
                            f"is not at its chunk's place: {found}"
                        )
                    )

    def _proof(self, records: Sequence[ArrayRecord], maps: Sequence[FragmentColumns]) -> None:
        try:
            proven = prove(records, maps)
            require_distinct_ranges(maps)
        except CheckpointError as error:
            self._note(error)
            return
        for record in proven:
            said = self._opened.records[record.spec.id]
            if said.writers != record.writers:
                self._note(
                    Malformed(f"index: array {record.spec.id}: writers {said.writers}, found {record.writers} in the maps")
                )

    def _documents(self) -> set[str]:
        """Every zarr document is byte for byte what the index says. [UCF-84]"""
        paths = set()
        for path, expected in documents(self._opened.parts):
            paths.add(path)
            try:
                found = self._opened.store.read(self._opened.path(path), MAX_MANIFEST_NBYTES)
            except Damaged as error:
                self._note(error)
                continue
            if found != expected:
                self._note(DocumentMismatch(f"{path}: differs from what the index says it is"))
        return paths

    def _strays(self, expected: Iterable[str]) -> None:
        """The tree holds nothing that is not named. [UCF-86]"""
        files = set(expected)
        folders = {""}
        for path in files:
            while path:
                path = path.rpartition("/")[0]
                folders.add(path)
        for folder in sorted(folders):
            try:
                held = self._opened.store.entries(self._opened.path(folder).rstrip("/"))
            except CheckpointError:
                continue  # the files that should be in it are reported as missing
            for entry in held:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if path not in (folders if entry.kind == "directory" else files):
                    self._note(StrayFile(f"{path}: a {entry.kind} that no record names"))

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _tasks(self, maps: Sequence[FragmentColumns]) -> list[_Task]:
        found: dict[str, tuple[int, list[tuple[StoredPiece, int]]]] = {}
        for columns in maps:
            for number in range(len(columns.pieces)):
                piece = columns.pieces.piece(number)
                file = columns.files[piece.file]
                found.setdefault(file.path, (file.nbytes, []))[1].append((piece, columns.block_nbytes))
        return [_Task(path, nbytes, tuple(pieces)) for path, (nbytes, pieces) in sorted(found.items())]

    def _file(self, task: _Task, total: int) -> Iterator[Problem]:
        try:
            reader = self._opened.store.open_reader(self._opened.path(task.path))
        except Damaged as error:
            arrays = sorted({piece.array for piece, _ in task.pieces})
            yield Problem(error.kind, f"{error.message}; it holds array {', '.join(arrays)}")
            return
        try:
            if reader.nbytes != task.nbytes:
                wrong = WrongLength(f"{task.path}: expected {task.nbytes} bytes (in the fragment map), found {reader.nbytes}")
                yield Problem(wrong.kind, wrong.message)
                return
            for piece, block_nbytes in task.pieces:
                yield from self._piece(task.path, reader, piece, block_nbytes)
                self._done += piece.nbytes
                self._progress(self._done, total)
            yield from self._pads(task, reader)
        finally:
            reader.close()

    def _piece(self, path: str, reader: RangeReader, piece: StoredPiece, block_nbytes: int) -> Iterator[Problem]:
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
                    yield Problem(
                        ChecksumMismatch.kind,
                        f"{path}: block {number} of piece {piece.box} of array {piece.array}: expected checksum "
                        f"{piece.checksums[number]:016x} (in the fragment map), found {found:016x}",
                    )

    def _pads(self, task: _Task, reader: RangeReader) -> Iterator[Problem]:
        """Bytes of an edge chunk that belong to no element read as zero. [UCF-85]"""
        used = _used_ranges(task)
        position = 0
        for start, stop in (*used, (task.nbytes, task.nbytes)):
            while position < start:
                data = np.empty(min(READ_NBYTES, start - position), dtype=np.uint8)
                reader.read_into(position, data.data)
                if data.any():
                    at = position + int(np.flatnonzero(data)[0])
                    yield Problem(
                        ChecksumMismatch.kind, f"{task.path}: byte {at} is padding, expected 0, found {data[at - position]}"
                    )
                    return
                position += data.size
            position = max(position, stop)


def _used_ranges(task: _Task) -> list[tuple[int, int]]:
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
