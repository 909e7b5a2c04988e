"""The workers of one machine: a zygote forks them, and what becomes of them is known as soon as the kernel knows.

A zygote that ends takes nobody along. Another one is started, as long as the one before had forked anybody; of the workers that
it leaves the end is seen by descriptors of their processes, but not how they ended. [REC-46]
"""

from __future__ import annotations

import logging
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
from elastickpt.ranks.addresses import not_in_forks

log = logging.getLogger(__name__)

_CODE = "import sys; from elastickpt.elastic.zygote import main; sys.exit(main({}, {}))"
PRELOADED = ("torch", "torch.distributed.pipelining", "elastickpt.training.modules", "elastickpt.elastic.trainer")


class ZygoteLost(Exception):
    """The process that workers are forked from has ended before it forked any."""


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """What every worker runs: script and arguments; `log_dir` for its output, None for where the launcher's goes."""

    argv: tuple[str, ...]
    log_dir: Path | None = None


class Agent:
    """Workers by uid. Starting is not blocking, killing neither."""

    def __init__(self, program: WorkerProgram, told: Told) -> None:
        self._program, self._told = program, told
        self._pids: dict[str, int] = {}
        self._handles: dict[str, int] = {}  # by uid: a descriptor of its process, which no other one ever has
        self._ordered: dict[str, bytes] = {}  # by uid: to be forked, as the zygote was told
        self._left: dict[int, str] = {}  # by descriptor of its process: who was forked by an earlier zygote
        self._killed: set[str] = set()
        self._doomed: set[str] = set()
        self._poll = select.epoll()
        self._begin()

    def _begin(self) -> None:
        """Starts a zygote. Not blocking."""
        self._forks = 0
        ours, theirs = socket.socketpair()
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(theirs.fileno(), PRELOADED)],
                pass_fds=[theirs.fileno()],
                env=environment.of_children(OMP_NUM_THREADS="1"),
                start_new_session=True,
            )
        self._stream = Stream(not_in_forks(ours))
        self._poll.register(self._stream, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when something became of a worker, or of the zygote."""
        return self._poll.fileno()

    @property
    def waits(self) -> bool:
        return self._stream.waits

    def flush(self) -> None:
        self._stream.flush()

    def start(self, uid: str) -> None:
        variables = {**self._told.variables(), environment.UID: uid}
        log = "" if self._program.log_dir is None else str(self._program.log_dir / f"{uid}.log")
        self._ordered[uid] = order = request(Fork(uid, self._program.argv, variables, log))
        self._stream.send(order)

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
        for handle in [handle for handle, _ in self._poll.poll(0) if handle in self._left]:
            yield self._gone(handle)
        try:
            received = self._stream.receive()
        except Closed:
            yield from self._outlive()
            return
        for data in received:
            said = answer(data)
            yield self._forked(said) if isinstance(said, Forked) else self._ended(said)

    def _outlive(self) -> Iterator[FromLauncher]:
        """The zygote is gone: its workers live on, and another one forks those that it had not."""
        self._poll.unregister(self._stream)
        self._stream.close()
        how = f"the process that forks workers ended with {self._zygote.wait()}"
        if not self._forks:
            raise ZygoteLost(how)
        log.warning("%s; another one is started, and its %d workers live on", how, len(self._pids))
        for uid in list(self._pids):
            if (handle := self._handles.get(uid)) is None:  # it had ended before it could be looked at
                del self._pids[uid]
                yield Stopped(uid, None, None, uid in self._killed)
            elif handle not in self._left:
                self._left[handle] = uid
                self._poll.register(handle, select.EPOLLIN)
        self._begin()
        for order in self._ordered.values():
            self._stream.send(order)

    def _gone(self, handle: int) -> Stopped:
        """A worker of an earlier zygote has ended, nobody here knows how."""
        uid = self._left.pop(handle)
        self._poll.unregister(handle)
        os.close(handle)
        del self._handles[uid], self._pids[uid]
        return Stopped(uid, None, None, uid in self._killed)

    def _forked(self, said: Forked) -> Started:
        self._forks += 1
        self._ordered.pop(said.uid, None)
        self._pids[said.uid] = said.pid
        with suppress(ProcessLookupError):
            self._handles[said.uid] = os.pidfd_open(said.pid)
        if said.uid in self._doomed:
            self.kill(said.uid)
        return Started(said.uid, said.pid)

    def _ended(self, said: Ended) -> Stopped:
        uid = next(uid for uid, pid in self._pids.items() if pid == said.pid and self._handles.get(uid) not in self._left)
        del self._pids[uid]
        if (handle := self._handles.pop(uid, None)) is not None:
            os.close(handle)
        by_signal = os.WIFSIGNALED(said.status)
        code = -1 if by_signal else os.WEXITSTATUS(said.status)
        return Stopped(uid, os.WTERMSIG(said.status) if by_signal else None, code, uid in self._killed)

    def close(self) -> None:
        """Ends the zygote and reaps it. Workers that are there get the time that the loss of a launcher gives them.
        Blocking."""
        self._poll.close()
        self._stream.close()
        self._zygote.wait()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
