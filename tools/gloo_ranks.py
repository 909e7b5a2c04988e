"""Real gloo ranks for tests and tools: each rank is a process, forked from one that has imported torch once.

    def sums(rank: int, world_size: int, value: float) -> float:
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor)
        return tensor.item()

    assert run_ranks(sums, 4, 2.0) == [8.0, 8.0, 8.0, 8.0]

The function is named, not sent: it stands at the top level of a module, which the forking process imports once.
Arguments and results cross processes as multiprocessing sends them, tensors by their contents.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from multiprocessing import connection as channels
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from elastickpt.errors import DeadlineExceeded, RankLost
from tools.gloo_zygote import Answer, FunctionName, Launch, Reap, decode, encode

GRACE_S = 5.0  # what the other ranks get to end in, once one has failed
DUMP_S = 20.0  # from SIGABRT, at which a rank dumps its stacks, to SIGKILL
OUTPUT_TAIL = 8000  # bytes of a failed rank's output that its error shows


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """How a rank ended: with a `value`, or with `error`; `status` is its exit status, -n after signal n.

    `traceback` and `output` (stdout and stderr together, its stacks if it hung) are for people. `at` is the monotonic
    time of its answer, infinite if it gave none: the first failure is the cause of the others.
    """

    rank: int
    value: Any
    error: BaseException | None
    traceback: str
    status: int
    output: str
    at: float


def run_ranks(function: Callable[..., object], world_size: int, *args: object, timeout_s: float = 60.0) -> list[Any]:
    """The results of `function(rank, world_size, *args)`, by rank, each run in a process of its own in one gloo group.

    Raises the first rank's error, with its traceback and what the others said as notes. A rank that does not end within
    `timeout_s`, or within 5 s after another has failed, is killed and reported with its stacks.
    """
    with spawn_ranks(function, world_size, *args, timeout_s=timeout_s) as ranks:
        outcomes = ranks._collect(grace_s=GRACE_S)
    failed = sorted((outcome for outcome in outcomes if outcome.error is not None), key=lambda outcome: outcome.at)
    if failed:
        raise _noted(failed)
    return [outcome.value for outcome in outcomes]


def spawn_ranks(function: Callable[..., object], world_size: int, *args: object, timeout_s: float = 60.0) -> Ranks:
    """Starts the ranks of `run_ranks` and returns at once, for tests that kill some of them."""
    return _zygote().launch(function, world_size, args, timeout_s)


class Ranks:
    """Running ranks. As a context it ends by killing those that are left."""

    def __init__(self, zygote: _Zygote, pids: tuple[int, ...], pipes: list[Any], outputs: list[int], limit: float) -> None:
        self.pids = pids
        self._zygote = zygote
        self._pipes = pipes
        self._outputs = outputs
        self._limit = limit
        self._answers: dict[int, Answer | None] = {}  # None: ended without an answer
        self._late: set[int] = set()
        self._statuses: list[int] | None = None

    def kill(self, rank: int) -> None:
        """Ends a rank with SIGKILL."""
        self.send_signal(rank, signal.SIGKILL)

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank; nothing happens if it has ended."""
        if self._statuses is None:  # not reaped yet, so the pid is still this rank's
            os.kill(self.pids[rank], number)

    def wait(self) -> tuple[Outcome, ...]:
        """How each rank ended, by rank; those that outlive the limit are killed first. Raises nothing of theirs."""
        return self._collect(grace_s=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._statuses is None:
            self._end()
        for pipe in self._pipes:
            pipe.close()
        for fd in self._outputs:
            os.close(fd)

    def _collect(self, *, grace_s: float | None) -> tuple[Outcome, ...]:
        if self._statuses is None:
            deadline = self._limit
            while len(self._answers) < len(self.pids) and (left := deadline - time.monotonic()) > 0:
                failed = self._receive(left)
                if failed and grace_s is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
            self._late = set(range(len(self.pids))) - self._answers.keys()
            self._abort(self._late)
            self._end()
        return tuple(self._outcome(rank) for rank in range(len(self.pids)))

    def _receive(self, timeout_s: float) -> bool:
        """Takes in what ranks have answered, and says whether one of them failed."""
        waiting = {self._pipes[rank]: rank for rank in range(len(self.pids)) if rank not in self._answers}
        failed = False
        for pipe in channels.wait(list(waiting), timeout=timeout_s):
            rank = waiting[pipe]
            answer = _received(pipe)
            self._answers[rank] = answer
            failed |= answer is None or bool(answer.traceback)
        return failed

    def _abort(self, ranks: set[int]) -> None:
        """Lets ranks that hang dump their stacks; SIGCONT, so that a stopped one gets the signal."""
        for rank in ranks:
            self.send_signal(rank, signal.SIGABRT)
            self.send_signal(rank, signal.SIGCONT)
        limit = time.monotonic() + DUMP_S
        while len(self._answers) < len(self.pids) and (left := limit - time.monotonic()) > 0:
            self._receive(left)

    def _end(self) -> None:
        for rank in range(len(self.pids)):
            if self._answers.get(rank) is None:
                self.kill(rank)
            with suppress(OSError):
                self._pipes[rank].send_bytes(b"")  # all are done: leave
        self._statuses = self._zygote.reap(self.pids)

    def _outcome(self, rank: int) -> Outcome:
        answer = self._answers.get(rank)
        status = os.waitstatus_to_exitcode((self._statuses or [])[rank])
        output = _tail(self._outputs[rank])
        if rank in self._late:
            text = f"rank {rank} had not ended when the limit passed; its stacks:\n{output}"
            return Outcome(rank, None, DeadlineExceeded(text), "", status, output, inf)
        if answer is None:
            text = f"rank {rank} ended with status {status} before it answered; its output:\n{output}"
            return Outcome(rank, None, RankLost(text), "", status, output, inf)
        error = answer.error
        if error is None and answer.traceback:
            error = RuntimeError(answer.traceback)
        return Outcome(rank, answer.value, error, answer.traceback, status, output, answer.at)


def _received(pipe: Any) -> Answer | None:
    try:
        answer: Answer = decode(pipe.recv_bytes())
    except (EOFError, OSError):
        return None
    return answer


class _Zygote:
    """The forking process, started at the first launch."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from tools.gloo_zygote import serve; serve({there.fileno()})"
        self.owner = os.getpid()
        self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        self._socket = here
        self._control: Any = Connection(os.dup(here.fileno()))
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def launch(self, function: Callable[..., object], world_size: int, args: tuple[object, ...], timeout_s: float) -> Ranks:
        where = FunctionName(function.__module__, function.__code__.co_filename, function.__name__)
        if function.__qualname__ != function.__name__:
            raise ValueError(f"{function.__qualname__} is no top-level function, so no other process finds it")
        pairs = [socket.socketpair() for _ in range(world_size)]
        outputs = [os.memfd_create(f"rank{rank}") for rank in range(world_size)]
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            fds = [fd for pair, output in zip(pairs, outputs, strict=True) for fd in (pair[1].fileno(), output)]
            self._control.send(Launch(where, encode(args), world_size, timeout_s))
            socket.send_fds(self._socket, [b"f"], [*fds, listener.fileno()])
            pids = self._control.recv()
        pipes = [Connection(pair[0].detach()) for pair in pairs]
        for pair in pairs:
            pair[1].close()
        if isinstance(pids, str):
            for pipe in pipes:
                pipe.close()
            for output in outputs:
                os.close(output)
            raise ImportError(f"{where.file} cannot be imported for its function {where.name}:\n{pids}")
        return Ranks(self, tuple(pids), pipes, outputs, time.monotonic() + timeout_s)

    def reap(self, pids: tuple[int, ...]) -> list[int]:
        self._control.send(Reap(pids))
        statuses: list[int] = self._control.recv()
        return statuses

    def close(self) -> None:
        """Ends the forking process and every rank of it."""
        if self.owner != os.getpid():
            return
        self._control.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)


_started: list[_Zygote] = []


def _zygote() -> _Zygote:
    if not _started or not _started[-1].alive:
        _started.append(_Zygote())
    return _started[-1]


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, OUTPUT_TAIL, max(0, size - OUTPUT_TAIL))
    return data.decode(errors="replace")


def _noted(failed: list[Outcome]) -> BaseException:
    first = failed[0]
    error = first.error or RuntimeError(first.traceback)
    error.add_note(f"in rank {first.rank}:\n{first.traceback}{first.output}")
    for other in failed[1:]:
        error.add_note(f"rank {other.rank}: {type(other.error).__name__}: {other.error}")
    return error
