"""The local file system, and whatever is mounted into it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import weakref
from functools import cached_property
from pathlib import Path

from elastickpt.errors import CapabilityMissing, LimitExceeded, MissingFile, PathOccupied
from elastickpt.storage.kernel import (
    IN_MEMORY,
    TRUSTED,
    file_system,
    make_spread,
    spread_below,
    sync_file_system,
    syncfs_reports,
)
from elastickpt.storage.probes import Probed, probe
from elastickpt.storage.ranges import LocalReader, LocalWriter, demand_file, write_whole
from elastickpt.storage.store import Caching, Capabilities, Entry, EntryKind, ancestors_of, checked, checked_directory, naming

_SHARED_BY_HOSTS = frozenset({"lustre", "gpfs"})  # coherent for disjoint byte ranges; NFS and FUSE are not
_TREE_SYNC = frozenset({"ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs"})  # where syncfs reports failed write-back
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class LocalStore:
    """A directory as a store. The directory must exist: MissingFile else."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.fspath(root))
        self._prefix = self._root.rstrip("/") + "/"
        with naming("open", self._root):
            self._file_system = file_system(self._root)
            if not os.path.isdir(self._root):
                raise MissingFile(f"{self._root}: expected a directory, found a file")
        self._opening = threading.Lock()
        self._spread = ""  # the top folder that this object made last: there it makes folders wherever chance puts them
        self._anchor_of = (0, -1)  # (process id, descriptor of the root opened by it)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What this folder can do: where the file system's name does not tell, it is tried, by the first who asks. Reading asks
        nobody. Raises StorageFailed kinds."""
        with naming("open", self._root):
            found = Probed() if self._file_system in TRUSTED else probe(self._root)
        return Capabilities(
            exclusive_create=True,
            no_replace_rename=found.no_replace_rename,
            directory_sync=found.directory_sync,
            tree_sync=self._file_system in _TREE_SYNC and syncfs_reports(),
            conditional_put=False,
            ranged_writes=found.ranged_writes,
            sequential_only=not found.ranged_writes,
            shared_by_hosts=self._file_system in _SHARED_BY_HOSTS,
            past_cache=self._file_system not in IN_MEMORY and found.ranged_writes,
            directories=True,
            name=self._file_system,
        )

    @property
    def in_memory(self) -> bool:
        """Whether its files lie in memory, as the file system's name says: a reader asks, so nothing is tried."""
        return self._file_system in IN_MEMORY

    @property
    def url(self) -> str:
        return Path(self._root).as_uri()

    def __repr__(self) -> str:
        return f"LocalStore({self._root!r})"

    def make_directories(self, path: str) -> None:
        first, *below = ancestors_of(checked(path))
        self._anchor()
        full, top = self._prefix + path, self._prefix + first
        with naming("make directory", full):
            if not below:
                made = _make_directory(top)
                if made and self._file_system == "ext4":
                    spread_below(top)
                    self._spread = first
            elif len(below) == 1 and first == self._spread and not os.path.lexists(full) and make_spread(full):
                pass
            elif not _made_below(full):
                if not _is_directory(top):
                    cls, found = (PathOccupied, "no directory") if os.path.lexists(top) else (MissingFile, "not there")
                    raise cls(f"make directory {full}: {top} is {found}")
                for component in below:
                    _make_directory(self._prefix + component)

    def create(self, path: str, data: bytes) -> None:
        full = self._full(path)
        self._anchor()
        with naming("create", full):
            descriptor = os.open(full, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
            try:
                write_whole(descriptor, memoryview(data), 0)
            finally:
                os.close(descriptor)

    def open_writer(self, path: str, nbytes: int) -> LocalWriter:
        self._anchor()
        able = self.capabilities
        if able.sequential_only:  # its length is that of what is written
            return LocalWriter(self._full(path), None, may_bypass_cache=False)
        return LocalWriter(self._full(path), nbytes, may_bypass_cache=able.past_cache)

    def open_reader(self, path: str, *, cache: Caching = "fill") -> LocalReader:
        bypass = cache == "spare" and self._file_system not in IN_MEMORY
        return LocalReader(self._full(path), may_bypass_cache=bypass)

    def read(self, path: str, limit: int) -> bytes:
        reader = self.open_reader(path)
        try:
            if reader.nbytes > limit:
                raise LimitExceeded(f"{self._full(path)}: expected at most {limit} bytes, found {reader.nbytes}")
            data = bytearray(reader.nbytes)
            reader.read_into(0, memoryview(data))
            return bytes(data)
        finally:
            reader.close()

    def size(self, path: str) -> int:
        full = self._full(path)
        with naming("open to read", full):
            found = os.lstat(full)
            if stat.S_ISREG(found.st_mode):
                return found.st_size
        reader = self.open_reader(path)  # no file: opening it says what it is
        reader.close()
        return reader.nbytes

    def stamp(self, path: str) -> str:
        full = self._full(path)
        with naming("look at", full):
            found = os.stat(full)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(found.st_mtime_ns // 10**9))
        return f"{found.st_size} bytes of {at}.{found.st_mtime_ns % 10**9:09} UTC"

    def sync_file(self, path: str) -> None:
        full = self._full(path)
        with naming("sync", full):
            descriptor = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                demand_file(descriptor, full)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync_directory(self, path: str) -> None:
        full = self._prefix + checked_directory(path)
        with naming("sync directory", full):
            descriptor = os.open(full, _DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync_tree(self) -> None:
        if not self.capabilities.tree_sync:
            raise CapabilityMissing(
                f"tree_sync: {self._file_system} at {self._root} does not report what syncfs could not write"
            )
        with naming("sync file system of", self._root):
            sync_file_system(self._anchor())

    def rename(self, source: str, target: str) -> None:
        old, new = self._full(source), self._full(target)
        with naming(f"rename {old} to", new):
            if not stat.S_ISDIR(os.lstat(old).st_mode):
                return _rename_file(old, new)
            try:
                return os.rename(old, new)  # refuses a target that is a file, or a directory that is not empty
            except NotADirectoryError:
                raise PathOccupied(f"rename {old} to {new}: a file stands there") from None

    def remove(self, path: str) -> None:
        full = self._full(path)
        with naming("remove", full):
            try:
                os.unlink(full)
            except FileNotFoundError:
                return

    def remove_tree(self, path: str) -> None:
        full = self._full(path)
        with naming("remove", full), contextlib.suppress(FileNotFoundError):
            _remove_tree(full, parent=None)

    def entries(self, path: str) -> tuple[Entry, ...]:
        full = self._prefix + checked_directory(path)
        with naming("list", full):
            descriptor = os.open(full, _DIRECTORY)
            try:
                with os.scandir(descriptor) as found:
                    return tuple(sorted(entry for entry in map(_entry, found) if entry is not None))
            finally:
                os.close(descriptor)

    def exists(self, path: str) -> bool:
        full = self._prefix + checked_directory(path)
        with naming("look at", full):
            try:
                os.lstat(full)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def _full(self, path: str) -> str:
        return self._prefix + checked(path)

    def _anchor(self) -> int:
        """A descriptor of the root, opened by this process before its first write: what fails later is told to it.

        A forked child opens its own, as the kernel reports each failure once to each opening.
        """
        process, descriptor = self._anchor_of
        if process != os.getpid():
            with self._opening, naming("open", self._root):
                process, descriptor = self._anchor_of
                if process != os.getpid():
                    descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
                    self._anchor_of = (os.getpid(), descriptor)
                    weakref.finalize(self, os.close, descriptor)
        return descriptor


def _is_directory(full: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(full).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _made_below(full: str) -> bool:
    """Whether one call made `full` a directory, or it was one: its parent is there nearly always."""
    try:
        os.mkdir(full)
    except FileExistsError:
        return _is_directory(full)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _make_directory(full: str) -> bool:
    """`full` is a directory, its parent must be there; whether this call made it."""
    try:
        os.mkdir(full)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(full).st_mode):  # it may be gone again by now: then that is the error
            raise
        return False
    return True


def _rename_file(old: str, new: str) -> None:
    """By link and unlink: rename would replace."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise CapabilityMissing(f"no_replace_rename: no file can be linked at {new}") from error
        raise
    os.unlink(old)


def _remove_tree(name: str, *, parent: int | None) -> None:
    """`name` in the directory `parent` is gone with all below it. By descriptors, so that no link diverts it."""
    try:
        return os.unlink(name, dir_fd=parent)
    except IsADirectoryError:
        pass
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        for below in os.listdir(descriptor):
            with contextlib.suppress(FileNotFoundError):
                _remove_tree(below, parent=descriptor)
    finally:
        os.close(descriptor)
    return os.rmdir(name, dir_fd=parent)


def _entry(found: os.DirEntry[str]) -> Entry | None:
    """None for what was removed since it was listed."""
    kind: EntryKind = "other"
    nbytes = 0
    if found.is_dir(follow_symlinks=False):
        kind = "directory"
    elif found.is_file(follow_symlinks=False):
        try:
            kind, nbytes = "file", found.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            return None
    return Entry(found.name, kind, nbytes)
