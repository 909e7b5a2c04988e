"""Threads that carry out what they are given: one after the other, or shared out among several."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Self, TypeVar

T = TypeVar("T")

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


class Pool:
    """So many threads at most, for work that is shared out; they begin as there is some, and end with the pool. A context
    manager that closes it."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def share_out(self, items: Sequence[T], work: Callable[[T], object]) -> None:
        """Does the work for each item; each thread takes the next one, in their order. Blocking: once it returns or raises, no
        thread is at work.

        Raises the first failure, after which no item is begun. The calling thread does it alone where one is enough, and where
        no thread begins any more: a process at its end waits for what is still written.
        """
        if min(len(items), self._threads) <= 1:
            for item in items:
                work(item)
            return
        pending, taking, ended = iter(items), threading.Lock(), threading.Event()

        def work_off() -> None:
            while not ended.is_set():
                with taking:
                    item = next(pending, _NOTHING)
                if isinstance(item, _Nothing):
                    return
                try:
                    work(item)
                except BaseException:
                    ended.set()
                    raise

        futures: list[Future[None]] = []
        with suppress(RuntimeError):  # no thread begins any more
            for _ in range(min(self._threads, len(items))):
                futures.append(self._executor.submit(work_off))  # noqa: PERF401  # those before an error count
        if not futures:
            work_off()
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # an interrupt, too
            failed_first = [future for future in futures if future.done() and future.exception() is not None]
            if failed_first or any(not future.done() for future in futures):
                ended.set()
            wait(futures)
        for future in (*failed_first, *futures):
            future.result()

    def begin(self, work: Callable[[], None]) -> Future[None]:
        """Does it meanwhile, or at once where no thread begins any more. Its result is that of the work."""
        try:
            return self._executor.submit(work)
        except RuntimeError:
            done: Future[None] = Future()
            work()
            done.set_result(None)
            return done

    def close(self) -> None:
        """Ends the threads once what they do is done. Blocking."""
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Nothing:
    """There is no item left."""


_NOTHING = _Nothing()
