"""What every store promises: the one seam between engines and bytes.

A store is rooted. All paths are relative POSIX strings below its root, checked (no "..", no empty component);
"" is the root itself where a directory is meant. Nothing follows a symbolic link that is the last component of a path.

Errors, the same for all stores: StorageFailed with path and operation, of which NoSpace, ReadOnly and CapabilityMissing
are kinds; MissingFile where something that was named is not there; PathOccupied where nothing may stand; WrongLength
for a read beyond the end; LimitExceeded for a file beyond a stated limit; Unsafe for a path, link or device that no
writer makes. All operations block. All may be called from several threads at once.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, cast, runtime_checkable

from elastickpt.errors import CheckpointError, MissingFile, NoSpace, PathOccupied, ReadOnly, StorageFailed, Unsafe

_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[^/\x00]+"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


def checked(path: str) -> str:
    """The path itself. Raises Unsafe unless it is relative and no component is empty, "." or "..". [UCF-38]"""
    if _PATH.fullmatch(path) is None:
        raise Unsafe(f"path {path!r}: expected components below the store's root, none of them empty, '.' or '..'")
    return path


def checked_directory(path: str) -> str:
    """Like `checked`; "" is the store's root."""
    return checked(path) if path else path


def parent_of(path: str) -> str:
    """ "a/b/c" -> "a/b"; "a" -> ""."""
    return path.rpartition("/")[0]


def ancestors_of(path: str) -> tuple[str, ...]:
    """ "a/b/c" -> ("a", "a/b", "a/b/c"): the path and all above it but the root, outermost first."""
    components = path.split("/")
    return tuple("/".join(components[: depth + 1]) for depth in range(len(components)))


_CLASSES: dict[int, type[CheckpointError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EROFS: ReadOnly,
    errno.EACCES: ReadOnly,
    errno.EPERM: ReadOnly,
    errno.ENOENT: MissingFile,
    errno.ENOTDIR: MissingFile,
    errno.EEXIST: PathOccupied,
    errno.ENOTEMPTY: PathOccupied,
    errno.EISDIR: PathOccupied,
    errno.ELOOP: Unsafe,  # O_NOFOLLOW met a link
    errno.ENXIO: Unsafe,  # a pipe or device where a file is meant
}


_READING = frozenset({"open to read", "read", "list", "look at"})  # operations that a lack of rights makes no ReadOnly
_NUMBERS = ((FileNotFoundError, errno.ENOENT), (FileExistsError, errno.EEXIST), (PermissionError, errno.EACCES))


def storage_failure(error: OSError, operation: str, path: str) -> CheckpointError:
    """The error of this library for an OSError: "<operation> <path>: <what the system said>"."""
    # Other file systems than the kernel's raise these classes without a number.
    number = error.errno or next((number for cls, number in _NUMBERS if isinstance(error, cls)), None)
    if number is None:
        return StorageFailed(f"{operation} {path}: {str(error) or type(error).__name__}")
    said = "is a symbolic link, which no store follows" if number == errno.ELOOP else os.strerror(number)
    cls = _CLASSES.get(number, StorageFailed)
    if cls is ReadOnly and operation in _READING:
        cls = StorageFailed
    return cls(f"{operation} {path}: {said}")


class naming:
    """`with naming(operation, path):` turns an OSError inside into `storage_failure`, the OSError being its cause.

    A class and not a generator: it stands around every small file, and costs a third so.
    """

    __slots__ = ("operation", "path")

    def __init__(self, operation: str, path: str) -> None:
        self.operation = operation
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise storage_failure(error, self.operation, self.path) from error


Durability = Literal["power", "process"]
EntryKind = Literal["file", "directory", "other"]
Caching = Literal["fill", "spare"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do. Asking for what it cannot raises CapabilityMissing with the name of the field.

    exclusive_create    of two creators of one file exactly one succeeds
    no_replace_rename   so it is for the target of a rename
    directory_sync      names survive a power cut once their directory is synced
    tree_sync           `sync_tree` makes all durable and reports what could not be written
    conditional_put     a new file appears with its whole content or not at all
    ranged_writes       several writers fill disjoint ranges of one file
    sequential_only     a file is written front to back, by one writer
    shared_by_hosts     ranges of one file may be written from several hosts at once; an allow-list of file systems
    past_cache          large ranges of memory that lies like the file, modulo the page, are written without a copy
    directories         they exist by themselves; else names of files imply them, and `make_directories` does nothing
    name                of the file system or protocol: "ext4", "tmpfs", "memory", "s3", ...
    """

    exclusive_create: bool
    no_replace_rename: bool
    directory_sync: bool
    tree_sync: bool
    conditional_put: bool
    ranged_writes: bool
    sequential_only: bool
    shared_by_hosts: bool
    past_cache: bool
    directories: bool
    name: str


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One name in a directory. `other` is a link, device, socket or pipe; `nbytes` is 0 unless it is a file."""

    name: str
    kind: EntryKind
    nbytes: int


class RangeWriter(Protocol):
    """One file being filled by ranges. Ranges of all writers of a file are disjoint; that is the callers' care."""

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data`, which is C-contiguous, stands at `offset`, or an error is raised; not yet durable."""

    def sync(self) -> None:
        """What was written through this writer is durable. After a failure every later call raises, syncing nothing."""

    def close(self) -> None:
        """Gives up the file; raises what the store reports only now. The second call does nothing."""


class RangeReader(Protocol):
    """One file being read by ranges. `nbytes` is its size when it was opened."""

    @property
    def nbytes(self) -> int: ...

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills all of `into`, C-contiguous and writable, from `offset`. WrongLength where the file ends before."""

    def close(self) -> None:
        """Gives up the file. The second call does nothing."""


class Store(Protocol):
    @property
    def url(self) -> str:
        """Opens this store again: `open_store(store.url)`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def make_directories(self, path: str) -> None:
        """`path` is a directory, made with its missing parents below the first component.

        A path of several components needs its first one to exist (MissingFile): a late rank cannot bring back a draft
        that was swept. Raises PathOccupied where a component is no directory.
        """

    def create(self, path: str, data: bytes) -> None:
        """A new file with this content, not yet durable. PathOccupied, and nothing changed, if anything stands there.

        Nobody may open the file before `create` has returned; after an error it may exist with any part of its content.
        """

    def open_writer(self, path: str, nbytes: int) -> RangeWriter:
        """A writer of the file, created if need be; it has `nbytes` bytes from now on, unwritten ones read as zero."""

    def open_reader(self, path: str, *, cache: Caching = "fill") -> RangeReader:
        """A reader of an existing file, else MissingFile.

        `cache` is a hint to stores below which the system keeps what was read: "spare" for bytes that nobody on this host
        is known to want again soon. What is kept already is taken from there in both cases.
        """

    def read(self, path: str, limit: int) -> bytes:
        """The whole file. LimitExceeded, before anything is allocated, if it has more than `limit` bytes."""

    def size(self, path: str) -> int:
        """The file's number of bytes."""

    def sync_file(self, path: str) -> None:
        """The file's content is durable. May miss a failure that another writer's sync was told of already."""

    def sync_directory(self, path: str) -> None:
        """The names in this directory are durable (not the content of what they name)."""

    def sync_tree(self) -> None:
        """All that was written through this store is durable, names included; one call instead of one for each file."""

    def rename(self, source: str, target: str) -> None:
        """`target` is what `source` was. PathOccupied, and nothing is changed, where `target` stands already.

        An empty directory may be replaced by a directory. A directory moves in one step; a file may for a moment,
        or after a crash, have both names.
        """

    def remove(self, path: str) -> None:
        """No file has this name; that there was none is no error. A link is removed, not what it points to."""

    def remove_tree(self, path: str) -> None:
        """Nothing has this name, a directory goes with all it holds; that others remove it too is no error."""

    def entries(self, path: str) -> tuple[Entry, ...]:
        """What the directory holds, by name. MissingFile if it is not there."""

    def exists(self, path: str) -> bool:
        """Whether anything has this name."""


class Lending(Protocol):
    """How a reader gives bytes to who looks at them at once. All raise as `read_into` does; memory that is given is one axis of
    bytes, writable."""

    def lend(self, offset: int, into: memoryview) -> memoryview:
        """All that `read_into` fills its memory with: `into` itself, or memory of the calling thread's, until its next call of
        any reader. Who looks at it there, and copies it then, has it in the core's cache both times."""

    def fill_each(self, offset: int, groups: Sequence[Sequence[memoryview]], look: Callable[[memoryview], int]) -> list[int]:
        """Fills these groups, of at most 1,024 views each, with what follows each other in the file, a group at a call if the
        reader can; what `look` finds in each view while it is still in the core's cache."""

    def fill(self, offset: int, parts: Sequence[memoryview]) -> bool:
        """Fills these with what follows each other in the file, without a copy of its own; False, and nothing was done, if it
        cannot: then `lend` them. At most 1,024."""

    def lend_several(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview] | None:
        """What `lend` would give of each of several ranges of bytes, (offset, number), in their order, read at once; None, and
        nothing was done, if that would be no less work: then `lend` each."""


def one_by_one(
    read_into: Callable[[int, memoryview], None],
    offset: int,
    groups: Sequence[Sequence[memoryview]],
    look: Callable[[memoryview], int],
) -> list[int]:
    """`Lending.fill_each` of a reader that has nothing quicker than `read_into`."""
    found: list[int] = []
    for group in groups:
        for view in group:
            read_into(offset, view)
            offset += len(view)
            found.append(look(view))
    return found


class _Filling:
    """Of a reader that has no memory of its own."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader

    def lend(self, offset: int, into: memoryview) -> memoryview:
        self._reader.read_into(offset, into)
        return into

    def fill_each(self, offset: int, groups: Sequence[Sequence[memoryview]], look: Callable[[memoryview], int]) -> list[int]:
        return one_by_one(self._reader.read_into, offset, groups, look)

    def fill(self, offset: int, parts: Sequence[memoryview]) -> bool:
        return False

    def lend_several(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview] | None:
        return None


def lending_of(reader: RangeReader) -> Lending:
    """The reader's own way, or `read_into`."""
    return cast("Lending", reader) if hasattr(reader, "fill_each") else _Filling(reader)  # to ask for a protocol takes 50 µs


@runtime_checkable
class KnowsItsMedium(Protocol):
    """A store that knows, without trying anything, whether what it reads lies in memory already."""

    @property
    def in_memory(self) -> bool: ...


def is_in_memory(store: Store) -> bool:
    """Whether reads are known to be copies."""
    return isinstance(store, KnowsItsMedium) and store.in_memory


@runtime_checkable
class Stamping(Protocol):
    """A store that knows when a file was written last."""

    def stamp(self, path: str) -> str:
        """The file's size and when it was written, or its version, in words: others once it was written again."""


def stamp_of(store: Store, path: str) -> str:
    """What tells whether a file was written since; its size alone where the store knows no more."""
    return store.stamp(path) if isinstance(store, Stamping) else f"{store.size(path)} bytes"
