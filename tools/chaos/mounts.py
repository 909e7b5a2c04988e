"""Loop devices and mounts, and why this machine cannot have them. Whoever mounts here unmounts before it goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_DETACH = 2
_TORN = (errno.EBADMSG, errno.EUCLEAN)
_UNREPAIRED = 4 | 8  # of e2fsck's exit status
_BLOCK_NBYTES = 4096
_GROUP_BLOCKS = 2048  # so that a small disk, too, has a second superblock
MKFS = (
    *("-q", "-F", "-b", str(_BLOCK_NBYTES), "-g", str(_GROUP_BLOCKS)),
    *("-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),  # nothing of it is written later
)
SCRATCH = "elastickpt-chaos-"  # what names of folders begin with in which there are mounts
_NEW_NAMESPACE, _PRIVATE = 0x20000, 1 << 18 | 1 << 14
_PR_SET_PDEATHSIG = 1


class CannotMount(Exception):
    """A file system that the kernel refuses: for a replayed image a finding."""


def lacking() -> str | None:
    """Why power cuts cannot be replayed here, or None."""
    if os.geteuid() != 0:
        return "not root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(device, os.R_OK | os.W_OK):
            return f"no {device}"
    for tool in ("mkfs.ext4", "e2fsck", "losetup"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    return _refused()


def private_mounts() -> None:
    """From now on what this process and those below it mount is theirs, and goes with the last of them, however that ends.

    Raises OSError where the kernel refuses it.
    """
    if _LIBC.unshare(_NEW_NAMESPACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "mount namespace")
    mount("none", Path("/"), "", flags=_PRIVATE)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        target = line.split()[1]
        if SCRATCH in target:  # of another one that runs now: its own unmounting must be the last
            unmount(Path(target), _DETACH)


def end_with_parent() -> None:
    """This process is killed when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def mount(source: str, target: Path, kind: str, options: str = "", flags: int = 0) -> None:
    """mount(2). Raises OSError."""
    if _LIBC.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def unmount(target: Path, flags: int = 0) -> None:
    """umount(2): waits until what was written is on the device. Raises OSError."""
    if _LIBC.umount2(os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def unmount_when_free(target: Path, *, limit_s: float = 10.0) -> None:
    """The same, once a loop device that was detached has let go of it, which the kernel does a little later. Raises OSError."""
    until = time.monotonic() + limit_s
    while True:
        try:
            return unmount(target)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(0.05)


def make_file_system(device: Path) -> None:
    """An empty ext4 with a journal on the whole of `device`, a file or a block device."""
    subprocess.run(["mkfs.ext4", *MKFS, str(device)], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    """`folder` is the ext4 in `image`, through a loop device that goes with the mount; its journal is replayed.

    A file system whose superblock was torn is repaired first, as whoever starts that machine would. Raises CannotMount where
    the kernel refuses it all the same.
    """
    device = _attach(image)
    try:
        try:
            mount(device, folder, "ext4")
        except OSError as error:
            if error.errno not in _TORN:
                raise
            _repair(device)
            mount(device, folder, "ext4")
    except OSError as error:
        raise CannotMount(f"{image.name}: {error.strerror}") from error
    finally:
        subprocess.run(["losetup", "-d", device], check=True)  # the kernel keeps it while it is mounted
    try:
        yield
    finally:
        try:
            unmount(folder)
        except OSError:
            unmount(folder, _DETACH)  # somebody stands in it: it goes when they do


def _repair(device: str) -> None:
    """By the second superblock where the first one's checksum, in the second of its sectors, is another one's. That one says
    nothing of a journal to be replayed; e2fsck looks, and replays it."""
    second = ("-b", str(_GROUP_BLOCKS), "-B", str(_BLOCK_NBYTES))
    for superblock in ((), second):
        done = subprocess.run(["e2fsck", "-f", "-y", *superblock, device], check=False, capture_output=True)
        if done.returncode & _UNREPAIRED == 0:
            return


def _attach(image: Path) -> str:
    found = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def _refused() -> str | None:
    """Whether loop devices can be had: in containers the nodes exist and the kernel still says no."""
    try:
        subprocess.run(["losetup", "-f"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"no loop device: {error.stderr.strip()}"
    return None
