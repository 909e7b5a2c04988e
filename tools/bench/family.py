"""Memory of a rank with all processes that it started: what several of them share counts once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil

EVERY_S = 0.02


def family_nbytes() -> int:
    """Proportional set size of this process and its descendants now."""
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    # this process last: what a child maps between two readings would count twice the other way round
    return sum(_proportional_nbytes(pid) for pid in (*children, os.getpid()))


def _proportional_nbytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0  # it ended meanwhile
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Peak:
    """The largest `family_nbytes` seen while inside, some fifty times a second."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, family_nbytes())
            if self._ended.wait(EVERY_S):
                return
