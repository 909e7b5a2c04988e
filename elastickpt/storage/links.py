"""Symbolic links for people, on local stores; no reader of ours depends on one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat

from elastickpt.storage.opening import path_in
from elastickpt.storage.store import Store, naming

_TRIES = 20
_UNABLE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def link_target(store: Store, name: str) -> str | None:
    """What the link `name` in the store's root says; None where no link of this name is."""
    path = path_in(store, name)
    if "://" in path:
        return None
    try:
        return os.readlink(path)
    except OSError:
        return None


def replace_link(store: Store, name: str, target: str | None) -> bool:
    """The link `name` in the store's root says `target` from one moment to the next; None: there is no such link.

    Whether it is so: a store that has no links, and what stands there and is no link, stay as they are. Not synced. Of several
    at once the last one holds. Raises StorageFailed kinds.
    """
    path = path_in(store, name)
    if "://" in path:
        return False
    with naming("link", path):
        _remove_leftovers(os.path.dirname(path), name)
        try:
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                return False
            if os.readlink(path) == target:
                return True
        except FileNotFoundError:
            if target is None:
                return True
        if target is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return True
        return _replace(path, target)


def _replace(path: str, target: str) -> bool:
    directory, name = os.path.split(path)
    for _ in range(_TRIES):
        temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.tmp")
        try:
            os.symlink(target, temporary)
        except OSError as error:
            if error.errno in _UNABLE:
                return False
            raise
        with contextlib.suppress(FileNotFoundError):  # another one took it for a leftover
            os.rename(temporary, path)
            return True
    return False


def _remove_leftovers(directory: str, name: str) -> None:
    """Of those who were killed between the link and its name."""
    leftover = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for found in os.listdir(directory):
        path = os.path.join(directory, found)
        if leftover.fullmatch(found) and os.path.islink(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
