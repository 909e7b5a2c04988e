"""Staging arenas: shared memory that belongs to descriptors, not to names, so nothing is left when the last is closed.

A memfd is bound by no mount's size (containers give /dev/shm 64 MB). It is allocated and mapped page by page when it is made,
so that staging is a copy into warm memory, and sealed, so that no process can cut it short under another one.

Behind its memory stands its mark: how much of it is filled. It is written and read by system calls, so that whoever sees the
mark sees the bytes before it, on any processor. So a writer may read an arena that its trainer is still filling: it takes bytes
once they are there. [SAVE-102, SAVE-103]
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from elastickpt.errors import DeadlineExceeded, NoSpace, RankLost, Refused
from elastickpt.ranks.threads import lower
from elastickpt.storage.store import naming
from elastickpt.writer.plans import Slice
from elastickpt.writer.write_files import Bytes, Source, WatchBytes

_numbers = itertools.count()
_MARK = struct.Struct("<q")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """Memory that this process fills and a writer process reads. `memory`: shape=[nbytes], starts at a page."""

    def __init__(self, descriptor: int, mapping: mmap.mmap, nbytes: int) -> None:
        self.number = next(_numbers)
        self.nbytes = nbytes
        self.descriptor = descriptor
        self.lent = False  # a writer reads it
        self.retired = False
        self.abandoned = False  # whoever filled it is gone: what is not filled now never will be
        self._memory: Bytes | None = np.frombuffer(mapping, dtype=np.uint8, count=nbytes)
        self._let_go = weakref.finalize(self, os.close, descriptor)  # of one that nobody holds and nobody closed, too
        self._let_go.atexit = False  # the end of the process does it, and threads may still read it

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """An arena of this process, faulted in. Raises NoSpace where the memory cannot be had."""
        available = _available()
        if nbytes > available:
            raise NoSpace(f"arena of {nbytes} bytes: the host has memory for {available}")  # else it would end processes
        with naming("create", f"arena of {nbytes} bytes"):
            descriptor = os.memfd_create("elastickpt-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.posix_fallocate(descriptor, 0, _mark_of(nbytes) + _MARK.size)  # fails here, not at a touch
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
                mapping = mmap.mmap(descriptor, max(nbytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            except BaseException:
                os.close(descriptor)
                raise
        with suppress(OSError):
            mapping.madvise(mmap.MADV_DONTFORK)  # a data loader's fork neither copies its page tables nor keeps it alive
        return cls(descriptor, mapping, nbytes)

    @classmethod
    def attach(cls, descriptor: int, nbytes: int) -> Self:
        """The arena behind a descriptor from another process, to read; takes the descriptor."""
        with naming("map", f"arena of {nbytes} bytes"):
            try:
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                mapping = mmap.mmap(descriptor, max(nbytes, 1), flags=flags, prot=mmap.PROT_READ)
            except BaseException:
                os.close(descriptor)
                raise
        return cls(descriptor, mapping, nbytes)

    @property
    def memory(self) -> Bytes:
        if self._memory is None:
            raise ValueError("this arena is closed")
        return self._memory

    @property
    def filled(self) -> int:
        """Bytes from its beginning on that lie there as they are to be written: no reader may look at more. [SAVE-92]"""
        found: tuple[int] = _MARK.unpack(os.pread(self.descriptor, _MARK.size, _mark_of(self.nbytes)))
        return found[0]

    def fill_to(self, nbytes: int) -> None:
        """So many bytes lie there by now; they stay as they are until it is emptied."""
        os.pwrite(self.descriptor, _MARK.pack(nbytes), _mark_of(self.nbytes))

    def empty(self) -> None:
        """To be filled again. Raises Refused while a writer reads it."""
        self.require_free()
        self.fill_to(0)

    def require_free(self) -> None:
        """Raises Refused while a writer reads it, or may still read it."""
        if self.retired:
            raise Refused("this arena was retired: a writer that could not be reaped may still read it")
        if self.lent:
            raise Refused("this arena is still being written: wait for the result of its submission")

    def retire(self) -> None:
        """A writer that could not be reaped may still read it: never to be filled again."""
        self.retired = True

    def close(self) -> None:
        """Gives the memory up; it is freed when the last process, and the last view of `memory`, is gone."""
        self._memory = None
        self.descriptor = -1
        self._let_go()


def _mark_of(nbytes: int) -> int:
    """Where the mark of an arena stands: on a page of its own."""
    return -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE


def _available() -> int:
    """Bytes that can be had on this host without paging anything out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


LOOK_S = 0.001  # what is copied meanwhile is a part of a unit
GIVE_WAY = 10  # niceness of who writes while the trainer copies, which training waits for
STILL_S = 120.0  # a trainer that fills nothing for so long was stopped; its save must not keep the others for ever


class ArenaSource(Source):
    """A `write_files.Source`. `watch` ends a wait, too, by raising."""

    def __init__(self, arena: Arena, watch: WatchBytes, *, still_s: float = STILL_S) -> None:
        self._arena, self._watch, self._still_s = arena, watch, still_s
        self._filled = 0
        self._looking = threading.Lock()
        self._maker = threading.get_ident()
        self._of_thread = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes in place. Blocking until the trainer has copied them. Raises RankLost if it ended before,
        DeadlineExceeded if it stands still, and what `watch` raises."""
        first, end = at.offset + start - at.start, at.offset + stop - at.start
        if self._filled < end and self._arena.filled < end:
            self._give_way()
            self.wait_for(end)
        return self._arena.memory[first:end]

    def wait_for(self, end: int) -> None:
        """Until all before `end` is in place. Blocking likewise."""
        with self._looking:
            self._wait(end)

    def gather(self, slices: Sequence[Slice], places: Sequence[int], into: Bytes) -> None:
        """The same of many, at once where they lie in the arena as they are to lie. Blocking likewise."""
        first, last = slices[0], slices[-1]
        self.take(last, last.start, last.stop)
        memory, low, high = self._arena.memory, places[0], places[-1] + last.stop - last.start
        shift = first.offset - low
        alike = all(at.offset - place == shift for at, place in zip(slices, places, strict=True))
        if alike and sum(at.stop - at.start for at in slices) == high - low:
            into[low:high] = memory[shift + low : shift + high]
            return
        for at, place in zip(slices, places, strict=True):
            into[place : place + at.stop - at.start] = memory[at.offset : at.offset + at.stop - at.start]

    def _give_way(self) -> None:
        """Threads that write for this save alone leave the processor to the trainer; what is lowered cannot be raised again."""
        if threading.get_ident() != self._maker and not hasattr(self._of_thread, "gave_way"):
            self._of_thread.gave_way = True
            lower(GIVE_WAY, "normal")

    def _wait(self, end: int) -> None:
        since = time.monotonic()
        while self._filled < end:
            abandoned = self._arena.abandoned  # seen before what it had filled by then
            found = self._arena.filled
            if found > self._filled:
                self._filled, since = found, time.monotonic()
            elif abandoned:
                raise RankLost("the trainer ended before it had staged the rest")
            elif time.monotonic() - since > self._still_s:
                raise DeadlineExceeded(f"nothing was staged for {self._still_s:g} s: {found} bytes are, {end} are needed")
            else:
                self._watch(0)
                time.sleep(LOOK_S)
