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
import struct
import threading
from collections.abc import Sequence

from elastickpt.format.memory_views import address_of
from elastickpt.storage.kernel import DirectDescriptor

MOST = 32  # reads at once
_SETUP, _GET_EVENTS, _SUBMIT = range(3)
_CALLS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # the system calls' numbers; libc does not wrap them
_IOCB = struct.Struct("<QIiHhIQQqQII")  # data, key, flags, opcode (0 is a read), priority, descriptor, address, bytes, offset
_EVENT = struct.Struct("<QQqq")  # data, iocb, result, result2


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
        self._blocks, self._events = bytearray(MOST * _IOCB.size), bytearray(MOST * _EVENT.size)
        first, self._events_at = address_of(memoryview(self._blocks)), address_of(memoryview(self._events))
        self._pointers = (ctypes.c_void_p * MOST)(*range(first, first + len(self._blocks), _IOCB.size))
        self._under_way = 0
        self._process, self._idle = os.getpid(), True

    @property
    def usable(self) -> bool:
        """Not in a process that was forked off since, nor after an interrupt: what was under way then may still come."""
        return self._idle and self._process == os.getpid()

    def read(self, descriptor: int, reads: Sequence[tuple[int, int, int]]) -> list[int]:
        """Reads to an address so many bytes at an offset, for each of `reads`; how many came of each, or minus an error number.
        Blocking.

        Raises OSError where it cannot be known what came."""
        self._idle = False
        count = len(reads)
        for number, (address, nbytes, offset) in enumerate(reads):
            at = number * _IOCB.size
            _IOCB.pack_into(self._blocks, at, number, 0, 0, 0, 0, descriptor, address, nbytes, offset, 0, 0, 0)
        found = [-errno.EAGAIN] * count
        while self._under_way < count:
            rest = ctypes.byref(self._pointers, self._under_way * ctypes.sizeof(ctypes.c_void_p))
            try:
                taken = self._call(_SUBMIT, self._number, ctypes.c_long(count - self._under_way), rest)
            except OSError:
                break
            self._under_way += taken
            if not taken:
                break
        while self._under_way:
            least, events = ctypes.c_long(self._under_way), ctypes.c_void_p(self._events_at)
            ended = self._call(_GET_EVENTS, self._number, least, ctypes.c_long(MOST), events, None)
            self._under_way -= ended
            for number, _, came, _ in _EVENT.iter_unpack(memoryview(self._events)[: ended * _EVENT.size]):
                found[number] = came
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
    alignment, begin, at = direct.alignment, address_of(memory), 0
    reads: list[tuple[int, int, int]] = []
    wanted: list[tuple[int, int, int]] = []  # where the bytes of each begin and end in memory, and how many must come
    for offset, nbytes in ranges:
        shift = offset % alignment
        length = -(-(shift + nbytes) // alignment) * alignment
        reads.append((begin + at, length, offset - shift))
        wanted.append((at + shift, at + shift + nbytes, shift + nbytes))
        at += length
    if len(ranges) > MOST or at > memory.nbytes:
        return None
    try:
        context = _own_context()
    except OSError:
        return None
    came = context.read(direct.descriptor, reads)
    if any(got < least for got, (_, _, least) in zip(came, wanted, strict=True)):
        return None
    return [memory[start:stop] for start, stop, _ in wanted]
