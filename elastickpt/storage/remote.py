"""Object stores and whatever else fsspec reaches: whole objects, created once, read by range."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import fsspec

from elastickpt.errors import CapabilityMissing, CheckpointError, LimitExceeded, MissingFile, StorageFailed, WrongLength
from elastickpt.storage.ranges import as_bytes
from elastickpt.storage.store import Caching, Capabilities, Entry, RangeWriter, checked, checked_directory, naming

# How a protocol creates exclusively, by name: of the others some only look before they write, which is no promise.
_CONDITIONAL_PUT = frozenset({"s3", "s3a", "gs", "gcs"})  # pipe_file(mode="create") is one conditional request
_OPEN_EXCLUSIVE = frozenset({"file", "local", "memory"})  # open(mode="xb")
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created")  # as clients call them
_IN_PROCESS = threading.Lock()  # fsspec's own memory file system looks and then creates


class _naming(naming):
    """As `naming`; what a client library raises beside OSErrors becomes StorageFailed."""

    __slots__ = ()

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(cls, error, trace)
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise StorageFailed(f"{self.operation} {self.path}: {type(error).__name__}: {error}") from error


class FsspecReader:
    """Reads ranges of one object, each by one request."""

    def __init__(self, filesystem: Any, path: str, nbytes: int) -> None:
        self._filesystem = filesystem
        self._path = path
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, into: memoryview) -> None:
        into = as_bytes(into)
        stop = offset + into.nbytes
        if stop > self._nbytes:
            raise WrongLength(f"{self._path}: expected at least {stop} bytes, found {self._nbytes}")
        if not into.nbytes:
            return
        with _naming("read", self._path):
            data = self._filesystem.cat_file(self._path, start=offset, end=stop)
        if len(data) != into.nbytes:
            raise WrongLength(f"{self._path}: expected {into.nbytes} bytes at {offset}, found {len(data)}")
        into[:] = data

    def close(self) -> None:
        return None


class FsspecStore:
    """A folder of an fsspec file system as a store. Directories are implied by the names of objects.

    Objects are durable when `create` returns, as far as the service promises it; so `sync_file` has nothing to do.
    """

    def __init__(self, url: str, *, filesystem: Any = None) -> None:
        self.url = url
        with _naming("open", url):
            if filesystem is None:
                filesystem, root = fsspec.url_to_fs(url)
            else:
                root = filesystem._strip_protocol(url)
        self._filesystem = filesystem
        self._prefix = root.rstrip("/") + "/"
        protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)
        self._opens_exclusive = not _OPEN_EXCLUSIVE.isdisjoint(protocols)
        conditional = not _CONDITIONAL_PUT.isdisjoint(protocols)
        self.capabilities = Capabilities(
            exclusive_create=conditional or self._opens_exclusive,
            no_replace_rename=False,
            directory_sync=False,
            tree_sync=False,
            conditional_put=conditional,
            ranged_writes=False,
            sequential_only=True,
            shared_by_hosts=False,
            past_cache=False,
            directories=False,
            name=protocols[0],
        )

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def make_directories(self, path: str) -> None:
        checked(path)

    def create(self, path: str, data: bytes) -> None:
        full = self._prefix + checked(path)
        if not self.capabilities.exclusive_create:
            raise self._missing("exclusive_create")
        with _naming("create", full):
            if not self._opens_exclusive:
                self._filesystem.pipe_file(full, data, mode="create")
                return
            with _IN_PROCESS:
                self._filesystem.makedirs(self._filesystem._parent(full), exist_ok=True)
                with self._filesystem.open(full, "xb") as file:
                    file.write(data)

    def open_writer(self, path: str, nbytes: int) -> RangeWriter:
        checked(path)
        raise self._missing("ranged_writes")

    def open_reader(self, path: str, *, cache: Caching = "fill") -> FsspecReader:
        full = self._prefix + checked(path)
        with _naming("open to read", full):
            self._filesystem.invalidate_cache()
            found = self._filesystem.info(full)
        if found["type"] != "file":
            raise MissingFile(f"{full}: expected a file, found a {found['type']}")
        return FsspecReader(self._filesystem, full, int(found["size"]))

    def read(self, path: str, limit: int) -> bytes:
        reader = self.open_reader(path)
        if reader.nbytes > limit:
            raise LimitExceeded(f"{self._prefix}{path}: expected at most {limit} bytes, found {reader.nbytes}")
        data = bytearray(reader.nbytes)
        reader.read_into(0, memoryview(data))
        return bytes(data)

    def size(self, path: str) -> int:
        return self.open_reader(path).nbytes

    def stamp(self, path: str) -> str:
        full = self._prefix + checked(path)
        with _naming("look at", full):
            self._filesystem.invalidate_cache()
            found = self._filesystem.info(full)
        known = (str(found[name]) for name in _VERSIONS if found.get(name) is not None)
        return " ".join((f"{found.get('size')} bytes", *known))

    def sync_file(self, path: str) -> None:
        self.open_reader(path)

    def sync_directory(self, path: str) -> None:
        checked_directory(path)
        raise self._missing("directory_sync")

    def sync_tree(self) -> None:
        raise self._missing("tree_sync")

    def rename(self, source: str, target: str) -> None:
        for path in (source, target):
            checked(path)
        raise self._missing("no_replace_rename")

    def remove(self, path: str) -> None:
        full = self._prefix + checked(path)
        with _naming("remove", full):
            try:
                self._filesystem.rm_file(full)
            except FileNotFoundError:
                return

    def remove_tree(self, path: str) -> None:
        full = self._prefix + checked(path)
        with _naming("remove", full):
            try:
                self._filesystem.invalidate_cache()
                self._filesystem.rm(full, recursive=True)
            except FileNotFoundError:
                return

    def entries(self, path: str) -> tuple[Entry, ...]:
        full = (self._prefix + checked_directory(path)).rstrip("/")
        with _naming("list", full):
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.ls(full, detail=True)
            except FileNotFoundError:
                if path:
                    raise
                return ()  # the root is always there
        return tuple(sorted(_entry(info) for info in found if info["name"].rstrip("/") != full))

    def exists(self, path: str) -> bool:
        full = (self._prefix + checked_directory(path)).rstrip("/")
        with _naming("look at", full):
            self._filesystem.invalidate_cache()
            return bool(self._filesystem.exists(full))

    def _missing(self, capability: str) -> CapabilityMissing:
        return CapabilityMissing(f"{capability}: {self.capabilities.name} at {self.url} cannot do it")


def _entry(info: Any) -> Entry:
    name = info["name"].rstrip("/").rpartition("/")[2]
    if info["type"] == "file":
        return Entry(name, "file", int(info["size"]))
    return Entry(name, "directory" if info["type"] == "directory" else "other", 0)
