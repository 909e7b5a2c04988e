"""What Linux offers and `os` does not: the type of a file system, syncfs, and the way past the page cache: memory that
O_DIRECT takes, and which part of a range it may have.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import signal
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from elastickpt.format.memory_views import address_of

PAGE = mmap.PAGESIZE

FILE_SYSTEMS = {
    0xEF53: "ext4",  # and ext2, ext3
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
}
# Where a folder is known to do what a save needs; elsewhere it is tried.
TRUSTED = frozenset({"ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "ramfs", "overlay", "ceph", "lustre", "gpfs"})
ONE_SIDED = frozenset({"nfs", "cifs", "smb", "9p", "fuse"})  # where a file that is filled from several sides may lose bytes
IN_MEMORY = frozenset({"tmpfs", "ramfs"})

_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_STATX_NBYTES = 256
_LONG = struct.Struct("l")
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x20000
_DIO_MEM_ALIGN, _DIO_OFFSET_ALIGN = 152, 156  # offsets in struct statx


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def file_system(path: str) -> str:
    """The name of the file system that holds `path`, or its type in hex ("0x1badface") for one not in the table."""
    buffer = ctypes.create_string_buffer(512)  # struct statfs is 120 bytes; its first word is the type
    while _libc().statfs(os.fsencode(path), buffer) != 0:
        if ctypes.get_errno() != errno.EINTR:  # `os` itself goes on after a signal, ctypes does not
            raise _failed()
    kind = ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF
    return FILE_SYSTEMS.get(kind, f"0x{kind:x}")


def sync_file_system(descriptor: int) -> None:
    """All of the file system behind `descriptor` is on the device. Raises OSError also for writes that failed since
    `descriptor` was opened, where the kernel tells (`syncfs_reports`); also when a signal interrupts it."""
    # not even then a second time: the first call may have taken the report of a failed write with it [SAVE-2]
    if _libc().syncfs(descriptor) != 0:
        raise _failed()


def spread_below(path: str) -> None:
    """Asks ext4 to put the folders made in `path` into other block groups than its own; a hint, which may do nothing.

    ext4 does not hand out an inode again for up to 305 s after its deletion, and looks at every such inode of the group
    before it takes another one. Where old checkpoints are deleted while new ones are written, a file costs 300-700 us of
    CPU to create in the folders' own group, and 20-80 us in another one.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            (flags,) = _LONG.unpack(fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(_LONG.size)))
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, _LONG.pack(flags | _FS_TOPDIR_FL))
        finally:
            os.close(descriptor)


_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """This process is killed when the thread that started it ends. Afterwards look whether it still lives: `os.getppid`."""
    if _libc().prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) != 0:
        raise _failed()


_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def make_spread(path: str) -> bool:
    """Makes a folder in one that `spread_below` was asked for, wherever chance puts it. False where it must be made as usual.

    ext4 chooses the block group by the folder's name as it is made: folders of one name, as every checkpoint has them, would
    all come to stand among the deleted ones of those before. So it is made by a name of its own and renamed. Left behind
    after a crash between the two is an empty folder. Raises OSError.
    """
    rename = getattr(_libc(), "renameat2", None)
    if rename is None:
        return False
    made = f"{path}.{secrets.token_hex(4)}"
    os.mkdir(made)
    if rename(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) != 0:
        os.rmdir(made)
        return False
    return True


_CACHESTAT = 451  # the same number everywhere but on alpha
_RANGE, _CACHED = ctypes.c_uint64 * 2, ctypes.c_uint64 * 5


def cached_pages(descriptor: int, offset: int, nbytes: int) -> int | None:
    """How many pages of a range of the file the page cache holds; None where the kernel does not say (before 6.5)."""
    found = _CACHED()
    if _libc().syscall(_CACHESTAT, descriptor, ctypes.byref(_RANGE(offset, nbytes)), ctypes.byref(found), 0) != 0:
        return None
    return int(found[0])


@cache
def syncfs_reports() -> bool:
    """Whether syncfs reports failed write-back: since Linux 5.8."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= (5, 8)


def direct_alignment(descriptor: int) -> int:
    """What O_DIRECT aligns memory, offset and length to here, in bytes: at least a page; 0 if it is refused.

    A page is also the answer of kernels that do not say (before 6.1); there the first direct write may still fail.
    """
    statx = getattr(_libc(), "statx", None)
    if statx is None:
        return PAGE
    buffer = ctypes.create_string_buffer(_STATX_NBYTES)
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return PAGE
    if not ctypes.c_uint32.from_buffer(buffer).value & _STATX_DIOALIGN:
        return PAGE
    wanted = [ctypes.c_uint32.from_buffer(buffer, at).value for at in (_DIO_MEM_ALIGN, _DIO_OFFSET_ALIGN)]
    return max(PAGE, *wanted) if all(wanted) else 0


MIN_DIRECT_NBYTES = 1 << 20  # below this the edges and the extra call cost more than the copy into the page cache
MIN_DIRECT_READ_NBYTES = 64 << 10  # of one read in a file of MIN_DIRECT_NBYTES; small files are read ahead whole


def aligned_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """shape=[nbytes]: zeroed memory that starts at a page and is faulted in; freed with its last view (`.data`)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1), flags=flags), dtype=np.uint8, count=nbytes)


HUGE_PAGE = 2 << 20


def huge_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """shape=[nbytes]: zeroed memory that starts at a huge page's boundary, and is on huge pages where the system has them."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -address_of(whole.data) % HUGE_PAGE
    return whole[start : start + nbytes]


def aligned_inside(offset: int, view: memoryview, *, alignment: int) -> tuple[int, int]:
    """The part [start, stop) of `view`, in bytes, that O_DIRECT may move to or from `offset + start`; (0, 0) for none.

    There is one only if the view's address and `offset` are equal modulo `alignment`: memory and file are then aligned
    at the same bytes. One shorter than MIN_DIRECT_NBYTES is left alone.
    """
    if (address_of(view) - offset) % alignment:
        return 0, 0
    start = -offset % alignment
    stop = (offset + view.nbytes) // alignment * alignment - offset
    return (start, stop) if stop - start >= MIN_DIRECT_NBYTES else (0, 0)


@dataclass(frozen=True, slots=True)
class DirectDescriptor:
    """A second descriptor of a file that is open already, past the page cache."""

    descriptor: int
    alignment: int


def open_direct(path: str, flags: int, *, beside: int) -> DirectDescriptor | None:
    """A direct descriptor of the file behind `beside`, or None where this file or file system has none.

    Also None when `path` is another file by now (the draft was renamed): going on through `beside` is always right.
    """
    alignment = direct_alignment(beside)
    if not alignment:
        return None
    try:
        descriptor = os.open(path, flags | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if os.path.sameopenfile(descriptor, beside):
        return DirectDescriptor(descriptor, alignment)
    os.close(descriptor)
    return None
