"""Several reads of one file past the page cache, handed to the kernel at once.

A read of its own puts its thread to sleep and, on a virtual machine, rings at the host: 120 reads by each of four ranks
took 16.1 ms of CPU a rank, and about as many bytes in 27 reads 11.6. Linux's older asynchronous calls (io_submit(2)) are
asked, as many containers forbid io_uring. What refuses them is read one after the other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickpt.format.memory_views import address_of
from elastickpt.format.piece_columns import starts
from elastickpt.format.strict_reading import IntColumn
from elastickpt.storage.kernel import DirectDescriptor

MOST = 32  # reads at once
_SETUP, _GET_EVENTS, _SUBMIT = range(3)
_CALLS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # the system calls' numbers; libc does not wrap them
_IOCB = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("opcode", "<u2"),  # 0 is a read
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("address", "<u8"),
        ("nbytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("result2", "<i8")])


class _Context:
    """A context of the kernel's for reads under way. Of one thread at a time, and of the process that made it.

    Raises OSError where the system has none, or no more of them.
    """

    def __init__(self) -> None:
        calls = _CALLS.get(platform.machine())
        if calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._calls, self._libc = calls, ctypes.CDLL(None, use_errno=True)
        self._number = ctypes.c_ulong(0)
        self._call(_SETUP, ctypes.c_uint(MOST), ctypes.byref(self._number))
        self._blocks, self._events = np.zeros(MOST, _IOCB), np.zeros(MOST, _EVENT)
        self._blocks["data"] = np.arange(MOST)
        self._pointers = _address(self._blocks) + np.arange(MOST, dtype=np.uint64) * np.uint64(_IOCB.itemsize)
        self._under_way = 0
        self._process, self._idle = os.getpid(), True

    @property
    def usable(self) -> bool:
        """Not in a process that was forked off since, nor after an interrupt: what was under way then may still come."""
        return self._idle and self._process == os.getpid()

    def read(self, descriptor: int, addresses: IntColumn, nbytes: IntColumn, offsets: IntColumn) -> list[int]:
        """Reads `nbytes[k]` bytes at `offsets[k]` to `addresses[k]`; how many came of each, or minus an error number. Blocking.

        Raises OSError where it cannot be known what came."""
        self._idle = False
        count = len(addresses)
        blocks = self._blocks[:count]
        blocks["descriptor"], blocks["address"], blocks["nbytes"], blocks["offset"] = descriptor, addresses, nbytes, offsets
        found = [-errno.EAGAIN] * count
        while self._under_way < count:
            rest = ctypes.c_void_p(_address(self._pointers[self._under_way :]))
            try:
                taken = self._call(_SUBMIT, self._number, ctypes.c_long(count - self._under_way), rest)
            except OSError:
                break
            self._under_way += taken
            if not taken:
                break
        while self._under_way:
            least, events = ctypes.c_long(self._under_way), ctypes.c_void_p(_address(self._events))
            ended = self._call(_GET_EVENTS, self._number, least, ctypes.c_long(MOST), events, None)
            self._under_way -= ended
            for read, _, came, _ in self._events[:ended].tolist():
                found[read] = came
        self._idle = True
        return found

    def _call(self, which: int, *arguments: object) -> int:
        while (found := int(self._libc.syscall(self._calls[which], *arguments))) < 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return found


class _Held:
    """A thread's context, which another thread takes over when this one has ended: to make one takes longer than its reads."""

    def __init__(self, context: _Context) -> None:
        self.context = context

    def __del__(self) -> None:
        if self.context.usable:
            _FREE.append(self.context)


_OF_THREAD = threading.local()
_FREE: list[_Context] = []
os.register_at_fork(after_in_child=_FREE.clear)


def _own_context() -> _Context:
    """The calling thread's. Raises OSError."""
    held: _Held | None = getattr(_OF_THREAD, "held", None)
    if held is None or not held.context.usable:
        try:
            held = _Held(_FREE.pop())
        except IndexError:
            held = _Held(_Context())
        _OF_THREAD.held = held
    return held.context


def read_several(direct: DirectDescriptor, ranges: Sequence[tuple[int, int]], memory: memoryview) -> list[memoryview] | None:
    """What a file holds in each of these ranges, (offset, number of bytes), in parts of `memory`, which begins at a page.

    None where not all of it came or fits, for whatever reason: who reads each by itself learns why. Blocking. After an
    interrupt, and where it raises OSError, as the kernel does not say what came, the memory may still be filled: give it up.
    """
    offset, nbytes = np.array(ranges, dtype=np.int64).T
    shift = offset % direct.alignment
    length = -(-(shift + nbytes) // direct.alignment) * direct.alignment
    place = starts(length)
    if len(ranges) > MOST or place[-1] > memory.nbytes:
        return None
    first = place[:-1] + shift
    last = first + nbytes
    try:
        context = _own_context()
    except OSError:
        return None
    came = context.read(direct.descriptor, address_of(memory) + place[:-1], length, offset - shift)
    if any(came < shift + nbytes):
        return None
    return [memory[start:stop] for start, stop in zip(first.tolist(), last.tolist(), strict=True)]


def _address(column: NDArray[Any]) -> int:
    return int(column.__array_interface__["data"][0])
