"""OSErrors as errors of this library, with the operation and the path that they belong to."""

from __future__ import annotations

import errno
import os
from types import TracebackType

from elastickpt.errors import CheckpointError, MissingFile, NoSpace, PathOccupied, ReadOnly, StorageFailed, Unsafe

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
