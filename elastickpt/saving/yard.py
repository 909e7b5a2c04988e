"""What the saves of a process have beyond any one team of ranks: arenas, and the writer process. Savers come and go in it."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.links import Seat
from elastickpt.errors import CheckpointError
from elastickpt.saving.arenas import Arenas
from elastickpt.saving.request import AsyncOptions
from elastickpt.training.device import Cuda, DeviceCopier
from elastickpt.writer.arena import Arena
from elastickpt.writer.child import WriterOptions
from elastickpt.writer.submissions import StagedPortion, Submission
from elastickpt.writer.supervisor import Supervisor


class Yard:
    """One at a time of its savers takes saves; what those before it have under way is carried on here."""

    def __init__(self, options: AsyncOptions, copier: DeviceCopier | None = None) -> None:
        self.options = options
        self.copier = copier or Cuda()
        self.arenas = Arenas(options.arenas, threads=options.copy_threads, forget=self._forget, copier=self.copier)
        self._supervisor: Supervisor | None = None

    def seated(self, seat: Seat, listener: socket.socket | None) -> SeatedWriter:
        """The writer process, which takes this seat besides those that it has; one that ended by a fault of its own is
        replaced."""
        supervisor = self._supervisor
        if supervisor is None or supervisor.closed:
            wanted = WriterOptions(niceness=self.options.niceness, io=self.options.io)
            self._supervisor = supervisor = Supervisor(wanted, seat=seat, listener=listener)
        else:
            supervisor.sit(seat, listener)
        return SeatedWriter(supervisor, seat)

    def close(self, *, limit_s: float) -> None:
        """Ends the writer process; see `Supervisor.close`. Gives up the memory of arenas. Blocking."""
        if self._supervisor is not None:
            self._supervisor.close(limit_s=limit_s)
        self.arenas.close()

    def _forget(self, arena: Arena) -> None:
        if self._supervisor is not None:
            self._supervisor.forget(arena)


@dataclass(frozen=True, slots=True)
class SeatedWriter:
    """A writer process at one of its seats; see `writer_pool.Writer`."""

    supervisor: Supervisor
    seat: Seat

    def submit(self, staged: StagedPortion, arena: Arena) -> Submission:
        return self.supervisor.submit(staged, arena, self.seat)

    def withdraw(self, attempt: Attempt, failure: CheckpointError) -> Submission:
        return self.supervisor.withdraw(attempt, failure, self.seat)

    def cancel(self, submission: Submission) -> None:
        self.supervisor.cancel(submission)

    def settle(self, attempt: Attempt, why: CheckpointError) -> None:
        self.supervisor.settle(attempt, why)

    def close(self, *, limit_s: float = 10.0) -> None:
        """The process is not this seat's to end: its yard does that."""

    @property
    def closed(self) -> bool:
        return self.supervisor.closed
