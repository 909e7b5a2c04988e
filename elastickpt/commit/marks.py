"""Marks of attempts that are worked on: names that all processes of a host can list. [SAVE-86]

A trainer makes the mark when it hands an attempt to its writer, and the writer gets it too, by descriptor. A name in the
abstract socket namespace is there as long as anybody has it, or has been sent it, and goes with the last process, however that
ends: no file is left behind, no lock to break.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection
from pathlib import Path

from elastickpt.format.digest import block_checksum
from elastickpt.ranks.addresses import not_in_forks

_PREFIX = "@elastickpt-work-"  # as /proc/net/unix shows it; the first byte of the name is zero


def mark(store: str, attempt: str) -> socket.socket:
    """The mark of a new attempt of this process, below that store's root; there until it is closed everywhere."""
    held = not_in_forks(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    held.bind(f"\0{_PREFIX[1:]}{_place(store)}-{attempt}-{secrets.token_hex(4)}")
    return held


def marked(store: str) -> Collection[str]:
    """The attempts below that store's root that writers of this host are working on now."""
    prefix = f"{_PREFIX}{_place(store)}-"
    names = (line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text(errors="replace").splitlines())
    return frozenset(name.removeprefix(prefix).rpartition("-")[0] for name in names if name.startswith(prefix))


def _place(store: str) -> str:
    return block_checksum(store.encode()).to_bytes(8, "big").hex()
