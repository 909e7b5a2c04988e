"""Several processes that carry out one conversion: each decides the same whole, and does its share of it by bytes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from elastickpt.errors import CheckpointError, WriterLost, kinds
from elastickpt.ranks.threads import Pool
from elastickpt.storage.kernel import end_with_parent

Answer = TypeVar("Answer")
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: str
    message: str


def shares(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Which tasks each worker does: the largest first, each to whoever has least; in the order of the tasks."""
    loads = [0] * workers
    found: list[list[int]] = [[] for _ in range(workers)]
    for number in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        worker = loads.index(min(loads))
        loads[worker] += sizes[number]
        found[worker].append(number)
    return [sorted(some) for some in found]


class Helpers(Generic[Answer]):
    """Workers 1, 2, ... of a conversion, each a process of its own; this process is worker 0."""

    def __init__(self, started: Sequence[tuple[BaseProcess, Connection]], progress: Callable[[int], None]) -> None:
        self._processes = [process for process, _ in started]
        self._listening = Pool("elastickpt-helpers", max(1, len(started)))
        self._answers = [
            self._listening.begin(partial(_listen, number, process, connection, progress))
            for number, (process, connection) in enumerate(started, start=1)
        ]

    def require(self) -> None:
        """Raises what a helper raised, if one did so far."""
        for answer in self._answers:
            if answer.done():
                answer.result()

    def answers(self) -> list[Answer]:
        """What each helper did, by number. Blocking. Raises what a helper raised, WriterLost for one that just ended."""
        return [answer.result() for answer in self._answers]

    def stop(self) -> None:
        """Ends those that still run."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._listening.close()


def _listen(number: int, process: BaseProcess, connection: Connection, progress: Callable[[int], None]) -> Any:
    """What a helper says last; before that it tells bytes that it has written."""
    with connection:
        while True:
            try:
                said = connection.recv()
            except (EOFError, ConnectionError):
                process.join(STOP_S)
                raise WriterLost(
                    f"worker {number} of the conversion ended, exit code {process.exitcode}; what is done stays in the draft, "
                    "and the same command goes on from it"
                ) from None
            if isinstance(said, _Failure):
                raise kinds().get(said.kind, CheckpointError)(f"worker {number}: {said.message}")
            if not isinstance(said, int):
                return said
            progress(said)


@contextmanager
def helpers(
    work: Callable[[int, Callable[[int], None]], Answer], count: int, progress: Callable[[int], None]
) -> Iterator[Helpers[Answer]]:
    """Starts so many processes, the nth of which calls `work(n, tell)`, n from 1; all have ended when this ends.

    They are forks: what is decided needs not be decided again, and no file be opened twice. So begin no threads before, and
    nothing that threads of others may hold is used there.
    """
    context = multiprocessing.get_context("fork")
    started: list[tuple[BaseProcess, Connection]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 where somebody else has threads, as a bar has one
        for number in range(1, count + 1):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, number, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
    both: Helpers[Answer] = Helpers(started, progress)
    try:
        yield both
    finally:
        both.stop()


def _run(work: Callable[[int, Callable[[int], None]], Answer], number: int, connection: Connection, parent: int) -> None:
    saying = threading.Lock()

    def tell(nbytes: int) -> None:
        with saying:
            connection.send(nbytes)

    try:
        end_with_parent()
        if os.getppid() != parent:  # it ended before: nobody waits for what this one does
            return
        connection.send(work(number, tell))
    except CheckpointError as error:
        connection.send(_Failure(error.kind, error.message))
    except (KeyboardInterrupt, BrokenPipeError):
        pass
