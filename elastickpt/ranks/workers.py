"""Threads that carry out what they are given, one after the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Worker:
    """A thread that carries out what is put, in order; started by the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], None]) -> None:
        """Carried out after what was put before; not blocking. From any thread."""
        self._work.put(work)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=_work_off, args=(self._work,), name=self._name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Ends after what was put; not blocking."""
        self._work.put(None)

    def join(self, limit_s: float) -> None:
        """After `stop`: waits at most so long for what was put. Blocking."""
        if self._thread is not None:
            self._thread.join(limit_s)


def _work_off(items: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := items.get()) is not None:
        try:
            work()
        except Exception:
            log.exception("work beside training met a fault of its own")
        del work  # it holds a state
