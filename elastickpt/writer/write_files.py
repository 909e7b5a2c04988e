"""Carries out write plans: bytes from a source into chunk files, hashed on the way, then made durable.

The work is cut into units of at most `UNIT_NBYTES` of one slice. A few threads take units in order, so that one takes its bytes
and hashes them while another's write is under way; so several files are in flight. Memory: what the source needs for a unit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import CheckpointError, MissingFile
from elastickpt.format.digest import whole_checksums
from elastickpt.layout.grid import ByteRun
from elastickpt.ranks.threads import Pool
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES
from elastickpt.storage.store import Durability, RangeWriter, Store
from elastickpt.writer.plans import BLOCK_NBYTES, HASHED_NBYTES, Document, PlannedFile, Slice, WritePlan, blocks_of

UNIT_NBYTES = 8 << 20
THREADS = 3
IN_MEMORY_NBYTES = 128 << 20  # bytes per thread where nothing waits for a device: copying them outweighs a thread's start
# Making files costs CPU and writing bytes waits for the device: from here on the two are done side by side. 1 GB in 333 arrays
# on ext4: 0.95 s one after the other, 0.63 s side by side.
SIDE_BY_SIDE_NBYTES = 8 << 20
SYNC_TREE_FILES = 64  # beyond this many files one syncfs is cheaper than an fsync each (0.9 ms a file, 0.02 ms with syncfs)

Bytes = NDArray[np.uint8]
Checksums = NDArray[np.uint64]
Sync = Literal["none", "file", "tree"]
WatchBytes = Callable[[int], None]


class Source(Protocol):
    """Where the bytes of slices come from. Safe from several threads; what one thread took is its own until it takes more."""

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the slice's piece, in C order of the piece; at most `UNIT_NBYTES`."""

    def gather(self, slices: Sequence[Slice], places: Sequence[int], into: Bytes) -> None:
        """Copies whole slices, each to its place in `into`, in their order."""
        for at, place in zip(slices, places, strict=True):
            into[place : place + at.stop - at.start] = self.take(at, at.start, at.stop)


@dataclass(frozen=True, slots=True)
class WrittenFolder:
    """A folder of a store, and how what is written there is made durable. `watch` is told of bytes as they are written, and
    ends the work by raising."""

    store: Store
    folder: str
    sync: Sync
    watch: WatchBytes

    def path(self, relative: str) -> str:
        return f"{self.folder}/{relative}"


def unwatched(nbytes: int) -> None:
    """Nobody wants to know."""


def sync_for(store: Store, files: int, *, durability: Durability) -> Sync:
    """How so many files are made durable in that store at the least cost."""
    if durability == "process":
        return "none"
    return "tree" if store.capabilities.tree_sync and files > SYNC_TREE_FILES else "file"


def write_portion(
    target: WrittenFolder,
    plan: WritePlan,
    documents: Sequence[Document],
    slices: Sequence[Slice],
    source: Source,
    *,
    block_nbytes: int,
    create: Callable[[str, bytes], None],
) -> Checksums:
    """Writes the slices and makes the documents, by `create`, with all folders; returns the checksums of the slices' blocks, in
    order. Blocking. Raises as `write_slices`, and what `create` raises; what is durable on return is said there.
    """

    def make_rest() -> None:
        make_folders(target, plan)
        for document in documents:
            create(target.path(document.path), document.content)

    if sum(at.stop - at.start for at in slices) < SIDE_BY_SIDE_NBYTES:
        make_rest()
        return write_slices(target, plan.files, slices, source, block_nbytes=block_nbytes)

    def make_rest_beside() -> None:
        make_rest()
        if target.sync == "tree":  # names reach the device while bytes are written, and the last sync finds less to do
            target.store.sync_tree()

    with Pool("elastickpt-documents", 1) as side:
        made = side.begin(make_rest_beside)
        checksums = write_slices(target, plan.files, slices, source, block_nbytes=block_nbytes)
        made.result()
    return checksums


def make_folders(target: WrittenFolder, plan: WritePlan) -> None:
    """All folders that the plan's files and documents stand in."""
    needed = {file.path.rpartition("/")[0] for file in plan.files}
    needed.update(plan.keys[document.array] for document in plan.documents)
    for path in sorted(needed):
        target.store.make_directories(target.path(path))


def make_durable(target: WrittenFolder, plan: WritePlan, documents: Sequence[Document]) -> None:
    """Documents and all names are durable, as `target.sync` says; files' contents are already, but for "tree"."""
    if target.sync == "tree":
        target.store.sync_tree()
    elif target.sync == "file":
        for document in documents:
            target.store.sync_file(target.path(document.path))
        for directory in directories_of([*(d.path for d in documents), *(file.path for file in plan.files)]):
            target.store.sync_directory(target.path(directory))


def directories_of(paths: Sequence[str]) -> tuple[str, ...]:
    """Every directory on the way to these files, deepest first, without the root."""
    found: set[str] = set()
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent and parent not in found:
            found.add(parent)
            parent = parent.rpartition("/")[0]
    return tuple(sorted(found, key=lambda path: (-path.count("/"), path)))


def copy_hashed(data: Bytes, into: Bytes, block_nbytes: int) -> list[int]:
    """Copies bytes; returns the checksums of their blocks."""
    checksums: list[int] = []
    for start in range(0, data.size, HASHED_NBYTES):
        part = into[start : start + HASHED_NBYTES]
        np.copyto(part, data[start : start + HASHED_NBYTES])
        checksums += whole_checksums(part.data, block_nbytes)
    return checksums


def write_hashed(writer: RangeWriter, offset: int, data: Bytes, block_nbytes: int) -> list[int]:
    """Writes bytes through the page cache; returns the checksums of their blocks."""
    checksums: list[int] = []
    for start in range(0, data.size, HASHED_NBYTES):
        part = data[start : start + HASHED_NBYTES].data
        writer.write(offset + start, part)
        checksums += whole_checksums(part, block_nbytes)
    return checksums


# -- bytes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unit:
    """Bytes [start, stop) of the piece of a slice; `start` is a multiple of the block size. `block` counts all blocks."""

    at: Slice
    start: int
    stop: int
    block: int


class _Open:
    """One file on its way: opened by its first unit, synced and closed by its last."""

    def __init__(self, open_file: Callable[[], RangeWriter], *, sync: bool) -> None:
        self._open = open_file
        self._lock = threading.Lock()
        self._sync = sync
        self._writer: RangeWriter | None = None
        self.left = 0

    def writer(self) -> RangeWriter:
        with self._lock:
            if self._writer is None:
                self._writer = self._open()
            return self._writer

    def done(self) -> None:
        with self._lock:
            self.left -= 1
            last = self.left == 0
        if last and self._writer is not None:
            if self._sync:
                self._writer.sync()
            self._writer.close()

    def abandon(self) -> None:
        """Gives up the file after an error, which nothing that closing reports may hide."""
        if self._writer is not None:
            with suppress(CheckpointError):
                self._writer.close()


def write_slices(
    target: WrittenFolder,
    files: Sequence[PlannedFile],
    slices: Sequence[Slice],
    source: Source,
    *,
    block_nbytes: int = BLOCK_NBYTES,
) -> Checksums:
    """Writes the slices; returns the checksums of their blocks, in order. Blocking.

    With `target.sync` "file" every file is durable on return, through the descriptor that wrote it. Raises StorageFailed kinds;
    files may then hold anything, and nothing that failed to sync is synced again.
    """
    units = list(_units(slices, block_nbytes))
    opened: dict[int, _Open] = {}
    for unit in units:
        if (number := unit.at.file) not in opened:
            opened[number] = _Open(_opener(target, files[number]), sync=target.sync == "file")
        opened[number].left += 1
    checksums = np.empty(sum(blocks_of(at.stop - at.start, block_nbytes) for at in slices), dtype=np.uint64)

    past_cache = target.store.capabilities.past_cache

    def carry_out(unit: _Unit) -> None:
        writer, run = opened[unit.at.file].writer(), files[unit.at.file].pieces[unit.at.piece].run
        data = source.take(unit.at, unit.start, unit.stop)
        if run.in_a_row and not (past_cache and data.size >= MIN_DIRECT_NBYTES):
            found = write_hashed(writer, run.offset + unit.start, data, block_nbytes)
        else:
            found = whole_checksums(data.data, block_nbytes)
            _write_unit(writer, run, unit, data)
        checksums[unit.block : unit.block + len(found)] = found
        opened[unit.at.file].done()
        target.watch(data.size)

    try:
        with Pool("elastickpt-write", _threads_for(target, slices)) as pool:
            pool.share_out(units, carry_out)
    except BaseException:
        for file in opened.values():
            file.abandon()
        raise
    return checksums


def _opener(target: WrittenFolder, file: PlannedFile) -> Callable[[], RangeWriter]:
    path = target.path(file.path)

    def open_file() -> RangeWriter:
        try:
            return target.store.open_writer(path, file.nbytes)
        except MissingFile:  # its folder is still to be made, by whoever needs it first
            target.store.make_directories(path.rpartition("/")[0])
            return target.store.open_writer(path, file.nbytes)

    return open_file


def _units(slices: Sequence[Slice], block_nbytes: int) -> Iterator[_Unit]:
    block = 0
    for at in slices:
        for start in range(at.start, at.stop, UNIT_NBYTES):
            stop = min(start + UNIT_NBYTES, at.stop)
            yield _Unit(at, start, stop, block)
            block += blocks_of(stop - start, block_nbytes)


def _threads_for(target: WrittenFolder, slices: Sequence[Slice]) -> int:
    """1.8 GB of 2 ranks on 2 cores into tmpfs takes as long with one thread as with three; 0.1 GB 79 ms with one, 92 with 3."""
    if target.store.capabilities.past_cache:
        return THREADS
    return min(THREADS, 1 + sum(at.stop - at.start for at in slices) // IN_MEMORY_NBYTES)


def _write_unit(writer: RangeWriter, run: ByteRun, unit: _Unit, data: Bytes) -> None:
    if run.in_a_row:
        writer.write(run.offset + unit.start, data.data)
        return
    position = unit.start
    while position < unit.stop:  # each row lies `row_stride` after the one before; a unit may begin and end inside a row
        row, inside = divmod(position, run.row_nbytes)
        stop = min((row + 1) * run.row_nbytes, unit.stop)
        piece_bytes = data[position - unit.start : stop - unit.start]
        writer.write(run.offset + row * run.row_stride + inside, piece_bytes.data)
        position = stop
