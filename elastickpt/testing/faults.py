"""Stores that record what is done to them, and that fail, tear or crash at the nth operation.

Faults are enumerated, not sampled: run with the fault at operation 1, 2, 3, ... until a run ends with `struck` false.

    for n in itertools.count(1):
        store = FaultyStore(inner, FailAt(n, errno=errno.ENOSPC))
        ...                                    # save; whatever happens, look at `inner`
        if not store.struck:
            break

Operations are counted from 1, over the store and all writers and readers that it opened, as they begin.
"""

from __future__ import annotations

import errno as numbers
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from elastickpt.storage.store import (
    Caching,
    Capabilities,
    Entry,
    RangeReader,
    RangeWriter,
    Store,
    lending_of,
    one_by_one,
    storage_failure,
)

T = TypeVar("T")
Mode = Literal["before", "after", "torn"]
Torn = Literal["half", "first byte", "all but last byte"]
Lasting = Literal["once", "from then on"]

CHANGING = frozenset(
    {"make_directories", "create", "open_writer", "writer.write", "writer.sync", "writer.close", "sync_file"}
    | {"sync_directory", "sync_tree", "rename", "remove", "remove_tree"}
)
READING = frozenset({"open_reader", "reader.read_into", "reader.close", "read", "size", "entries", "exists"})
ALL = CHANGING | READING
_CLOSING = frozenset({"writer.close", "reader.close"})


@dataclass(frozen=True, slots=True)
class Operation:
    """The nth operation (from 1), its name ("create", "writer.write", ...), its path, what else it was given."""

    index: int
    name: str
    path: str
    detail: str


class Crash(BaseException):
    """The process is gone, as by SIGKILL: no handler of errors sees it, nothing after it reaches the store."""


@dataclass(frozen=True, slots=True)
class FailAt:
    """Operation `n` fails with `errno`, before or after it was done, or torn: only a part of its bytes written.

    What has no bytes is torn by not being done, but for `open_writer`, which leaves a new file without its size, and
    `remove_tree`, which removes a part.
    """

    n: int
    errno: int = numbers.EIO
    mode: Mode = "before"
    torn: Torn = "half"
    lasting: Lasting = "once"

    def strike(self, operation: Operation) -> None:
        error = OSError(self.errno, os.strerror(self.errno))
        raise storage_failure(error, f"[injected] {operation.name}", operation.path) from error


@dataclass(frozen=True, slots=True)
class CrashAt:
    """Operation `n` raises Crash, and every later one does."""

    n: int
    mode: Mode = "before"
    torn: Torn = "half"
    lasting: Lasting = "from then on"

    def strike(self, operation: Operation) -> None:
        raise Crash(f"at operation {operation.index}: {operation.name} {operation.path} {operation.detail}")


@dataclass(frozen=True, slots=True)
class CallAt:
    """Operation `n` calls `hook` and goes on when it returns: to kill the process, to wait, to look.

    `torn` is for a hook that does not return.
    """

    n: int
    hook: Callable[[Operation], None]
    mode: Mode = "before"
    torn: Torn = "half"
    lasting: Lasting = "once"

    def strike(self, operation: Operation) -> None:
        self.hook(operation)


Fault = FailAt | CrashAt | CallAt


@dataclass(frozen=True, slots=True)
class _Act:
    """What is about to be done: under which name, by which call, and how a part of it is done."""

    name: str
    path: str
    detail: str = ""
    nbytes: int = 0
    part: Callable[[int], object] | None = None  # does the first so many of `nbytes`


class _Intercepted(ABC):
    """A store whose every operation, and those of its writers and readers, goes through `_do`."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._counting = threading.Lock()
        self._count = 0

    @abstractmethod
    def _do(self, act: _Act, whole: Callable[[], T]) -> T: ...

    def _next(self, act: _Act) -> Operation:
        with self._counting:
            self._count += 1
            return Operation(self._count, act.name, act.path, act.detail)

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def make_directories(self, path: str) -> None:
        self._do(_Act("make_directories", path), lambda: self._inner.make_directories(path))

    def create(self, path: str, data: bytes) -> None:
        act = _Act("create", path, f"{len(data)} bytes", len(data), lambda n: self._inner.create(path, data[:n]))
        self._do(act, lambda: self._inner.create(path, data))

    def open_writer(self, path: str, nbytes: int) -> RangeWriter:
        act = _Act("open_writer", path, f"{nbytes} bytes", 0, lambda _: self._create_only(path))
        return _Writer(self, path, self._do(act, lambda: self._inner.open_writer(path, nbytes)))

    def open_reader(self, path: str, *, cache: Caching = "fill") -> RangeReader:
        act = _Act("open_reader", path)
        return _Reader(self, path, self._do(act, lambda: self._inner.open_reader(path, cache=cache)))

    def read(self, path: str, limit: int) -> bytes:
        return self._do(_Act("read", path), lambda: self._inner.read(path, limit))

    def size(self, path: str) -> int:
        return self._do(_Act("size", path), lambda: self._inner.size(path))

    def sync_file(self, path: str) -> None:
        self._do(_Act("sync_file", path), lambda: self._inner.sync_file(path))

    def sync_directory(self, path: str) -> None:
        self._do(_Act("sync_directory", path), lambda: self._inner.sync_directory(path))

    def sync_tree(self) -> None:
        self._do(_Act("sync_tree", ""), self._inner.sync_tree)

    def rename(self, source: str, target: str) -> None:
        self._do(_Act("rename", source, f"to {target}"), lambda: self._inner.rename(source, target))

    def remove(self, path: str) -> None:
        self._do(_Act("remove", path), lambda: self._inner.remove(path))

    def remove_tree(self, path: str) -> None:
        act = _Act("remove_tree", path, part=lambda _: self._remove_some(path))
        self._do(act, lambda: self._inner.remove_tree(path))

    def entries(self, path: str) -> tuple[Entry, ...]:
        return self._do(_Act("entries", path), lambda: self._inner.entries(path))

    def exists(self, path: str) -> bool:
        return self._do(_Act("exists", path), lambda: self._inner.exists(path))

    def _create_only(self, path: str) -> None:
        if not self._inner.exists(path):
            self._inner.open_writer(path, 0).close()

    def _remove_some(self, path: str) -> None:
        """The first half of what the directory holds, rounded up; nothing of what is no directory."""
        parent, _, name = path.rpartition("/")
        if Entry(name, "directory", 0) in self._inner.entries(parent):
            below = self._inner.entries(path)
            for entry in below[: (len(below) + 1) // 2]:
                self._inner.remove_tree(f"{path}/{entry.name}")


class _Writer:
    def __init__(self, store: _Intercepted, path: str, inner: RangeWriter) -> None:
        self._store, self._path, self._inner = store, path, inner

    def write(self, offset: int, data: memoryview) -> None:
        data = data.cast("B")
        detail = f"{data.nbytes} bytes at {offset}"
        act = _Act("writer.write", self._path, detail, data.nbytes, lambda n: self._inner.write(offset, data[:n]))
        self._store._do(act, lambda: self._inner.write(offset, data))

    def sync(self) -> None:
        self._store._do(_Act("writer.sync", self._path), self._inner.sync)

    def close(self) -> None:
        self._store._do(_Act("writer.close", self._path), self._inner.close)


class _Reader:
    def __init__(self, store: _Intercepted, path: str, inner: RangeReader) -> None:
        self._store, self._path, self._inner = store, path, inner

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def read_into(self, offset: int, into: memoryview) -> None:
        act = _Act("reader.read_into", self._path, f"{into.nbytes} bytes at {offset}")
        self._store._do(act, lambda: self._inner.read_into(offset, into))

    def lend(self, offset: int, into: memoryview) -> memoryview:
        act = _Act("reader.read_into", self._path, f"{into.nbytes} bytes at {offset}")
        return self._store._do(act, lambda: lending_of(self._inner).lend(offset, into))

    def fill_each(self, offset: int, groups: Sequence[Sequence[memoryview]], look: Callable[[memoryview], int]) -> list[int]:
        return one_by_one(self.read_into, offset, groups, look)

    def fill(self, offset: int, parts: Sequence[memoryview]) -> bool:
        act = _Act("reader.read_into", self._path, f"{sum(part.nbytes for part in parts)} bytes at {offset}")
        return self._store._do(act, lambda: lending_of(self._inner).fill(offset, parts))

    def lend_several(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview] | None:
        act = _Act("reader.read_into", self._path, f"{sum(nbytes for _, nbytes in ranges)} bytes from {ranges[0][0]} on")
        return self._store._do(act, lambda: lending_of(self._inner).lend_several(ranges))

    def close(self) -> None:
        self._store._do(_Act("reader.close", self._path), self._inner.close)


class RecordingStore(_Intercepted):
    """A store that records every operation as it begins."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._operations: list[Operation] = []

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All that began so far, in that order."""
        return tuple(sorted(self._operations, key=lambda operation: operation.index))

    def _do(self, act: _Act, whole: Callable[[], T]) -> T:
        self._operations.append(self._next(act))
        return whole()


class FaultyStore(_Intercepted):
    """A store in which the nth of the `counted` operations goes wrong as `fault` says. Others are done and not counted,
    but for what comes after a Crash: nothing then reaches the inner store, except that files are closed."""

    def __init__(self, inner: Store, fault: Fault, *, counted: frozenset[str] = ALL) -> None:
        super().__init__(inner)
        self._fault = fault
        self._counted = counted
        self._struck: Operation | None = None

    @property
    def struck(self) -> Operation | None:
        """The operation that the fault hit first, None as long as it has hit none."""
        return self._struck

    def _do(self, act: _Act, whole: Callable[[], T]) -> T:
        gone = self._struck is not None and isinstance(self._fault, CrashAt)
        if act.name not in self._counted and not gone:
            return whole()
        operation = self._next(act)
        if operation.index == self._fault.n:
            self._struck = operation
            return self._go_wrong(act, operation, whole)
        if operation.index > self._fault.n and self._fault.lasting == "from then on":
            if act.name in _CLOSING:
                whole()  # descriptors are given back in any case: the system does it for a process that is gone
            self._fault.strike(operation)
        return whole()

    def _go_wrong(self, act: _Act, operation: Operation, whole: Callable[[], T]) -> T:
        if self._fault.mode == "after" or act.name in _CLOSING:
            result = whole()
            self._fault.strike(operation)
            return result
        if self._fault.mode == "torn" and act.part is not None:
            act.part(_torn(act.nbytes, self._fault.torn))
        self._fault.strike(operation)
        return whole()


def _torn(nbytes: int, torn: Torn) -> int:
    match torn:
        case "half":
            return nbytes // 2
        case "first byte":
            return min(1, nbytes)
        case "all but last byte":
            return max(0, nbytes - 1)
