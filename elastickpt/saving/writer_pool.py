"""Where the writers of a team meet, and the writers themselves: one process for this rank, or a thread for each store.

The yard is what savers share that come one after the other: the arenas, and the process.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.links import ALONE, CANDIDATES, Seat, new_secret
from elastickpt.errors import CheckpointError, Refused
from elastickpt.ranks.addresses import listen, own_address
from elastickpt.ranks.messages import Message
from elastickpt.ranks.team import Question, Team
from elastickpt.saving.arenas import Arenas
from elastickpt.saving.request import AsyncOptions
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.training.device import Cuda, DeviceCopier
from elastickpt.writer.arena import Arena
from elastickpt.writer.child import WriterOptions
from elastickpt.writer.submissions import StagedPortion, Submission
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter


class Seats(Message, frozen=True):
    """Where the candidates for committer listen, and the secret by which the job's writers know each other."""

    candidates: tuple[str, ...]
    secret: bytes


SEATS = Question("seats", str, Seats)  # each says where its writer listens, "" for nowhere


class Writer(Protocol):
    """What `SeatedWriter` and `ThreadWriter` have in common."""

    def submit(self, staged: StagedPortion, arena: Arena) -> Submission: ...

    def withdraw(self, attempt: Attempt, failure: CheckpointError) -> Submission: ...

    def cancel(self, submission: Submission) -> None: ...

    def settle(self, attempt: Attempt, why: CheckpointError) -> None: ...

    def leave_seat(self) -> None: ...

    def close(self, *, limit_s: float = 10.0) -> None: ...

    @property
    def closed(self) -> bool: ...


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
    """A writer process at one of its seats; see `Writer`."""

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

    def leave_seat(self) -> None:
        self.supervisor.leave_seat(self.seat)

    def close(self, *, limit_s: float = 10.0) -> None:
        """The process is not this seat's to end: its yard does that."""

    @property
    def closed(self) -> bool:
        return self.supervisor.closed


class WriterPool:
    """This rank's writers for one team: the process of a yard, or threads of their own. A writer is there once all members have
    said where theirs listen; all of it off the thread that trains."""

    def __init__(self, yard: Yard) -> None:
        self._yard, self._options = yard, yard.options
        self._writers: dict[str, Writer] = {}
        self._closed = False

    def seated(self, store: str) -> bool:
        """Whether there is a writer for that store. One that ended by a fault of its own is none: all meet again."""
        writer = self._writers.get(self._key(store))
        return writer is not None and (self._closed or not writer.closed)

    def require_reachable(self, store: Store) -> None:
        """Raises Refused for a store that is in this process, where another one is to write."""
        if self._options.executor == "process" and isinstance(store, MemoryStore):
            raise Refused(
                f"{store.url}: expected a store that a writer process reaches, found this process's own memory; "
                "save with AsyncOptions(executor='thread')"
            )

    def of(self, store: str) -> Writer:
        """The writer for that store."""
        return self._writers[self._key(store)]

    def take_seats(self, team: Team, store: Store) -> None:
        """A round in which members tell each other where they listen; then the writer is there. Raises what a round raises."""
        if len(team.ranks) == 1:
            self._make(store, ALONE, None)
            return
        listener: socket.socket | None = None

        def tell() -> str:
            nonlocal listener
            if team.member >= CANDIDATES:
                return ""
            one_host = len(set(team.hosts)) == 1
            listener, address = listen(host=None if one_host else own_address())
            return address

        try:
            seats = SEATS.ask(team, tell, lambda addresses: Seats(tuple(addresses[:CANDIDATES]), new_secret()))
        except BaseException:
            if listener is not None:
                listener.close()
            raise
        self._make(store, Seat(team.member, team.ranks, seats.candidates, seats.secret), listener)

    def _make(self, store: Store, seat: Seat, listener: socket.socket | None) -> None:
        if self._closed:
            if listener is not None:
                listener.close()
            raise Refused("these writers were closed")
        key = self._key(store.url)
        old = self._writers.pop(key, None)  # of before somebody lost his
        if old is not None:
            old.close(limit_s=0.0)
        if self._options.executor == "thread":
            self._writers[key] = ThreadWriter(store, seat=seat, listener=listener)
        else:
            self._writers[key] = self._yard.seated(seat, listener)

    def _key(self, store: str) -> str:
        return store if self._options.executor == "thread" else ""

    def settle(self, attempt: Attempt, why: CheckpointError) -> None:
        """Its team is gone: the attempt is found committed, or aborted. Not blocking."""
        if (writer := self._writers.get(self._key(attempt.store))) is not None:
            writer.settle(attempt, why)

    def leave_seats(self) -> None:
        """The team is broken: of attempts that others have and this rank was not told of, nothing comes from here. Blocking for
        moments, as others are told."""
        for writer in self._writers.values():
            writer.leave_seat()

    def close(self, *, limit_s: float) -> None:
        """Takes nothing more. Ends writers that are threads, see `ThreadWriter.close`. Blocking."""
        self._closed = True
        for writer in self._writers.values():
            writer.close(limit_s=limit_s)
