"""Keeps one writer process for this rank: hands it what is staged, and revives it, with the same work, when it is gone.

    submit --> handed over --> PortionDone / JobFailed --> the submission's result --> Decided --> what became of its attempt
                  |  ^                                     |  ^
     gone, silent |  | another process, `repeated`,   gone |  | another process: is told to Say the same
                  v  | from the same arena                 v  |
             killed, reaped                           killed, reaped
                  |
                  could not be reaped: the arena is retired, the submission fails with WriterLost

All of it happens in one thread of this process, which alone speaks to the writer; callers only leave it commands.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.links import ALONE, Seat
from elastickpt.errors import Cancelled, CheckpointError, Refused, WriterLost
from elastickpt.ranks.messages import PeerGone
from elastickpt.ranks.threads import Actor
from elastickpt.writer.arena import Arena
from elastickpt.writer.child import Child, WriterOptions
from elastickpt.writer.messages import (
    ArenaGone,
    BytesWritten,
    Cancel,
    Decided,
    EndNow,
    JobFailed,
    PortionDone,
    WriterMessage,
    WriterReady,
)
from elastickpt.writer.submissions import StagedPortion, Submission, error_of, outcome_of, submission_of, withdrawal_of

log = logging.getLogger(__name__)

MAX_DEATHS = 64  # of writers over one submission: what kills every writer is not tried for ever
MAX_STILLBORN = 3  # writers in a row that ended before they were ready
QUIT_S = 2.0


class Supervisor:
    """A rank's writer process. Methods do not block but for `close`. Those who submit take turns; `cancel` may come from any
    thread."""

    def __init__(
        self, options: WriterOptions | None = None, *, seat: Seat = ALONE, listener: socket.socket | None = None
    ) -> None:
        self._options = options or WriterOptions()
        self._seat = seat  # where it sits first
        self._newest = seat
        self._listeners = {seat.secret: listener}  # of seats of which something may still come
        self._left: set[bytes] = set()  # seats of broken teams, by secret
        self._owner = os.getpid()
        self._hooks = iter(self._options.hooks)
        self._actor = Actor("elastickpt-supervisor", self._run)
        self._pending: dict[int, Submission] = {}  # to be written
        self._awaiting: dict[int, Submission] = {}  # to be decided
        self._count = 0
        self.deaths = 0  # of writer processes, so far
        self._child: Child | None = None
        self._stillborn = 0
        self._leave_at: float | None = None
        self._closed = False
        self._actor.start()

    @property
    def pid(self) -> int | None:
        """The process id of the writer of now."""
        child = self._child
        return None if child is None else child.process.pid

    def sit(self, seat: Seat, listener: socket.socket | None) -> None:
        """It takes this seat, too, in the same process: of another team, as the one before is gone. What is submitted names its
        seat; of an older one nothing new is written. Raises Refused after `close`."""
        self._require_open()
        self._leave(lambda: self._sit(seat, listener))

    def submit(self, staged: StagedPortion, arena: Arena, seat: Seat | None = None) -> Submission:
        """Has the portion written from the arena, by the first seat if none is named. Raises Refused after `close`, and for an
        arena that is not free."""
        self._require_open()
        arena.require_free()
        self._count += 1
        submission = submission_of(self._count, staged, arena, seat or self._seat)
        arena.lent = True
        try:
            self._leave(lambda: self._pending.__setitem__(submission.number, submission))
        except Refused as closed:
            submission.give_up(closed)
            raise
        return submission

    def withdraw(self, attempt: Attempt, failure: CheckpointError, seat: Seat | None = None) -> Submission:
        """This rank takes no part in the attempt after all, which ends it on all ranks; `decided` tells. Raises Refused after
        `close`."""
        self._require_open()
        self._count += 1
        submission = withdrawal_of(self._count, attempt, failure, seat or self._seat)
        self._leave(lambda: self._awaiting.__setitem__(submission.number, submission))
        return submission

    def cancel(self, submission: Submission) -> None:
        """Ends it as soon as may be; its result says which came first."""
        with suppress(Refused):
            self._leave(lambda: self._cancel(submission))

    def settle(self, attempt: Attempt, why: CheckpointError) -> None:
        """Its team is gone, and nobody is waited for any more: the attempt is found committed, or aborted."""
        with suppress(Refused):
            self._leave(lambda: self._settle(attempt, why))

    def leave_seat(self, seat: Seat) -> None:
        """Its team is broken, and nothing more of it is submitted: once all that is there is decided, the writer says farewell
        to the others, and nobody listens there any more."""
        with suppress(Refused):
            self._leave(lambda: self._leave_seat(seat))

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more: after `close`, and after a fault of its own."""
        return self._closed

    def _require_open(self) -> None:
        if self._closed or os.getpid() != self._owner:
            raise Refused("this writer was closed" if self._closed else "a writer belongs to the process that started it")

    def forget(self, arena: Arena) -> None:
        """No submission will name this arena again: the writer gives it up."""
        with suppress(Refused):
            self._leave(lambda: self._forget(arena.number))

    def close(self, *, limit_s: float = 10.0) -> None:
        """Ends the writer once everything is written, at most after `limit_s`: then it is left to finish by itself, and the
        results still open raise WriterLost. Blocking."""
        if os.getpid() != self._owner or self._closed:
            return
        self._closed = True
        until = time.monotonic() + limit_s

        def leave() -> None:
            self._leave_at = until

        with suppress(Refused):
            self._leave(leave)
        self._actor.join(limit_s + QUIT_S + self._options.reap_s + 1)

    # -- everything below runs in the supervisor's thread --------------------------------------------------------------

    def _leave(self, command: Callable[[], None]) -> None:
        """From any thread. Raises Refused where nobody carries it out any more."""
        if not self._actor.leave(command):
            raise Refused("this writer was closed")

    def _run(self) -> None:
        why = "not written when it was closed; what was handed to the writer process is left to it to finish"
        try:
            self._start()
            while self._leave_at is None or (self._open_work and time.monotonic() < self._leave_at):
                self._turn()
        except BaseException as error:
            log.exception("the supervisor of the writer process failed")
            why = f"its supervisor failed: {type(error).__name__}: {error}"
        finally:
            self._closed = True
            self._end(why)

    @property
    def _open_work(self) -> bool:
        return bool(self._pending or self._awaiting)

    def _turn(self) -> None:
        if self._child is None and self._open_work:
            self._start()
        child = self._child
        begun = time.monotonic()
        ready = self._actor.wait(min(self._options.beat_s, self._options.silence_s / 4))
        now = time.monotonic()
        try:
            if child is not None and ready:
                child.heard_at = now
                for message, _ in child.wire.receive():
                    self._heard(message)
            elif child is not None and now - begun > self._options.silence_s / 2:
                child.heard_at = now  # it was this process that stood still
            elif child is not None and now - child.heard_at > self._limit_of(child):
                return self._lost(child, f"silent for {now - child.heard_at:.1f} s")
            self._actor.carry_out()
            self._hand_over()
        except PeerGone as gone:
            if child is not None:
                self._lost(child, str(gone))
        return None

    def _limit_of(self, child: Child) -> float:
        """For how long it may say nothing: on a busy host a start takes much longer than a beat."""
        return self._options.silence_s if child.ready else max(self._options.start_s, self._options.silence_s)

    def _start(self) -> None:
        try:
            self._child = Child.spawn(self._options, wrap=next(self._hooks, ""))
            self._actor.sockets.register(self._child.wire)
            if self._newest.candidates:  # at once, so that it can say farewell if nothing ever comes
                with suppress(PeerGone):  # whoever listens next finds out
                    self._seat_child(self._child, self._newest)
        except OSError as error:
            self._not_born(f"it could not be started: {error}")
            time.sleep(self._options.beat_s)

    def _hand_over(self) -> None:
        child = self._child
        if child is None:
            return
        for _, submission in sorted({**self._pending, **self._awaiting}.items()):  # a writer decides them in this order
            if submission.handed:
                continue
            submission.handed = True
            if submission.takes_part:
                self._seat_child(child, submission.seat)
            child.hand(submission)
        for secret in self._left:
            child.leave_seat(secret)

    def _seat_child(self, child: Child, seat: Seat) -> None:
        child.seat(seat, self._listeners.get(seat.secret))

    def _sit(self, seat: Seat, listener: socket.socket | None) -> None:
        before, self._newest = self._newest, seat
        self._listeners[seat.secret] = listener
        self._forget_seat(before)
        if self._child is not None and seat.candidates:
            self._seat_child(self._child, seat)

    def _leave_seat(self, seat: Seat) -> None:
        if not seat.candidates:
            return
        self._left.add(seat.secret)
        if self._newest.secret == seat.secret:
            self._newest = ALONE
        self._forget_seat(seat)

    def _forget_seat(self, seat: Seat) -> None:
        """Its listener is let go here, once nothing of it has to be handed to a writer again."""
        at_work = (one.seat.secret == seat.secret for one in (*self._pending.values(), *self._awaiting.values()))
        if seat.secret != self._newest.secret and not any(at_work):
            listener = self._listeners.pop(seat.secret, None)
            if listener is not None:
                listener.close()

    def _settle(self, attempt: Attempt, why: CheckpointError) -> None:
        for submission in (*self._pending.values(), *self._awaiting.values()):
            if submission.attempt.id == attempt.id and submission.settling is None:
                submission.settling = why
                if submission.handed and self._child is not None:
                    self._child.wire.send(submission.settle())

    def _heard(self, message: WriterMessage) -> None:
        if isinstance(message, WriterReady) and self._child is not None:
            self._child.ready, self._stillborn = True, 0
        elif isinstance(message, BytesWritten) and message.job in self._pending:
            self._pending[message.job].written = message.nbytes
        elif isinstance(message, PortionDone) and (done := self._pending.pop(message.job, None)) is not None:
            done.end(outcome_of(message))
            self._await(done)
        elif isinstance(message, JobFailed) and (failed := self._pending.pop(message.job, None)) is not None:
            failed.end(error_of(message))
            self._await(failed)
        elif isinstance(message, Decided):
            decided = self._awaiting.pop(message.job, None) or self._pending.get(message.job)
            if decided is not None:
                decided.decide(message.decision.verdict)
                self._forget_seat(decided.seat)

    def _await(self, submission: Submission) -> None:
        if submission.awaits_decision:
            self._awaiting[submission.number] = submission
        else:
            submission.unmark()  # its writer has a mark of its own until the attempt is decided

    def _cancel(self, submission: Submission) -> None:
        submission.cancelled = True
        self._hand_over()  # what was withdrawn before it is said before it
        if submission.handed and self._child is not None:
            self._child.wire.send(Cancel(submission.number))
        elif self._pending.pop(submission.number, None) is not None:
            submission.end(Cancelled("cancelled"))
            self._await(submission)

    def _forget(self, arena: int) -> None:
        if self._child is not None and arena in self._child.arenas:
            self._child.arenas.discard(arena)
            self._child.wire.send(ArenaGone(arena))

    # -- the end of a writer -------------------------------------------------------------------------------------------

    def _lost(self, child: Child, why: str) -> None:
        """Kills and reaps it; what it had is handed to the next one, but for what it may still be writing."""
        reaped = child.put_down(self._options.reap_s)
        self._actor.sockets.unregister(child.wire)
        self._child = None
        self.deaths += 1
        messages, said = child.last_words()
        child.ready |= any(isinstance(message, WriterReady) for message in messages)
        for message in messages:
            self._heard(message)
        pid, status = child.process.pid, child.process.returncode
        child.close()
        log.warning("writer process %d is gone (%s, status %s)%s", pid, why, status, f": {said}" if said else "")
        for submission in [one for one in self._pending.values() if one.handed]:
            submission.handed = False
            submission.deaths += 1
            if not reaped:
                if submission.arena is not None:
                    submission.arena.retire()
                self._give_up(submission, f"writer process {pid} could not be ended ({why}) and may still write")
            elif submission.cancelled:
                self._give_up(submission, "cancelled")
            elif submission.deaths >= MAX_DEATHS:
                self._give_up(submission, f"{submission.deaths} writer processes ended over it, the last one as: {why} {said}")
        for submission in self._awaiting.values():
            submission.handed = False
        if child.ready and self._leave_at is None:
            self._start()  # else with the next submission
        elif not child.ready and status != -signal.SIGKILL:  # somebody's kill says nothing of the next one
            self._not_born(f"it ended before it was ready, status {status}: {said}")

    def _not_born(self, why: str) -> None:
        self._stillborn += 1
        if self._stillborn >= MAX_STILLBORN:
            self._stillborn = 0
            self._fail_all(why)

    def _give_up(self, submission: Submission, why: str) -> None:
        """It is not written; the next writer process says so to the others."""
        if self._pending.pop(submission.number, None) is not None:
            submission.end(WriterLost(f"{submission.attempt.draft.folder}: {why}"))
            submission.handed = False
            self._await(submission)

    def _fail_all(self, why: str) -> None:
        """There will be no writer process that could say anything."""
        failed = [*self._pending.values(), *self._awaiting.values()]
        self._pending.clear()
        self._awaiting.clear()
        for submission in failed:
            submission.give_up(WriterLost(f"{submission.attempt.draft.folder}: {why}"))

    def _end(self, why: str) -> None:
        child, self._child = self._child, None
        for command in self._actor.end():
            with suppress(PeerGone):
                command()
        at_work = [one for one in (*self._pending.values(), *self._awaiting.values()) if one.handed]
        for submission in at_work:
            if submission.arena is not None and not submission.future.done():
                submission.arena.retire()
        self._fail_all(why)
        for listener in self._listeners.values():
            if listener is not None:
                listener.close()
        if child is None:
            return
        if not at_work:
            with suppress(PeerGone):
                child.wire.send(EndNow())
            if not child.wait(QUIT_S):
                child.put_down(self._options.reap_s)
        child.close()
