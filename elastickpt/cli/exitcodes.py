"""From what happened to the exit code of the process. [CLI-10]"""

from __future__ import annotations

from collections.abc import Iterable

from elastickpt.errors import CheckpointError, Damaged, Unsafe, Unsupported, kinds

DONE = 0
FAILED = 1
USAGE = 2
DAMAGED = 3
UNSUPPORTED = 4
UNSAFE = 5
DIFFERENT = 6  # of `diff` and `check`: a difference was found
INTERRUPTED = 130  # as a shell says of a process that SIGINT ended
PIPE_CLOSED = 141  # as a shell says of a process that SIGPIPE ended

# A class that is not here has the code of the nearest class above it in the tree of errors.
_OF_CLASS: dict[type[CheckpointError], int] = {
    CheckpointError: FAILED,
    Damaged: DAMAGED,
    Unsupported: UNSUPPORTED,
    Unsafe: UNSAFE,
}
_GRAVEST_FIRST = (UNSAFE, DAMAGED, UNSUPPORTED, FAILED, DONE)


def code_of(error: type[CheckpointError]) -> int:
    """The exit code of an error's class."""
    return next(_OF_CLASS[cls] for cls in error.__mro__ if issubclass(cls, CheckpointError) and cls in _OF_CLASS)


def code_of_kind(kind: str) -> int:
    """The exit code of an error known by its kind."""
    return code_of(kinds().get(kind, CheckpointError))


def gravest(codes: Iterable[int]) -> int:
    """The one code of several outcomes, DONE when there are none. [CLI-11]"""
    found = set(codes)
    return next((code for code in _GRAVEST_FIRST if code in found), DONE)
