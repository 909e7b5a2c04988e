"""A local folder of which links are followed: caches of model hubs consist of them. For reading what a user named only.

Stores of this library follow no link, as nobody but they write into their folders. A source is somebody else's; its links were
made by who has the right to make them there, never by a file in it. [FOR-8]
"""

from __future__ import annotations

import os
import stat
from urllib.parse import unquote

from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import open_store
from elastickpt.storage.ranges import LocalReader
from elastickpt.storage.store import Caching, Entry, Store, naming


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
