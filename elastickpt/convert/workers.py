"""Several processes that carry out one conversion: each decides the same whole, and does its share of it by bytes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from elastickpt.errors import CheckpointError, WriterLost, kinds

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

    def __init__(self, processes: list[tuple[BaseProcess, Connection]], progress: Callable[[int], None]) -> None:
        self._processes, self._progress = processes, progress

    def answers(self) -> list[Answer]:
        """What each helper did, by number. Blocking. Raises what a helper raised, WriterLost for one that just ended."""
        found = []
        for number, (process, connection) in enumerate(self._processes, start=1):
            while True:
                try:
                    said = connection.recv()
                except EOFError:
                    process.join(STOP_S)
                    raise WriterLost(f"worker {number} of the conversion ended, exit code {process.exitcode}") from None
                if isinstance(said, int):
                    self._progress(said)
                    continue
                if isinstance(said, _Failure):
                    raise kinds().get(said.kind, CheckpointError)(f"worker {number}: {said.message}")
                found.append(said)
                break
        return found

    def stop(self) -> None:
        """Ends those that still run."""
        for process, connection in self._processes:
            connection.close()
            if process.is_alive():
                process.terminate()
            process.join(STOP_S)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def helpers(
    work: Callable[..., Answer], arguments: Sequence[tuple[Any, ...]], progress: Callable[[int], None]
) -> Iterator[Helpers[Answer]]:
    """Starts a process for each tuple of arguments, which calls `work(*arguments, tell)`; all have ended when this ends."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[BaseProcess, Connection]] = []
    both: Helpers[Answer] = Helpers(started, progress)
    try:
        for some in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, some, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        yield both
    finally:
        both.stop()


def _run(work: Callable[..., Answer], arguments: tuple[Any, ...], connection: Connection, parent: int) -> None:
    def tell(nbytes: int) -> None:
        if os.getppid() != parent:  # nobody waits for what this one does
            raise KeyboardInterrupt
        connection.send(nbytes)

    try:
        connection.send(work(*arguments, tell))
    except CheckpointError as error:
        connection.send(_Failure(error.kind, error.message))
    except (KeyboardInterrupt, BrokenPipeError):
        pass
