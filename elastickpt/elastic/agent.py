"""The workers of one machine: a zygote forks them, and what becomes of them is known as soon as the kernel knows."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastickpt.elastic import environment
from elastickpt.elastic.enlisting import FromLauncher, Started, Stopped
from elastickpt.elastic.environment import Told
from elastickpt.elastic.stream import Closed, Stream
from elastickpt.elastic.zygote import Ended, Fork, Forked, answer, request

_CODE = "import sys; from elastickpt.elastic.zygote import main; sys.exit(main({}, {}))"
PRELOADED = ("torch", "torch.distributed.pipelining", "elastickpt.training.modules", "elastickpt.elastic.trainer")


class ZygoteLost(Exception):
    """The process that workers are forked from has ended."""


@dataclass(frozen=True, slots=True)
class Program:
    """What every worker runs: script and arguments; `log_dir` for its output, None for where the launcher's goes."""

    argv: tuple[str, ...]
    log_dir: Path | None = None


class Agent:
    """Workers by uid. Starting is not blocking, killing neither."""

    def __init__(self, program: Program, told: Told) -> None:
        self._program, self._told = program, told
        self._pids: dict[str, int] = {}
        self._handles: dict[str, int] = {}  # by uid: a descriptor of its process, which no other one ever has
        self._killed: set[str] = set()
        self._doomed: set[str] = set()
        ours, theirs = socket.socketpair()
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(theirs.fileno(), PRELOADED)],
                pass_fds=[theirs.fileno()],
                env=environment.of_children(OMP_NUM_THREADS="1"),
                start_new_session=True,
            )
        self._stream = Stream(ours)

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def waits(self) -> bool:
        return self._stream.waits

    def flush(self) -> None:
        self._stream.flush()

    def start(self, uid: str) -> None:
        variables = {**self._told.variables(), environment.UID: uid}
        log = "" if self._program.log_dir is None else str(self._program.log_dir / f"{uid}.log")
        self._stream.send(request(Fork(uid, self._program.argv, variables, log)))

    def kill(self, uid: str) -> None:
        """SIGKILL, also for a process that is stopped; one that is not forked yet, as soon as it is."""
        if (handle := self._handles.get(uid)) is None:
            self._doomed.add(uid)
        elif not select.select([handle], [], [], 0)[0]:  # it has not ended by itself
            self._killed.add(uid)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def receive(self) -> Iterator[FromLauncher]:
        """What became of workers since. Raises ZygoteLost."""
        try:
            received = self._stream.receive()
        except Closed:
            raise ZygoteLost(f"the process that forks workers ended with {self._zygote.wait()}") from None
        for data in received:
            said = answer(data)
            yield self._forked(said) if isinstance(said, Forked) else self._ended(said)

    def _forked(self, said: Forked) -> Started:
        self._pids[said.uid] = said.pid
        with suppress(ProcessLookupError):
            self._handles[said.uid] = os.pidfd_open(said.pid)
        if said.uid in self._doomed:
            self.kill(said.uid)
        return Started(said.uid, said.pid)

    def _ended(self, said: Ended) -> Stopped:
        uid = next(uid for uid, pid in self._pids.items() if pid == said.pid)
        del self._pids[uid]
        if (handle := self._handles.pop(uid, None)) is not None:
            os.close(handle)
        by_signal = os.WIFSIGNALED(said.status)
        code = -1 if by_signal else os.WEXITSTATUS(said.status)
        return Stopped(uid, os.WTERMSIG(said.status) if by_signal else None, code, uid in self._killed)

    def close(self) -> None:
        """Ends the zygote and reaps it. Workers that are there get the time that the loss of a launcher gives them.
        Blocking."""
        self._stream.close()
        self._zygote.wait()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
