"""What may be left of a store after a power cut: the weakest that POSIX allows, from a journal of what was done to it.

    store = JournalStore("before")               # save through it
    for length in range(len(store.journal) + 1):
        for fate in FATES:
            left = after_power_cut(store.journal[:length], fate, name="after")

A file keeps what it held at its last sync, or anything newer; a directory keeps the names it had at its last sync, or those
after any later change of it, in order. Files and directories are independent of each other: that a name is durable says
nothing of the content behind it, and the other way round.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Caching, Capabilities, Entry, RangeReader, RangeWriter

T = TypeVar("T")
Verb = Literal["directory", "create", "size", "write", "sync", "sync tree", "rename", "remove"]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was done: `offset` is a file's size for "size", `target` where a rename led."""

    verb: Verb
    path: str
    data: bytes = b""
    offset: int = 0
    target: str = ""


class JournalStore:
    """A store in memory that can be synced, and keeps a journal of all that changed it, in order."""

    def __init__(self, name: str, *, tree_sync: bool = False) -> None:
        self._inner = MemoryStore(name)
        self._lock = threading.Lock()
        self._changes: list[Change] = []
        self.capabilities: Capabilities = replace(self._inner.capabilities, directory_sync=True, tree_sync=tree_sync)

    @property
    def journal(self) -> tuple[Change, ...]:
        """All that changed the store so far."""
        return tuple(self._changes)

    @property
    def url(self) -> str:
        return self._inner.url

    def make_directories(self, path: str) -> None:
        self._do(Change("directory", path), lambda: self._inner.make_directories(path))

    def create(self, path: str, data: bytes) -> None:
        self._do(Change("create", path, data), lambda: self._inner.create(path, data))

    def open_writer(self, path: str, nbytes: int) -> RangeWriter:
        opened = self._do(Change("size", path, offset=nbytes), lambda: self._inner.open_writer(path, nbytes))
        return _Writer(self, opened, path)

    def open_reader(self, path: str, *, cache: Caching = "fill") -> RangeReader:
        return self._inner.open_reader(path, cache=cache)

    def read(self, path: str, limit: int) -> bytes:
        return self._inner.read(path, limit)

    def size(self, path: str) -> int:
        return self._inner.size(path)

    def sync_file(self, path: str) -> None:
        self._do(Change("sync", path), lambda: self._inner.sync_file(path))

    def sync_directory(self, path: str) -> None:
        self._do(Change("sync", path), lambda: self._inner.entries(path))

    def sync_tree(self) -> None:
        self._do(Change("sync tree", ""), lambda: None)

    def rename(self, source: str, target: str) -> None:
        self._do(Change("rename", source, target=target), lambda: self._inner.rename(source, target))

    def remove(self, path: str) -> None:
        self._do(Change("remove", path), lambda: self._inner.remove(path))

    def remove_tree(self, path: str) -> None:
        """File by file, each removal a change of the directory that held it."""
        for below in self._below(path):
            self._do(Change("remove", below), lambda below=below: self._inner.remove_tree(below))  # type: ignore[misc]
        self._do(Change("remove", path), lambda: self._inner.remove_tree(path))

    def entries(self, path: str) -> tuple[Entry, ...]:
        return self._inner.entries(path)

    def exists(self, path: str) -> bool:
        return self._inner.exists(path)

    def _below(self, path: str) -> list[str]:
        """What stands below it, the deepest first; nothing if it is no directory."""
        parent, _, name = path.rpartition("/")
        if not self._inner.exists(parent) or Entry(name, "directory", 0) not in self._inner.entries(parent):
            return []
        inside = [f"{path}/{entry.name}" for entry in self._inner.entries(path)]
        return [one for name in inside for one in (*self._below(name), name)]

    def _do(self, change: Change, act: Callable[[], T]) -> T:
        with self._lock:  # so that the journal has the order in which things happened
            result = act()
            self._changes.append(change)
            return result


class _Writer:
    def __init__(self, store: JournalStore, inner: RangeWriter, path: str) -> None:
        self._store, self._inner, self._path = store, inner, path

    def write(self, offset: int, data: memoryview) -> None:
        self._store._do(Change("write", self._path, bytes(data), offset), lambda: self._inner.write(offset, data))

    def sync(self) -> None:
        self._store._do(Change("sync", self._path), self._inner.sync)

    def close(self) -> None:
        self._inner.close()


# -- what may be left --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _File:
    """Contents since the last sync, that one (or none) first."""

    contents: list[bytes] = field(default_factory=lambda: [b""])


@dataclass(slots=True, eq=False)
class _Directory:
    """Names since the last sync, those first."""

    names: list[dict[str, _File | _Directory]] = field(default_factory=lambda: [{}])


@dataclass(frozen=True, slots=True)
class Fate:
    """Which of a directory's states, and which content of a file, survives; each is given the durable one first."""

    name: str
    names: Callable[[int], int]  # of so many states, the place of the one that is left
    content: Callable[[Sequence[bytes]], bytes]


def _first(count: int) -> int:
    return 0


def _last(count: int) -> int:
    return count - 1


LOST = Fate("all that is not synced is lost", _first, lambda contents: contents[0])
KEPT = Fate("nothing is lost", _last, lambda contents: contents[-1])
TORN = Fate("names are kept, contents lost", _last, lambda contents: contents[0])
ZEROED = Fate(
    "names and sizes are kept, contents zero",
    _last,
    lambda contents: contents[0] if len(contents) == 1 else bytes(len(contents[-1])),
)
NAMELESS = Fate("contents are kept, names lost", _first, lambda contents: contents[-1])
FATES = (LOST, KEPT, TORN, ZEROED, NAMELESS)


def drawn(seed: int) -> Fate:
    """Each directory and file for itself: one of its states by chance, or zeros."""
    chance = random.Random(seed)

    def content(contents: Sequence[bytes]) -> bytes:
        if len(contents) > 1 and chance.random() < 0.25:
            return bytes(len(contents[-1]))
        return chance.choice(contents)

    return Fate(f"drawn with seed {seed}", chance.randrange, content)


def after_power_cut(journal: Iterable[Change], fate: Fate, *, name: str) -> MemoryStore:
    """A new store in memory called `name`, holding what is left of the journal's store."""
    top = _Directory()
    for change in journal:
        _apply(top, change)
    store = MemoryStore(name)
    _lay_out(store, "", top, fate)
    return store


def _lay_out(store: MemoryStore, path: str, directory: _Directory, fate: Fate) -> None:
    for name, node in directory.names[fate.names(len(directory.names))].items():
        full = f"{path}/{name}" if path else name
        if isinstance(node, _File):
            store.create(full, fate.content(node.contents))
        else:
            store.make_directories(full)
            _lay_out(store, full, node, fate)


def _at(top: _Directory, path: str) -> _File | _Directory:
    node: _File | _Directory = top
    for part in path.split("/") if path else ():
        if not isinstance(node, _Directory):
            raise KeyError(path)
        node = node.names[-1][part]
    return node


def _directory(top: _Directory, path: str) -> tuple[_Directory, str]:
    parent, _, name = path.rpartition("/")
    found = _at(top, parent)
    if not isinstance(found, _Directory):
        raise KeyError(path)
    return found, name


def _enter(top: _Directory, path: str, node: _File | _Directory | None) -> None:
    """`path` names `node` from now on, or nothing."""
    directory, name = _directory(top, path)
    names = {**directory.names[-1], name: node} if node else {k: v for k, v in directory.names[-1].items() if k != name}
    directory.names.append(names)


def _content(top: _Directory, path: str, change: Callable[[bytes], bytes]) -> None:
    file = _at(top, path)
    if isinstance(file, _File):
        file.contents.append(change(file.contents[-1]))


def _apply(top: _Directory, change: Change) -> None:
    path = change.path
    match change.verb:
        case "directory":
            parts = path.split("/")
            for depth in range(1, len(parts) + 1):
                parent, name = _directory(top, "/".join(parts[:depth]))
                if name not in parent.names[-1]:
                    _enter(top, "/".join(parts[:depth]), _Directory())
        case "create":
            _enter(top, path, _File([b"", change.data]))
        case "size":
            parent, name = _directory(top, path)
            if name not in parent.names[-1]:
                _enter(top, path, _File())
            _content(top, path, lambda data: data[: change.offset].ljust(change.offset, b"\0"))
        case "write":
            end = change.offset + len(change.data)
            _content(top, path, lambda data: data[: change.offset].ljust(change.offset, b"\0") + change.data + data[end:])
        case "sync":
            _settle(_at(top, path))
        case "sync tree":
            _settle_below(top)
        case "rename":
            node = _at(top, path)
            parent, name = _directory(top, path)
            other, target = _directory(top, change.target)
            if parent is not other:
                raise ValueError(f"a rename between directories is not modelled: {change}")
            names = {known: one for known, one in parent.names[-1].items() if known != name}
            parent.names.append({**names, target: node})  # in one step
        case "remove":
            _enter(top, path, None)


def _settle(node: _File | _Directory) -> None:
    if isinstance(node, _File):
        del node.contents[:-1]
    else:
        del node.names[:-1]


def _settle_below(node: _File | _Directory) -> None:
    _settle(node)
    if isinstance(node, _Directory):
        for below in node.names[-1].values():
            _settle_below(below)
