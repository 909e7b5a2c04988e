"""A file on which a loop device can stand, and whose every write and flush is logged in order: a disk under observation.

It is the root of a FUSE mount, answered by a process of its own, which keeps the content in memory: no kernel module, no
package. A loop device passes on what a file system asks of its disk: a flush arrives as FSYNC, and a FUA write as a write and
a flush behind it, as for every disk with a volatile cache and no FUA. Needs root and `/dev/fuse`.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from .blocklog import flush_record, write_record
from .mounts import end_with_parent, mount, unmount_when_free

MAX_WRITE = 128 << 10
_BUFFER_NBYTES = MAX_WRITE + 8192
_REQUEST = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
_ANSWER = struct.Struct("<IiQ")  # length, -errno, unique
_RANGE = struct.Struct("<QQIIQII")  # handle, offset, size, ...: of READ and WRITE
_INITED = struct.Struct("<IIIIHHIIHHI28x")  # major, minor, readahead, flags, background, congestion, max_write, ...
_OPENED = struct.Struct("<QII")  # handle, flags, padding
_WRITTEN = struct.Struct("<II")
_ATTRIBUTES = struct.Struct("<QII6Q10I")  # valid s, valid ns, padding; ino, size, blocks, times; ns, mode, links, ...
_BIG_WRITES, _DIRECT_IO = 1 << 5, 1 << 0
_REGULAR = 0o100000


class Opcode(IntEnum):
    """What is answered, of the kernel's requests; everything else is not implemented, which it takes as an answer."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25  # a close, not a disk's flush
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_UNANSWERED = frozenset({Opcode.FORGET, Opcode.INTERRUPT, Opcode.BATCH_FORGET})


@contextmanager
def logged_file(path: Path, log: Path, nbytes: int) -> Iterator[None]:
    """While it is open, `path`, an existing file, is one of `nbytes` zeros, and what is written to it is appended to `log`.

    Raises OSError where the machine does not let this process mount.
    """
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    try:
        mount("chaos", path, "fuse", f"fd={descriptor},rootmode={_REGULAR:o},user_id=0,group_id=0")
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({descriptor}, {str(log)!r}, {nbytes})"
        )
        server = subprocess.Popen([sys.executable, "-c", code], pass_fds=[descriptor], stdin=subprocess.DEVNULL)
    finally:
        os.close(descriptor)
    try:
        yield
    finally:
        unmount_when_free(path)
        server.wait(timeout=30)


def serve(descriptor: int, log: str, nbytes: int) -> None:
    """Answers the kernel until the mount ends. What is logged is in the log before it is answered."""
    end_with_parent()
    content = bytearray(nbytes)
    log_descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        try:
            request = os.read(descriptor, _BUFFER_NBYTES)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.ENOENT, errno.EINTR):  # an interrupted request
                continue
            raise
        _, opcode, unique, *_ = _REQUEST.unpack_from(request)
        if opcode in _UNANSWERED:
            continue
        answer = _answer(opcode, memoryview(request)[_REQUEST.size :], content, log_descriptor)
        failed, body = (-answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(descriptor, _ANSWER.pack(_ANSWER.size + len(body), failed, unique) + body)
        if opcode == Opcode.DESTROY:
            return


def _answer(opcode: int, body: memoryview, content: bytearray, log: int) -> bytes | int:
    """The answer's body, or an errno."""
    match opcode:
        case Opcode.INIT:
            _, _, readahead, *_ = struct.unpack_from("<4I", body)
            return _INITED.pack(7, 31, readahead, _BIG_WRITES, 12, 9, MAX_WRITE, 1, 0, 0, 0)
        case Opcode.GETATTR | Opcode.SETATTR:
            return _ATTRIBUTES.pack(3600, 0, 0, 1, len(content), len(content) // 512, *[0] * 6, _REGULAR | 0o600, 1, *[0] * 5)
        case Opcode.OPEN:
            return _OPENED.pack(0, _DIRECT_IO, 0)
        case Opcode.READ:
            _, offset, size, *_ = _RANGE.unpack_from(body)
            return bytes(content[offset : offset + size])
        case Opcode.WRITE:
            _, offset, size, *_ = _RANGE.unpack_from(body)
            data = body[_RANGE.size : _RANGE.size + size]
            content[offset : offset + size] = data
            os.write(log, write_record(offset, data))
            return _WRITTEN.pack(size, 0)
        case Opcode.FSYNC:
            os.write(log, flush_record())
            return b""
        case Opcode.RELEASE | Opcode.FLUSH | Opcode.DESTROY:
            return b""
        case _:
            return errno.ENOSYS
