"""A store in this process's memory: `memory://name` is the same store wherever it is opened. Gone with the process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from elastickpt.errors import CapabilityMissing, LimitExceeded, MissingFile, PathOccupied, WrongLength
from elastickpt.storage.ranges import as_bytes
from elastickpt.storage.store import Caching, Capabilities, Entry, ancestors_of, checked, checked_directory, parent_of

_CAPABILITIES = Capabilities(
    exclusive_create=True,
    no_replace_rename=True,
    directory_sync=False,
    tree_sync=False,
    conditional_put=True,
    ranged_writes=True,
    sequential_only=False,
    shared_by_hosts=False,
    past_cache=False,
    directories=True,
    name="memory",
)


@dataclass(slots=True, eq=False)
class _File:
    """Content by itself, as an inode: writers and readers keep it when its name goes."""

    data: bytearray = field(default_factory=bytearray)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, offset: int, data: memoryview) -> None:
        with self.lock:
            self.data.extend(bytes(max(0, offset - len(self.data))))
            self.data[offset : offset + len(data)] = data

    def resize(self, nbytes: int) -> None:
        with self.lock:
            del self.data[nbytes:]
            self.data.extend(bytes(nbytes - len(self.data)))


_Node = _File | None  # None: a directory
_TREE: dict[str, _Node] = {"": None}  # of all memory stores: path from the top -> what stands there
_LOCK = threading.RLock()  # held while names are looked at or changed, never while bytes move


class MemoryWriter:
    """Fills ranges of one file in memory. Nothing is ever durable, so `sync` has nothing to do."""

    def __init__(self, file: _File) -> None:
        self._file = file

    def write(self, offset: int, data: memoryview) -> None:
        self._file.write(offset, as_bytes(data))

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None


class MemoryReader:
    """Reads ranges of one file in memory."""

    def __init__(self, file: _File, path: str) -> None:
        self._file = file
        self._path = path
        self._nbytes = len(file.data)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def read_into(self, offset: int, into: memoryview) -> None:
        into = as_bytes(into)
        stop = offset + into.nbytes
        with self._file.lock:
            found = len(self._file.data)
            if stop <= found:
                into[:] = memoryview(self._file.data)[offset:stop]
                return
        raise WrongLength(f"{self._path}: expected at least {stop} bytes, found {found}")

    def close(self) -> None:
        return None


class MemoryStore:
    """What this process holds in memory below `name`, which springs into being with its first store."""

    capabilities = _CAPABILITIES

    def __init__(self, name: str) -> None:
        self._root = checked_directory(name)
        self._prefix = f"{name}/" if name else ""
        with _LOCK:
            for directory in ancestors_of(name) if name else ():
                if _TREE.setdefault(directory, None) is not None:
                    raise PathOccupied(f"open {self.url}: a file stands at memory://{directory}")

    @property
    def url(self) -> str:
        return f"memory://{self._root}"

    def __repr__(self) -> str:
        return f"MemoryStore({self._root!r})"

    def make_directories(self, path: str) -> None:
        first, *below = ancestors_of(checked(path))
        with _LOCK:
            if below and self._prefix + first not in _TREE:
                raise MissingFile(f"make directory {self._show(path)}: {self._show(first)} is not there")
            for component in (first, *below):
                self._demand_parent("make directory", component)
                if _TREE.setdefault(self._prefix + component, None) is not None:
                    raise PathOccupied(f"make directory {self._show(component)}: a file stands there")

    def create(self, path: str, data: bytes) -> None:
        file = _File(bytearray(data))
        with _LOCK:
            self._demand_parent("create", checked(path))
            if _TREE.setdefault(self._prefix + path, file) is not file:
                raise PathOccupied(f"create {self._show(path)}: it stands there already")

    def open_writer(self, path: str, nbytes: int) -> MemoryWriter:
        with _LOCK:
            self._demand_parent("open to write", checked(path))
            file = _TREE.setdefault(self._prefix + path, _File())
            if file is None:
                raise PathOccupied(f"open to write {self._show(path)}: a directory stands there")
        file.resize(nbytes)
        return MemoryWriter(file)

    def open_reader(self, path: str, *, cache: Caching = "fill") -> MemoryReader:
        return MemoryReader(self._file(path), self._show(path))

    def read(self, path: str, limit: int) -> bytes:
        file = self._file(path)
        with file.lock:
            if len(file.data) > limit:
                raise LimitExceeded(f"{self._show(path)}: expected at most {limit} bytes, found {len(file.data)}")
            return bytes(file.data)

    def size(self, path: str) -> int:
        return len(self._file(path).data)

    def sync_file(self, path: str) -> None:
        self._file(path)

    def sync_directory(self, path: str) -> None:
        raise CapabilityMissing(f"directory_sync: nothing in {self._show(checked_directory(path))} outlives the process")

    def sync_tree(self) -> None:
        raise CapabilityMissing(f"tree_sync: nothing in {self.url} outlives the process")

    def rename(self, source: str, target: str) -> None:
        old, new = self._prefix + checked(source), self._prefix + checked(target)
        said = f"rename {self._show(source)} to {self._show(target)}"
        with _LOCK:
            if old not in _TREE:
                raise MissingFile(f"{said}: there is no {source!r}")
            self._demand_parent(said, target)
            empty = _TREE[old] is None and _TREE.get(new, _File()) is None and not _below(new)
            if new in _TREE and not empty:
                raise PathOccupied(f"{said}: something stands there")
            if new.startswith(f"{old}/"):
                raise PathOccupied(f"{said}: a directory cannot move into itself")
            for path in (old, *_below(old)):
                _TREE[new + path.removeprefix(old)] = _TREE.pop(path)

    def remove(self, path: str) -> None:
        with _LOCK:
            if _TREE.get(self._prefix + checked(path), _File()) is None:
                raise PathOccupied(f"remove {self._show(path)}: expected a file, found a directory")
            _TREE.pop(self._prefix + path, None)

    def remove_tree(self, path: str) -> None:
        with _LOCK:
            for name in (self._prefix + checked(path), *_below(self._prefix + path)):
                _TREE.pop(name, None)

    def entries(self, path: str) -> tuple[Entry, ...]:
        top = (self._prefix + checked_directory(path)).rstrip("/")
        with _LOCK:
            if _TREE.get(top, _File()) is not None:
                raise MissingFile(f"list {self._show(path)}: there is no such directory")
            found = ((name, _TREE[name]) for name in _below(top) if parent_of(name) == top)
            return tuple(sorted(_entry(name.rpartition("/")[2], node) for name, node in found))

    def exists(self, path: str) -> bool:
        return (self._prefix + checked_directory(path)).rstrip("/") in _TREE

    def _show(self, path: str) -> str:
        return f"memory://{self._prefix}{path}"

    def _file(self, path: str) -> _File:
        with _LOCK:
            node = _TREE.get(self._prefix + checked(path))
        if node is None:
            raise MissingFile(f"open to read {self._show(path)}: there is no such file")
        return node

    def _demand_parent(self, operation: str, path: str) -> None:
        parent = (self._prefix + parent_of(path)).rstrip("/")
        if _TREE.get(parent, _File()) is not None:
            raise MissingFile(f"{operation} {self._show(path)}: its directory is not there")


def _below(top: str) -> list[str]:
    prefix = f"{top}/" if top else ""
    return [name for name in _TREE if name.startswith(prefix) and name != top]


def _entry(name: str, node: _Node) -> Entry:
    return Entry(name, "directory", 0) if node is None else Entry(name, "file", len(node.data))
