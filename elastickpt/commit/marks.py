"""Marks of living writers: while a writer works on an attempt it holds a name that all processes of its host can list.

A name in the abstract socket namespace goes with its process, however that ends: no file is left behind, no lock to break.
[SAVE-86]
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from pathlib import Path

from elastickpt.format.digest import block_checksum

_PREFIX = "@elastickpt-work-"  # as /proc/net/unix shows it; the first byte of the name is zero


def mark(store: str, attempt: str) -> socket.socket:
    """Holds the mark of this process for the attempt below that store's root until it is closed."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    held.bind(f"\0{_PREFIX[1:]}{_place(store)}-{attempt}-{os.getpid()}")
    return held


def marked(store: str) -> Collection[str]:
    """The attempts below that store's root that writers of this host are working on now."""
    prefix = f"{_PREFIX}{_place(store)}-"
    names = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text(errors="replace").splitlines())
    return frozenset(name.removeprefix(prefix).rpartition("-")[0] for name in names if name.startswith(prefix))


def _place(store: str) -> str:
    return block_checksum(store.encode()).to_bytes(8, "big").hex()
