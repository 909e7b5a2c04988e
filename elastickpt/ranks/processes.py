"""Which processes the ranks of a job are, on which machine, and which of them are known to be gone."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elastickpt.errors import RankFailure, RankLost


def host_identity() -> str:
    """Equal for two processes if they share boot, process ids and abstract sockets: same machine, same namespaces."""
    return _identity("net", "pid")


def socket_identity() -> str:
    """Equal for two processes if an abstract socket of one is reached by the other: process ids may be apart."""
    return _identity("net")


def _identity(*kinds: str) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join((socket.gethostname(), boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in kinds)))


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its host as `host_identity` says it, its id there, and when it began as that host counts it."""

    host: str
    pid: int
    start: int


def this_process() -> Process:
    return Process(host_identity(), os.getpid(), process_start(os.getpid()) or 0)


def process_start(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot; None if there is none, or it may not be looked at."""
    fields = process_fields(pid)
    return None if fields is None else int(fields[19])


def process_fields(pid: int) -> list[str] | None:
    """What the kernel says of a process, from its state on (proc(5), `stat`, from field 3)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()  # the command before it may hold spaces and parentheses


def process_is_there(pid: int) -> bool:
    """Whether this host has a process of this id, one that nobody has reaped yet among them."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is there, and somebody else's
    return True


def is_gone(process: Process) -> bool:
    """Whether a process of this host has certainly ended, one that nobody has reaped yet among them."""
    fields = process_fields(process.pid)
    if fields is None:
        return not process_is_there(process.pid)  # if it is, it does not show itself
    state, threads, began = fields[0], int(fields[17]), int(fields[19])
    return (process.start not in (0, began)) or (state in "ZX" and threads <= 1)


_EXITING = 0x4  # PF_EXITING of the kernel's include/linux/sched.h: the flag is set before any file is closed


def is_ending(process: Process) -> bool:
    """Whether a process of this host is about to have ended: what it had open is closed before that. False where it does not
    show itself."""
    fields = process_fields(process.pid)
    return fields is not None and process.start in (0, int(fields[19])) and bool(int(fields[6]) & _EXITING)


class Acquaintances:
    """What this process knows of the ranks of one job, from whichever team met them: their processes, and who is lost.

    A job whose rank is gone never gets it back: a loss is known for good, with the moment at which it was noticed first. Any
    thread may ask and tell.
    """

    def __init__(self) -> None:
        self._host = host_identity()
        self._processes: dict[int, Process] = {}
        self._losses: dict[int, str] = {}
        self._changing = threading.Lock()

    def met(self, rank: int, process: Process) -> None:
        """That rank is this process."""
        with self._changing:
            self._processes[rank] = process

    def lives_here(self, rank: int) -> bool:
        """Whether the rank's process is on this host and was there a moment ago."""
        with self._changing:
            process = self._processes.get(rank)
        return process is not None and process.host == self._host and not is_gone(process)

    def ends_here(self, rank: int) -> bool:
        """Whether the rank's process is on this host and about to have ended."""
        with self._changing:
            process = self._processes.get(rank)
        return process is not None and process.host == self._host and is_ending(process)

    def told(self, rank: int, text: str) -> None:
        """Another rank knows for certain that this one is gone."""
        with self._changing:
            self._losses.setdefault(rank, text)

    def losses(self, ranks: Iterable[int]) -> tuple[RankFailure, ...]:
        """Those of these ranks of which it is certain that their process is gone. Looks at the processes of this host."""
        found = []
        for rank in ranks:
            with self._changing:
                text, process = self._losses.get(rank), self._processes.get(rank)
            if text is None and process is not None and process.host == self._host and is_gone(process):
                at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                self.told(rank, f"this rank is lost: its process {process.pid} is gone, as was noticed at {at}")
                with self._changing:
                    text = self._losses[rank]
            if text is not None:
                found.append(RankFailure(rank, RankLost.kind, text))
        return tuple(found)
