"""Ranges of local files: whole writes and whole reads at an offset, through the page cache or past it."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from elastickpt.errors import CheckpointError, MissingFile, StorageFailed, Unsafe, WrongLength
from elastickpt.storage.kernel import (
    HUGE_PAGE,
    MIN_DIRECT_NBYTES,
    MIN_DIRECT_READ_NBYTES,
    DirectDescriptor,
    aligned_inside,
    cached_pages,
    huge_buffer,
    open_direct,
)
from elastickpt.storage.several_reads import read_several
from elastickpt.storage.store import naming, one_by_one

_TO_THE_END = 0  # as a number of bytes, for `cached_pages`
_LARGEST_CALL = 64 << 20  # bytes of one system call: a failing or killed writer stops within so much
_NOT_DIRECT = (
    errno.EINVAL,
    errno.EOPNOTSUPP,
)  # how file systems refuse O_DIRECT, or an alignment, only when written to


def as_bytes(view: memoryview) -> memoryview:
    """The same memory as one axis of bytes. The view must be C-contiguous."""
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`, however short the single writes are (`os` itself goes on after EINTR)."""
    done = 0
    while done < data.nbytes:
        wrote = os.pwrite(descriptor, data[done : done + _LARGEST_CALL], offset + done)
        if wrote == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += wrote


def demand_file(descriptor: int, path: str) -> int:
    """The size of the regular file behind `descriptor`. MissingFile for a directory, Unsafe for a device or pipe."""
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    if stat.S_ISDIR(found.st_mode):
        raise MissingFile(f"{path}: expected a file, found a directory")
    raise Unsafe(f"{path}: expected a file, found a device, pipe or socket")


class LocalWriter:
    """Fills ranges of one file.

    The big aligned inside of a range goes past the page cache, its edges through it: other writers may share the pages
    at the edges, never those inside. `sync` uses the descriptor opened before this writer's first write, as the kernel
    reports a failed write-back only to descriptors that were open then. `nbytes` None: the file is as long as what is written.
    """

    def __init__(self, path: str, nbytes: int | None, *, may_bypass_cache: bool) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._may_bypass_cache = may_bypass_cache
        self._direct: DirectDescriptor | None = None
        self._descriptor = -1
        self._sync_failure = ""
        with naming("open to write", path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                # Other writers of this file may be ahead: the size is set, never the content cut.
                if demand_file(self._descriptor, path) != nbytes and nbytes is not None:
                    os.ftruncate(self._descriptor, nbytes)
            except BaseException:
                self.close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        data = as_bytes(data)
        done = 0
        with naming("write", self._path):
            direct = self._direct_for(data)
            if direct is not None:
                start, stop = aligned_inside(offset, data, alignment=direct.alignment)
                write_whole(self._descriptor, data[:start], offset)
                done = self._write_direct(direct, offset, data[:stop], start)
            write_whole(self._descriptor, data[done:], offset + done)

    def sync(self) -> None:
        with self._lock:
            if self._sync_failure:
                raise StorageFailed(f"{self._sync_failure} (not tried again)")
            try:
                with naming("sync", self._path):
                    os.fdatasync(self._descriptor)
            except CheckpointError as error:
                # The kernel drops pages that it could not write: a second sync would succeed. [SAVE-2]
                self._sync_failure = error.message
                raise

    def close(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            direct, self._direct = self._direct, None
        with naming("close", self._path):
            try:
                if direct is not None:
                    os.close(direct.descriptor)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def __del__(self) -> None:
        """One that a failure left open keeps no descriptor."""
        with suppress(StorageFailed):
            self.close()

    def _direct_for(self, data: memoryview) -> DirectDescriptor | None:
        if data.nbytes < MIN_DIRECT_NBYTES or not self._may_bypass_cache:
            return None
        with self._lock:
            if self._direct is None:
                self._direct = open_direct(self._path, os.O_WRONLY, beside=self._descriptor)
                self._may_bypass_cache = self._direct is not None
            return self._direct

    def _write_direct(self, direct: DirectDescriptor, offset: int, data: memoryview, start: int) -> int:
        """Writes `data` from byte `start`; where it stopped: before the end if the kernel took less or refused."""
        while start < data.nbytes:
            try:
                wrote = os.pwrite(direct.descriptor, data[start : start + _LARGEST_CALL], offset + start)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self._may_bypass_cache = False
                return start
            start += wrote
            if wrote == 0 or wrote % direct.alignment:
                return start
        return start


class LocalReader:
    """Reads ranges of one file, through the page cache; with `may_bypass_cache` past it what it does not hold.

    1.8 GB on ext4 by two processes: as fast as the device both ways, with 0.65 s of CPU past the cache, 0.99 s through it,
    and more where the cache must drop other pages first.
    """

    def __init__(self, path: str, *, may_bypass_cache: bool = False) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._may_bypass_cache = may_bypass_cache
        self._cold = False  # whether the page cache holds nothing of it
        self._direct: DirectDescriptor | None = None
        self._descriptor = -1
        with naming("open to read", path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                self._nbytes = demand_file(self._descriptor, path)
            except BaseException:
                self.close()
                raise

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, into: memoryview) -> None:
        into = as_bytes(into)
        with naming("read", self._path):
            self._read_cached(offset, into, self._read_direct(offset, into))

    def lend(self, offset: int, into: memoryview) -> memoryview:
        """As `store.Lending` says: what comes past the page cache is in this thread's aligned memory until its next read."""
        into = as_bytes(into)
        with naming("read", self._path):
            if not self._may_bypass_cache and os.preadv(self._descriptor, (into,), offset) == into.nbytes:
                return into  # of a file in memory
            if into.nbytes > UNIT_NBYTES:
                self._read_cached(offset, into, self._read_direct(offset, into))
                return into
            direct = self._direct_for(offset, into.nbytes)
            if direct is not None and self._bounced(direct, offset, into.nbytes) == into.nbytes:
                shift = offset % direct.alignment
                return _bounce()[shift : shift + into.nbytes]
            self._read_cached(offset, into, 0)  # also what came short
        return into

    def fill_each(self, offset: int, groups: Sequence[Sequence[memoryview]], look: Callable[[memoryview], int]) -> list[int]:
        if self._may_bypass_cache:
            return one_by_one(self.read_into, offset, groups, look)
        found: list[int] = []
        with naming("read", self._path):  # once, as those of a file in memory are many and short
            for group in groups:
                offset = self._fill(offset, group)
                found += map(look, group)
        return found

    def fill(self, offset: int, parts: Sequence[memoryview]) -> bool:
        with naming("read", self._path):
            if self._direct_for(offset, sum(map(len, parts))) is not None:
                return False
            self._fill(offset, parts)
        return True

    def _fill(self, offset: int, parts: Sequence[memoryview]) -> int:
        """Fills views of bytes through the page cache, at one call unless it comes short; where they end in the file."""
        end = offset + sum(map(len, parts))
        if offset + os.preadv(self._descriptor, parts, offset) != end:
            for part in parts:
                self._read_cached(offset, part, 0)
                offset += len(part)
        return end

    def lend_several(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview] | None:
        first, last = ranges[0], ranges[-1]
        direct = self._direct_for(first[0], last[0] + last[1] - first[0])
        if direct is None:
            return None
        memory, _OF_THREAD.buffer = _bounce(), None  # which an interrupt leaves to the reads that are still under way
        with naming("read", self._path):
            lent = read_several(direct, ranges, memory)
        _OF_THREAD.buffer = memory
        return lent

    def close(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            direct, self._direct = self._direct, None
        if descriptor >= 0:
            with naming("close", self._path):
                os.close(descriptor)
        if direct is not None:
            with naming("close", self._path):
                os.close(direct.descriptor)

    def __del__(self) -> None:
        """One that a failure left open keeps no descriptor."""
        with suppress(StorageFailed):
            self.close()

    def _direct_for(self, offset: int, nbytes: int) -> DirectDescriptor | None:
        if nbytes < MIN_DIRECT_READ_NBYTES or self._nbytes < MIN_DIRECT_NBYTES or not self._may_bypass_cache:
            return None
        if not self._cold:
            if cached_pages(self._descriptor, offset, nbytes) != 0:
                return None
            self._cold = cached_pages(self._descriptor, 0, _TO_THE_END) == 0  # then the next reads need not ask
        with self._lock:
            if self._direct is None:
                self._direct = open_direct(self._path, os.O_RDONLY, beside=self._descriptor)
                self._may_bypass_cache = self._direct is not None
            return self._direct

    def _read_cached(self, offset: int, into: memoryview, done: int) -> None:
        """Fills `into` from its byte `done` on, through the page cache."""
        while done < into.nbytes:
            got = os.preadv(self._descriptor, [into[done:]], offset + done)
            if got == 0:
                found = os.fstat(self._descriptor).st_size
                raise WrongLength(f"{self._path}: expected at least {offset + into.nbytes} bytes, found {found}")
            done += got

    def _read_direct(self, offset: int, into: memoryview) -> int:
        """Fills `into` from its start past the page cache, through aligned memory; how many bytes, perhaps none.

        The page at either end is read whole, whoever wrote the rest of it.
        """
        direct = self._direct_for(offset, into.nbytes)
        if direct is None:
            return 0
        done = 0
        while done < into.nbytes:
            got = self._bounced(direct, offset + done, min(into.nbytes - done, UNIT_NBYTES))
            if got <= 0:
                return done
            shift = (offset + done) % direct.alignment
            into[done : done + got] = _bounce()[shift : shift + got]
            done += got
        return done

    def _bounced(self, direct: DirectDescriptor, offset: int, nbytes: int) -> int:
        """How many of at most a unit of bytes now stand in this thread's memory, from `offset` modulo the alignment on; none
        where the file system refuses."""
        shift = offset % direct.alignment
        length = -(-(shift + nbytes) // direct.alignment) * direct.alignment
        try:
            got = os.preadv(direct.descriptor, [_bounce()[:length]], offset - shift) - shift
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            self._may_bypass_cache = False
            return 0
        return min(got, nbytes)


UNIT_NBYTES = 1 << 20  # of one read past the page cache, wherever it begins in its first block of the device


class _Bounce(threading.local):
    buffer: memoryview | None = None


_OF_THREAD = _Bounce()


def _bounce() -> memoryview:
    """This thread's aligned memory, which lives as long as the thread: small, so that it stays in the core's cache, and on a
    huge page, as the kernel pins it page by page for each read."""
    if _OF_THREAD.buffer is None:
        _OF_THREAD.buffer = huge_buffer(HUGE_PAGE).data
    return _OF_THREAD.buffer
