"""The process that coordinates a job: its sockets, its workers' launchers, and the thread that asks the ladder.

What is decided is `conductor`'s; this carries it out, in one thread. A caller is nobody until it has proved the token.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from elastickpt.elastic.agent import Agent, ZygoteLost
from elastickpt.elastic.conductor import Conductor
from elastickpt.elastic.deeds import AskLadder, Deed, KillWorker, Record, Replace, Send
from elastickpt.elastic.duties import Ladder, LadderOf
from elastickpt.elastic.enlisting import (
    Enlist,
    Finish,
    FromLauncher,
    Kill,
    Start,
    Started,
    ToLauncher,
    first_message,
    from_launcher,
)
from elastickpt.elastic.event_log import EventLog, ended_event
from elastickpt.elastic.limits import HELLO_S
from elastickpt.elastic.messages import Commit, End, from_member
from elastickpt.elastic.stream import Closed, Stream, admitted, nonce
from elastickpt.errors import CheckpointError
from elastickpt.ranks.addresses import not_in_forks
from elastickpt.ranks.messages import encode
from elastickpt.ranks.threads import WorkerThread

log = logging.getLogger(__name__)

READING_S = 0.001
"""How long a coordinator that has told a commit hears nothing: what members say next would be heard on the processors on which
they are to read it."""


@dataclass(eq=False)
class Caller:
    """A connection from its beginning: who it is shows once it has proved the token. `uid` of a worker, `launcher` of one."""

    stream: Stream
    since: float
    nonce: bytes = field(default_factory=nonce)
    proved: bool = False
    uid: str = ""
    launcher: Launcher | None = None


class Launcher(Protocol):
    """Who starts workers, here or on a further machine."""

    def start(self, uid: str) -> None: ...

    def kill(self, uid: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a coordinator listens, and the token that whoever calls has to prove."""

    listeners: tuple[socket.socket, ...]
    token: str


class FarLauncher:
    """One on a further machine, at the other end of a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def start(self, uid: str) -> None:
        self._tell(Start(uid))

    def kill(self, uid: str) -> None:
        self._tell(Kill(uid))

    def finish(self, code: int) -> None:
        self._tell(Finish(code))

    def _tell(self, message: ToLauncher) -> None:
        self._stream.send(encode(message))


class Coordinator:
    """One job, from its listeners until nobody of it is left. `agent` forks workers here."""

    def __init__(self, conductor: Conductor, agent: Agent, door: Listening, ladder_of: LadderOf, events: EventLog) -> None:
        self._conductor, self._agent, self._token, self._ladder_of = conductor, agent, door.token, ladder_of
        self._events = events
        self._selector = selectors.DefaultSelector()
        self._callers: set[Caller] = set()
        self._workers: dict[str, Caller] = {}
        self._held: dict[str, Launcher] = {}  # by uid: who can end it
        self._numbers: dict[Launcher, int] = {agent: 0}
        self._started = 0
        self._asking = WorkerThread("elastickpt-ladder")
        self._ladder: Ladder | None = None
        self._answers: deque[Callable[[float], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listeners = [not_in_forks(listener) for listener in door.listeners]
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._awake)
        self._selector.register(agent, selectors.EVENT_READ, self._hear_agent)

    def start_workers(self, count: int) -> None:
        """Forks them, for places and as spares."""
        for _ in range(count):
            self._start(self._agent)

    def signalled(self, number: int) -> None:
        """From a signal's handler."""
        if number == signal.SIGTERM:
            self._answers.append(self._conductor.asked_to_end)
        else:
            self._answers.append(lambda now: self._conductor.end(End(130, "", "interrupted"), now))
        os.eventfd_write(self._wake, 1)

    def run(self) -> End:
        """Blocks until nobody of the job is left; why it ended."""
        wait_s = 0.0
        try:
            while (outcome := self._conductor.outcome()) is None:
                for key, _ in self._selector.select(wait_s):
                    key.data()
                    if self._carry_out():
                        time.sleep(READING_S)
                # Only now, when all was heard that has come: one that was held up itself has missed nobody's sign of life.
                wait_s = self._conductor.tick(time.monotonic())
                self._carry_out()
                self._turn_away()
        except BaseException as error:
            self._events.write(
                ended_event(End(75, "coordinator-lost", f"{type(error).__name__}: {error}"), self._conductor.job.step)
            )
            raise
        else:
            self._events.write(ended_event(outcome, self._conductor.job.step))
            for launcher in self._numbers:
                if isinstance(launcher, FarLauncher):
                    launcher.finish(outcome.code)
            return outcome
        finally:
            self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for caller in self._callers:
            caller.stream.close()
        self._agent.close()
        self._asking.stop()
        if self._ladder is not None:
            self._ladder.close()
        self._selector.close()
        os.close(self._wake)

    # -- connections

    def _accept(self) -> None:
        for listener in self._listeners:
            with suppress(BlockingIOError):
                while True:
                    sock, _ = listener.accept()
                    caller = Caller(Stream(not_in_forks(sock)), time.monotonic())
                    caller.stream.send(caller.nonce)
                    self._callers.add(caller)
                    self._selector.register(caller.stream, selectors.EVENT_READ, lambda caller=caller: self._hear(caller))

    def _turn_away(self) -> None:
        """Who has not said who it is in time."""
        now = time.monotonic()
        for caller in [one for one in self._callers if not one.uid and one.launcher is None]:
            if now - caller.since > HELLO_S:
                self._drop(caller)

    def _hear(self, caller: Caller) -> None:
        caller.stream.flush()
        try:
            for data in caller.stream.receive():
                self._take(caller, data)
        except Closed:
            self._drop(caller)
        except CheckpointError as error:
            log.warning("a connection is closed: %s", error)
            self._drop(caller)
        self._watch(caller)

    def _watch(self, caller: Caller) -> None:
        """Whether more can be sent is asked only where something is left."""
        if caller in self._callers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.stream.waits else 0)
            if self._selector.get_key(caller.stream).events != events:
                self._selector.modify(caller.stream, events, lambda: self._hear(caller))

    def _take(self, caller: Caller, data: bytes) -> None:
        now = time.monotonic()
        if caller not in self._callers:
            return
        if caller.uid:
            self._conductor.heard(caller.uid, from_member(data), now)
        elif caller.launcher is not None:
            self._hear_launcher(from_launcher(data))
        elif caller.proved:
            self._introduced(caller, data, now)
        elif (proof := admitted(data, caller.nonce, self._token)) is not None:
            caller.proved = True
            caller.stream.send(proof)
        else:
            log.warning("a caller that does not know the token of this job was turned away")
            self._drop(caller)

    def _introduced(self, caller: Caller, data: bytes, now: float) -> None:
        who = first_message(data)
        if isinstance(who, Enlist):
            caller.launcher = launcher = FarLauncher(caller.stream)
            self._numbers[launcher] = max(self._numbers.values()) + 1
            self._conductor.enlisted(who.workers)
            log.info("a launcher on host %s joined, with %d workers", who.host, who.workers)
            for _ in range(who.workers):
                self._start(launcher)
            return
        # Its answers are sent once they are known; until then it is a worker already.
        caller.uid = who.uid
        self._workers.setdefault(who.uid, caller)
        if self._workers[who.uid] is not caller or not self._conductor.joined(who, now):
            log.warning("worker %s has joined already; a second process of that name was turned away", who.uid)
            caller.uid = ""
            self._drop(caller)

    def _drop(self, caller: Caller) -> None:
        if caller not in self._callers:
            return
        self._callers.discard(caller)
        self._selector.unregister(caller.stream)
        caller.stream.close()
        now = time.monotonic()
        if caller.uid:
            self._workers.pop(caller.uid, None)
            self._conductor.closed(caller.uid, now)
        if caller.launcher is not None:
            uids = tuple(uid for uid, launcher in self._held.items() if launcher is caller.launcher)
            log.warning("a launcher is gone, and with it %d workers", len(uids))
            del self._numbers[caller.launcher]
            for uid in uids:
                del self._held[uid]
            self._conductor.vanished(uids, now)

    # -- launchers

    def _start(self, launcher: Launcher) -> None:
        uid = f"{self._numbers[launcher]}.{self._started}"
        self._started += 1
        self._held[uid] = launcher
        self._conductor.started(uid, time.monotonic())
        launcher.start(uid)

    def _hear_agent(self) -> None:
        self._agent.flush()
        try:
            for said in self._agent.receive():
                self._hear_launcher(said)
        except ZygoteLost as lost:
            self._selector.unregister(self._agent)
            uids = tuple(uid for uid, launcher in self._held.items() if launcher is self._agent)
            now = time.monotonic()
            self._conductor.end(End(75, "coordinator-lost", str(lost)), now)
            self._conductor.vanished(uids, now)

    def _hear_launcher(self, said: FromLauncher) -> None:
        if isinstance(said, Started):
            self._conductor.forked(said.uid, said.pid)
            return
        self._held.pop(said.uid, None)
        if (caller := self._workers.get(said.uid)) is not None:
            self._hear(caller)  # what it had said before it ended
        self._conductor.stopped(said, time.monotonic())

    # -- deeds

    def _carry_out(self) -> bool:
        """Whether members were told that a step counts: the processors are theirs then, to read that."""
        told = False
        while self._conductor.deeds:
            deeds, self._conductor.deeds = self._conductor.deeds, []
            for deed in deeds:
                self._do(deed)
                told = told or (isinstance(deed, Send) and isinstance(deed.message, Commit))
        return told

    def _do(self, deed: Deed) -> None:
        if isinstance(deed, Send):
            if (caller := self._workers.get(deed.uid)) is not None:
                caller.stream.send(encode(deed.message))
                self._watch(caller)
        elif isinstance(deed, Record):
            self._events.write(dict(deed.event))
        elif isinstance(deed, KillWorker):
            if (launcher := self._held.get(deed.uid)) is not None:
                launcher.kill(deed.uid)
            elif (caller := self._workers.get(deed.uid)) is not None:
                self._drop(caller)
        elif isinstance(deed, AskLadder):
            self._asking.put(partial(self._ask, deed))
        elif isinstance(deed, Replace):
            for launcher in self._roomiest(deed.count):
                self._start(launcher)

    def _roomiest(self, count: int) -> Iterator[Launcher]:
        """Of the launchers, each time the one that has the fewest workers."""
        for _ in range(count):
            held = list(self._held.values())
            yield min(self._numbers, key=lambda one: (held.count(one), self._numbers[one]))

    def _ask(self, deed: AskLadder) -> None:
        """In the thread that may read storage."""
        try:
            if self._ladder is None:
                self._ladder = self._ladder_of(deed.terms, self._conductor.job.stages)
            chosen, considered = self._ladder.choose(deed.order, deed.last)
        except Exception as error:
            failure, generation = error, deed.order.generation
            self._answers.append(lambda now: self._conductor.ladder_failed(generation, failure, now))
        else:
            self._answers.append(lambda now: self._conductor.ladder_chose(chosen, considered, now))
        with suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._wake, 1)

    def _awake(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._answers:
            self._answers.popleft()(time.monotonic())
