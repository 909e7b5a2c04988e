"""The files of a source, in a store of this library: names are checked, nothing outside the folder is opened. [FOR-5]

Stores of this library follow no link, as nobody but they write into their folders. A source is somebody else's: caches of model
hubs consist of links, made by who has the right to make them there, never by a file in it. [FOR-8]
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from elastickpt.errors import MissingFile, NotACheckpoint, Unsafe
from elastickpt.foreign.listing import SourceFile, StoredTensor
from elastickpt.foreign.tensor_bytes import read_tensor
from elastickpt.foreign.zip_records import ByteRange
from elastickpt.format import canonical_json
from elastickpt.format.version import MAX_MANIFEST_NBYTES
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import locate, open_store, path_in
from elastickpt.storage.ranges import LocalReader
from elastickpt.storage.store import Caching, Entry, Store, checked, naming

MAX_TRACKER_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a source; `url` opens it again. `only` is the one file that was named, where a file was named."""

    url: str
    store: Store
    only: str | None = None

    def below(self, name: str) -> Folder:
        """The folder `name` in this one."""
        url = path_in(self.store, checked(name))
        return Folder(url, open_linked(url))

    def entries(self, path: str = "") -> tuple[Entry, ...]:
        """What lies in a folder below; just the one file where a file was named."""
        found = self.store.entries(path)
        return found if self.only is None else tuple(one for one in found if one.name == self.only)

    def names(self, path: str = "") -> frozenset[str]:
        return frozenset(one.name for one in self.entries(path))

    def file(self, path: str) -> SourceFile:
        """A file and its size. MissingFile if it is not there."""
        return SourceFile(path, self.store.size(path))

    def text(self, path: str) -> str:
        """A small text file's content, without white space around it."""
        return self.store.read(path, MAX_TRACKER_NBYTES).decode("utf-8", "replace").strip()

    def json(self, path: str) -> object:
        """A JSON file's value. Raises Malformed, LimitExceeded."""
        return canonical_json.parse(self.store.read(path, MAX_MANIFEST_NBYTES), where=path)

    def read_tensor(self, tensor: StoredTensor) -> bytes:
        """All elements of a small tensor, in C order; its file is opened for this."""
        with self.opened(tensor.storage.file) as archive:
            return bytes(read_tensor(archive.reader, tensor))

    @contextmanager
    def opened(self, path: str) -> Iterator[ByteRange]:
        """A whole file for reading by ranges."""
        reader = self.store.open_reader(path)
        try:
            yield ByteRange.whole(path, reader)
        finally:
            reader.close()


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder at a path or URL, or that of the file there. NotACheckpoint where nothing is."""
    store, name = locate(path)
    store, url = open_linked(store.url), path_in(store, name)
    if not _holds(store, name):  # object stores know no folders: what a file's name stands for is told beside it
        kind = next((one.kind for one in store.entries("") if one.name == name), None)
        if kind is None:
            raise NotACheckpoint(f"{os.fspath(path)}: nothing is there")
        if kind != "directory":
            return Folder(store.url, store, only=name)
    return Folder(url, open_linked(url))


def _holds(store: Store, name: str) -> bool:
    try:
        return bool(store.entries(name))
    except MissingFile:
        return False


def inside(path: str, *, named_by: str) -> str:
    """A path that a file names, checked to lie in its folder. Unsafe where it leaves it. [FOR-5]"""
    try:
        return checked(path)
    except Unsafe:
        raise Unsafe(f"{named_by}: it names the file {path!r}, which is not inside its folder") from None


def open_linked(url: str) -> Store:
    """The store at a URL or local path, its links followed where it is a local one. Raises what `open_store` does."""
    store = open_store(url)
    return LinkedStore(unquote(store.url.removeprefix("file://"))) if isinstance(store, LocalStore) else store


class LinkedStore(LocalStore):
    """A `LocalStore` whose readers and listings take a link for what it leads to."""

    def open_reader(self, path: str, *, cache: Caching = "fill") -> LocalReader:
        full = self._full(path)
        if not os.path.islink(full):
            return super().open_reader(path, cache=cache)
        return LocalReader(os.path.realpath(full))

    def size(self, path: str) -> int:
        full = self._full(path)
        if not os.path.islink(full):
            return super().size(path)
        reader = self.open_reader(path)
        reader.close()
        return reader.nbytes

    def entries(self, path: str) -> tuple[Entry, ...]:
        target = os.path.realpath(self._prefix + path) if path and os.path.islink(self._full(path)) else None
        found = LocalStore(target).entries("") if target is not None else super().entries(path)
        return tuple(self._followed(path, one) if one.kind == "other" else one for one in found)

    def _followed(self, path: str, entry: Entry) -> Entry:
        """What a link leads to; a link to nothing, and what is no link, stay as they are."""
        full = f"{self._prefix}{path}/{entry.name}" if path else self._prefix + entry.name
        with naming("look at", full):
            try:
                found = os.stat(full)
            except FileNotFoundError:
                return entry
        if stat.S_ISREG(found.st_mode):
            return Entry(entry.name, "file", found.st_size)
        return Entry(entry.name, "directory", 0) if stat.S_ISDIR(found.st_mode) else entry
