"""What a folder can do, tried there: the name of a file system does not say what is mounted by it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from dataclasses import dataclass

_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)  # what every other operation will say, too
PROBE = ".elastickpt-probe-"


@dataclass(frozen=True, slots=True)
class Probed:
    """no_replace_rename   a folder moves to a new name, and not onto a folder that holds something
    directory_sync      names can be made durable
    ranged_writes       bytes of a file can be written in any order
    """

    no_replace_rename: bool = True
    directory_sync: bool = True
    ranged_writes: bool = True


def probe(folder: str) -> Probed:
    """Tries it in a folder of its own below `folder`, of which nothing is left. Blocking.

    Where nothing can be made at all, everything is taken to be there: what is tried next says why it fails.
    """
    place = os.path.join(folder, f"{PROBE}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        os.mkdir(place)
    except OSError:
        return Probed()
    try:
        return Probed(_renames(place), _syncs(place), _takes_any_order(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _renames(place: str) -> bool:
    source, taken, free = (os.path.join(place, name) for name in ("source", "taken", "free"))
    try:
        for made in (source, taken):
            os.mkdir(made)
        with open(os.path.join(taken, "held"), "xb"):
            pass
    except OSError as error:
        return error.errno in _REFUSED
    try:
        os.rename(source, taken)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(source, free)
            return True
    return False


def _syncs(place: str) -> bool:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _takes_any_order(place: str) -> bool:
    file = os.path.join(place, "file")
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
    except OSError as error:
        return error.errno in _REFUSED
    try:
        os.ftruncate(descriptor, 3 * 4096)
        for offset, data in ((8192, b"c"), (0, b"a"), (4096, b"b")):
            os.pwrite(descriptor, data * 4096, offset)
        os.fsync(descriptor)
        return os.pread(descriptor, 3 * 4096, 0) == b"a" * 4096 + b"b" * 4096 + b"c" * 4096
    except OSError as error:
        return error.errno in _REFUSED
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
