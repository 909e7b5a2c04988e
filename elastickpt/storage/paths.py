"""Paths below a store's root: relative, POSIX, without any component that leads elsewhere."""

from __future__ import annotations

import re

from elastickpt.errors import Unsafe

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
