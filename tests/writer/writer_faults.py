"""Faults inside a writer process, which imports them by name: `conftest.py` has this folder on its path.

`hook("kill", 7)`, one of `WriterOptions.hooks`, is SIGKILL at its 7th change of a store.
"""

from __future__ import annotations

import os
import signal
import time

from elastickpt.storage.store import Store
from elastickpt.testing.faults import CHANGING, CallAt, FaultyStore, Operation


def hook(name: str, argument: object) -> str:
    """The hook `name` of this module, as a writer process is told of it."""
    return f"{__name__}:{name}:{argument}"


def kill(store: Store, at: str) -> Store:
    """SIGKILL before operation `at`; "7+" is after it, "7/" in its middle."""
    mode = {"+": "after", "/": "torn"}.get(at[-1], "before")
    return FaultyStore(store, CallAt(int(at.rstrip("+/")), _kill, mode=mode), counted=CHANGING)  # type: ignore[arg-type]


def pause(store: Store, at: str) -> Store:
    """SIGSTOP before operation `at`, by itself; it goes on with SIGCONT."""
    return FaultyStore(store, CallAt(int(at), _stop), counted=CHANGING)


def slow(store: Store, seconds: str) -> Store:
    """Every sync of a file takes so long."""
    return FaultyStore(store, CallAt(1, lambda _: time.sleep(float(seconds)), lasting="from then on"), counted=_SYNCS)


_SYNCS = frozenset({"writer.sync", "sync_file"})


def _kill(operation: Operation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(operation: Operation) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
