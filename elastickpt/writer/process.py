"""Inside the writer process: one thread listens and beats, another carries out portions, one after the other.

It is in a session of its own, deaf to the signals that end a job, and holds nothing of the trainer's but the connection. It
ends when told, or after the trainer by the rule of `messages` (5).
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from elastickpt.commit.attempt import Decision, Verdict
from elastickpt.commit.links import Seat
from elastickpt.errors import Cancelled, RankLost
from elastickpt.ranks.messages import PeerGone
from elastickpt.ranks.team import failure_of
from elastickpt.ranks.threads import Postponed, WorkerThread, later, lower
from elastickpt.storage.store import Store
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import SentStructure, WriterStructure
from elastickpt.writer.attempt_worker import AttemptWorker, perform
from elastickpt.writer.messages import (
    Alive,
    ArenaGone,
    ArenaHere,
    BytesWritten,
    Cancel,
    Decided,
    EndNow,
    Enroll,
    JobFailed,
    MarkHere,
    PortionDone,
    Say,
    SeatGone,
    SeatHere,
    Settle,
    StructureGone,
    StructureHere,
    Wire,
    Write,
    WriterMessage,
    WriterReady,
    WriterSettings,
)
from elastickpt.writer.write_files import WatchBytes

TIDY_S = 0.5  # by then whoever was told of an outcome has gone on
PROGRESS_S = 0.25
_DEAF = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # what launchers send to all processes of a job: it has to finish first


def main(descriptor: int) -> None:
    """Serves the trainer at the other end of the socket `descriptor`; does not return."""
    for number in _DEAF:
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a committer has a connection to each member
    os.chdir("/")  # holds no folder of the job's
    gc.disable()  # a plan is many objects that all live to its end: looked through between two tasks, not again and again
    _Process(Wire(socket.socket(fileno=descriptor))).run()
    os._exit(0)  # without joining threads that wait for a device


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    write: Write
    structure: WriterStructure
    arena: Arena


class _Process:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._hello = WriterSettings(os.getppid(), 1.0, 0.0, 0, "normal", "")
        self._arenas: dict[int, Arena] = {}
        self._structures: dict[str, WriterStructure] = {}
        self._stores: dict[str, Store] = {}
        self._writing = WorkerThread("elastickpt-writer")
        self._cancelled: set[int] = set()
        self._enrolled: dict[int, AttemptWorker] = {}  # by job: this writer's part in its attempt
        self._parts: dict[bytes, AttemptWorker] = {}  # by the secret of a seat
        self._part: AttemptWorker | None = None  # of the seat of the jobs that come
        self._gone: set[bytes] = set()  # seats of broken teams, by secret: jobs may still come of other ones
        self._sitting, self._opening = threading.Lock(), threading.Lock()
        self._tidy = Postponed("elastickpt-tidy", TIDY_S, gc.collect)
        self._quitting = False
        self._orphaned = False

    def run(self) -> None:
        backlog: list[tuple[WriterMessage, int]] = []
        with suppress(PeerGone):
            while not backlog:
                backlog = self._wire.receive()
        if not backlog or not isinstance(first := backlog.pop(0)[0], WriterSettings):
            return
        self._hello = first
        lower(first.niceness, first.io)
        try:
            self._wire.send(WriterReady(os.getpid()))
            for message, descriptor in backlog:
                self._heard(message, descriptor)
            self._listen()
        except PeerGone:
            self._finish()
            self._writing.join(self._hello.lease_s)
            for part in list(self._parts.values()):
                part.join(self._hello.lease_s)
            if self._part is not None:
                self._part.depart()

    # -- the listening thread ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Until told to quit. Raises PeerGone when the trainer is."""
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        trainer = _watch(self._hello.trainer)
        poll.register(trainer, select.POLLIN)  # children that the trainer forked may hold its end of the connection
        beaten = time.monotonic()
        while not self._quitting:
            ready = {descriptor for descriptor, _ in poll.poll(self._hello.beat_s * 500)}
            if self._wire.fileno() in ready:
                for message, descriptor in self._wire.receive():
                    self._heard(message, descriptor)
            elif trainer in ready:
                raise PeerGone("the trainer's process ended")
            if time.monotonic() - beaten >= self._hello.beat_s / 2:
                self._wire.send_if_free(Alive())
                beaten = time.monotonic()

    def _heard(self, message: WriterMessage, descriptor: int) -> None:
        match message:
            case ArenaHere(arena, nbytes):
                self._arenas[arena] = Arena.attach(descriptor, nbytes)
            case ArenaGone(arena):
                self._arenas.pop(arena).close()
            case StructureHere(structure, plan, outline):
                self._structures[structure] = SentStructure(plan, outline)
            case StructureGone(structure):
                del self._structures[structure]
            case SeatHere():
                self._sit(message, descriptor)
            case SeatGone(secret):
                self._stand_up(secret)
            case MarkHere(attempt):
                self._taking_part().hold(attempt, socket.socket(fileno=descriptor))
            case Enroll(job):
                self._enrolled[job] = part = self._taking_part()
                part.begin(message, self._structures.get(message.structure))
            case Write():
                task = _Task(message, self._structures[message.structure], self._arenas[message.arena])
                self._writing.put(partial(self._write, task))
            case Say():
                self._taking_part().repeat(message)
            case Settle(attempt, kind, why):
                for part in list(self._parts.values()):
                    part.settle(attempt, kind, why)
            case Cancel(job):
                self._cancelled.add(job)
            case EndNow():
                self._quitting = True
            case _:
                pass

    def _sit(self, message: SeatHere, descriptor: int) -> None:
        """The jobs that follow are of this seat. Of an older one, its attempts are still decided."""
        with self._sitting:
            self._gone.discard(message.secret)
            if message.secret not in self._parts:
                self._parts[message.secret] = self._part_at(message, descriptor)
            self._part = self._parts[message.secret]
        self._leave_seats()

    def _stand_up(self, secret: bytes) -> None:
        """Nothing comes of this seat any more."""
        with self._sitting:
            self._gone.add(secret)
            if self._part is self._parts.get(secret):
                self._part = None
        self._leave_seats()

    def _leave_seats(self) -> None:
        """Seats of which no job comes, and where nothing is open any more."""
        with self._sitting:
            left = {secret: one for secret, one in self._parts.items() if one is not self._part and not one.at_work}
            for secret in left:
                del self._parts[secret]
        for secret, part in left.items():
            part.leave() if secret in self._gone else part.close()

    def _part_at(self, message: SeatHere, descriptor: int) -> AttemptWorker:
        seat = Seat(message.member, message.ranks, message.candidates, message.secret, message.limits)
        listener = socket.socket(fileno=descriptor) if message.listening else None

        def tell(job: int, verdict: Verdict) -> None:
            with suppress(PeerGone):
                self._wire.send(Decided(job, Decision.of("", verdict)))
            self._leave_seats()
            self._tidy.ask()  # at once, for 333 arrays 4 to 20 ms, it would keep who is told from waking, where cores are few

        return AttemptWorker(seat, listener, self._store, tell)

    def _taking_part(self) -> AttemptWorker:
        if self._part is None:
            raise PeerGone("the trainer sent an order before a seat")
        return self._part

    def _finish(self) -> None:
        """The trainer is gone: nothing comes any more, what came is finished, within the lease."""
        self._orphaned = True
        later("elastickpt-lease", self._hello.lease_s, partial(os._exit, 1))
        self._wire.limit(0.0)
        with suppress(PeerGone):
            while True:  # what was sent before the end
                for message, descriptor in self._wire.receive():
                    self._heard(message, descriptor)
        for arena in self._arenas.values():
            arena.abandoned = True
        self._writing.stop()

    # -- the writing thread --------------------------------------------------------------------------------------------

    def _write(self, task: _Task) -> None:
        answer = self._answer(task)
        with suppress(PeerGone):
            self._wire.send(answer)
        if self._part is None:
            self._tidy.ask()

    def _answer(self, task: _Task) -> PortionDone | JobFailed:
        job = task.write.job
        written = told = 0
        told_at = time.monotonic()

        def watch(nbytes: int) -> None:
            nonlocal written, told, told_at
            if job in self._cancelled:
                raise Cancelled("cancelled")
            written += nbytes
            if time.monotonic() - told_at >= PROGRESS_S and written != told:
                told, told_at = written, time.monotonic()
                with suppress(PeerGone):
                    self._wire.send_if_free(BytesWritten(job, written))

        try:
            return self._carry_out(task, watch)
        except Exception as error:
            failure = failure_of(error, 0)
            return JobFailed(job, failure.kind, failure.message)
        finally:
            self._cancelled.discard(job)
            self._enrolled.pop(job, None)

    def _carry_out(self, task: _Task, watch: WatchBytes) -> PortionDone:
        write, structure = task.write, task.structure
        part = self._enrolled.get(write.job)
        if self._orphaned and write.portion < len(structure.prepared.portions) - 1:
            lost = RankLost("the trainer ended before it had staged the rest")
            if part is not None:
                part.fail(write, lost)
            raise lost
        watch(0)
        if part is not None:
            return part.carry_out(write, structure, task.arena, watch=watch)
        return perform(self._store(write.attempt.store), write, structure, task.arena, watch=watch)

    def _store(self, url: str) -> Store:
        with self._opening:
            if url not in self._stores:
                store = _open(url)
                if self._hello.wrap:
                    module, name, argument = self._hello.wrap.split(":", 2)
                    store = getattr(importlib.import_module(module), name)(store, argument)
                self._stores[url] = store
            return self._stores[url]


def _watch(pid: int) -> int:
    """A descriptor that is readable once the process has ended. Raises PeerGone if it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise PeerGone(f"no process {pid}") from None


def _open(url: str) -> Store:
    from elastickpt.storage.opening import open_store  # brings fsspec, which costs half of the start

    return open_store(url)
