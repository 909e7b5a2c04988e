"""All that a coordinator decides, from what it hears and the time: what is said, who is ended, what is asked. No I/O.

It holds the table of `coordination` and what the table need not know: which processes there are and how they end, what members
tell each other through it, limits, the timeline of a recovery. Times are those of one monotonic clock.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec

from elastickpt.elastic import coordination
from elastickpt.elastic.board import Board
from elastickpt.elastic.deeds import AskLadder, Deed, KillWorker, Record, Replace, Send
from elastickpt.elastic.departure import Departure
from elastickpt.elastic.enlisting import Stopped
from elastickpt.elastic.event_log import member_event, recovery_event
from elastickpt.elastic.job import (
    Choose,
    Chosen,
    CoordinatorOrder,
    Ending,
    Gone,
    JobEvent,
    JobPhase,
    JobState,
    Over,
    Recovered,
    Tell,
    Wait,
    WaitOver,
)
from elastickpt.elastic.limits import DYING_S, ENDING_S, QUITTING_S, REAPED_S, Limits, PhaseTimes
from elastickpt.elastic.messages import (
    Ask,
    Beat,
    Commit,
    End,
    FromMember,
    Go,
    Join,
    Put,
    Quit,
    Raised,
    Reached,
    Rebuilt,
    Terms,
    Welcome,
)
from elastickpt.elastic.recovery import Considered, Recovery, Why
from elastickpt.elastic.replacing import Replacing
from elastickpt.elastic.timeline import Recoveries
from elastickpt.elastic.waits import Waits
from elastickpt.elastic.workers import Worker, due_at, silent_at, stalled
from elastickpt.errors import CheckpointError, Superseded

log = logging.getLogger(__name__)


class Conductor:
    """One job. Every method takes the time, `now`; `deeds` are then to be carried out in order, and emptied."""

    def __init__(self, stages: int, limits: Limits, replacing: Replacing, *, clock_offset: float) -> None:
        self.job = JobState(stages, epoch=1)
        self.deeds: list[Deed] = []
        self._limits, self._replacing = limits, replacing
        self._workers: dict[str, Worker] = {}
        self._terms: Terms | None = None
        self._history = PhaseTimes()
        self._recoveries = Recoveries(clock_offset)
        self._board = Board()
        self._waits = Waits()
        self._ends_at: float | None = None
        self._departure: Departure | None = None

    # -- processes

    def started(self, uid: str, now: float) -> None:
        """A launcher is about to fork it."""
        self._replacing.started()
        self._workers[uid] = Worker(uid, True, now)

    def enlisted(self, workers: int) -> None:
        """A further launcher holds so many."""
        self._replacing.workers += workers

    def forked(self, uid: str, pid: int) -> None:
        if uid in self._workers:
            self._workers[uid].pid = pid

    def joined(self, who: Join, now: float) -> bool:
        """A process is connected and says who it is; whether it may stay."""
        worker = self._workers.setdefault(who.uid, Worker(who.uid, False, now))
        if worker.who is not None or worker.ending is not None:
            return False
        worker.who, worker.pid, worker.heard_at, worker.moved_at = who, who.pid, now, now
        self._replacing.joined()
        places = self.job.places
        self._event((who.uid, who), now)
        self.deeds.append(Send(who.uid, Welcome(who.uid not in self.job.places, self._limits.beat_s)))
        if places == self.job.places:
            self._record_member(worker)
        return True

    def closed(self, uid: str, now: float) -> None:
        """Its connection is closed: its process ends now, or is ended."""
        worker = self._workers.get(uid)
        if worker is None:
            return
        worker.heard(now)
        worker.connected = False
        if not worker.managed:
            self._gone(worker, None, now, otherwise="closed")
        elif self._departure is None:
            worker.ends("closed", now + DYING_S)

    def stopped(self, said: Stopped, now: float) -> None:
        """Its process has been reaped."""
        worker = self._workers.get(said.uid)
        if worker is None:
            return
        worker.heard(now)
        signal = None if said.killed else said.signal
        if worker.who is None and self.job.phase is not JobPhase.ENDED and not said.killed:
            self._never_joined(worker, signal, said.code, now)
            return
        if worker.ending == "closed" and not said.killed:
            worker.ending = "exit"  # the kernel closed its connection first
        if self._departure is not None and worker.who is not None:
            self._departure = self._departure.left(said)
        self._gone(worker, signal, now, otherwise="exit")

    def vanished(self, uids: tuple[str, ...], now: float) -> None:
        """Their launcher is gone, and with it whoever could reap them: they are told to leave."""
        for uid in sorted(uids, key=lambda one: one in self.job.members):  # none of its spares gets a place now
            if (worker := self._workers.get(uid)) is not None:
                worker.managed = False
                self.deeds += [Send(uid, End(75, "evicted", "the launcher of this worker is gone")), KillWorker(uid)]
                self._gone(worker, None, now, otherwise="closed")

    def _never_joined(self, worker: Worker, signal: int | None, code: int | None, now: float) -> None:
        del self._workers[worker.uid]
        how = f"signal {signal}" if signal is not None else "whatever it was" if code is None else f"exit code {code}"
        log.warning("worker %s (process %d) ended by %s before it joined", worker.uid, worker.pid, how)
        if not self.job.began and code is not None and signal is None:
            why = f"worker {worker.uid} ended by {how} before it joined: the script must call elastic.join"
            self._event(Over(End(1, "step-failed", why)), now)
        else:
            self._replacing.ended_unjoined()
            self._replace(now)

    def _gone(self, worker: Worker, signal: int | None, now: float, *, otherwise: Why) -> None:
        """Nothing of it is at work any more. [REC-31]"""
        del self._workers[worker.uid]
        why: Why = worker.ending or otherwise
        if worker.uid in self.job.members and self.job.phase is not JobPhase.ENDED:
            log.warning("lost stage %d: %s", self.job.places.index(worker.uid), worker.in_words(why, signal))
            if self.job.began:
                self._recoveries.timeline.lost(worker.uid, worker.pid, alive_at=worker.heard_at, now=now)
        self._event(Gone(worker.uid, why, signal, worker.quit.traceback if worker.quit else ""), now)
        self._replace(now)

    def _replace(self, now: float) -> None:
        """Not while members form and rebuild: what a new process takes to start is theirs then. Nobody waits in a job of which
        no process is left, or to come. [REC-34, REC-35]"""
        if self.job.phase in (JobPhase.GATHERING, JobPhase.WORKING) and (count := self._replacing.order(len(self._workers))):
            self.deeds.append(Replace(count))
        elif self.job.phase is JobPhase.GATHERING and not self._workers and not self._replacing.ordered:
            self._event(Over(End(75, "no-spare", f"no process is left after step {self.job.step}, and none is started")), now)

    # -- messages

    def heard(self, uid: str, message: FromMember, now: float) -> None:
        """One message of a worker that has joined."""
        worker = self._workers.get(uid)
        if worker is None or worker.ending is not None:
            return
        worker.heard(now)
        if isinstance(message, Beat):
            worker.beats(message, now, self._history)
            self._history.log_changes()
        elif isinstance(message, Terms):
            self._declared(uid, message, now)
        elif isinstance(message, Put | Ask):
            if message.generation == self.job.generation:
                self.deeds += [Send(one, held) for one, held in self._board.take(uid, message)]
        elif isinstance(message, Reached):
            self._reaches(uid, message, now)
        elif isinstance(message, Quit):
            self._quits(worker, message, now)
        elif isinstance(message, Join):
            worker.ends("closed", now)
        else:
            if isinstance(message, Rebuilt) and message.generation == self.job.generation:
                self._recoveries.timeline.moved += message.moved
                self._recoveries.timeline.read += message.read
            if isinstance(message, Raised) and message.generation == self.job.generation:
                stage = self.job.places.index(uid)
                log.error("stage %d (worker %s) raised in step %d:\n%s", stage, uid, message.step, message.traceback)
                self._recoveries.timeline.lost(uid, worker.pid, alive_at=now, now=now)
            self._event((uid, message), now)

    def _declared(self, uid: str, terms: Terms, now: float) -> None:
        if self._terms is None:
            self._terms = terms
            self.job = replace(self.job, max_losses_of_step=terms.max_losses_of_step)
        elif self._terms != terms:
            self._event(Over(End(1, "step-failed", f"worker {uid} trains by {terms}, and others by {self._terms}")), now)

    def _reaches(self, uid: str, message: Reached, now: float) -> None:
        if message.generation == self.job.generation and uid in self.job.members:
            if message.point == "unblocked":
                self._recoveries.unblocked(uid, now)
            else:
                self._record_recovery(self._recoveries.reached(uid, self.job.members, now))

    def _quits(self, worker: Worker, message: Quit, now: float) -> None:
        worker.quit = message
        log.error("worker %s ended by an error:\n%s", worker.uid, message.traceback)
        worker.ends("raised", now + QUITTING_S)
        if message.kind == Superseded.kind:
            self._event(Over(End(76, "", "a newer claim of the run exists: this job is superseded")), now)

    # -- the job

    def ladder_chose(self, chosen: Chosen, considered: tuple[Considered, ...], now: float) -> None:
        if chosen.generation == self.job.generation:
            self._recoveries.timeline.considered = considered
        self._event(chosen, now)

    def ladder_failed(self, generation: int, error: Exception, now: float) -> None:
        if generation != self.job.generation:
            return
        kind = error.kind if isinstance(error, CheckpointError) else type(error).__name__
        if isinstance(error, Superseded):
            end = End(76, "", f"this job is superseded: {error}")
        else:
            end = End(1, "step-failed", f"from where to go on was not found out: {kind}: {error}")
        self._event(Over(end), now)

    def asked_to_end(self, now: float) -> None:
        """SIGTERM: after the next step, with 75."""
        if not self.job.ending:
            log.info("ending after the next step, as was asked for")
            self._event(Ending(), now)
            self._ends_at = now + ENDING_S

    def end(self, end: End, now: float) -> None:
        """The job ends now; said again, who is still there is killed."""
        if self._departure is not None:
            for worker in self._workers.values():
                worker.ends("exit", now)
                worker.ends_at = now
            self._departure = Departure(end)
        self._event(Over(end), now)

    def outcome(self) -> End | None:
        """What the job has come to, once it has ended and nobody of it is left; None before."""
        return None if self._departure is None or self._workers else self._departure.outcome

    def _event(self, event: JobEvent, now: float) -> None:
        before = self.job
        self.job, orders = coordination.after(before, event)
        if self.job.generation != before.generation:
            self._viewed(before)
        if before.phase is not JobPhase.WORKING and self.job.phase is JobPhase.WORKING:
            self._recoveries.survivors = frozenset(self.job.members)
        if before.phase is JobPhase.FORMING and self.job.phase is JobPhase.REBUILDING:
            self._recoveries.timeline.formed_at = now
        for order in orders:
            self._carry(order, now)
        if before.phase is not self.job.phase:
            self._replace(now)
        if self.job.end is not None and self._departure is None:
            self._ended(self.job.end, now)

    def _viewed(self, before: JobState) -> None:
        self._board, self._waits = Board(), Waits()
        self._recoveries.timeline.viewed()
        for uid in set(self.job.members) - set(before.members):
            self._record_member(self._workers[uid])

    def _carry(self, order: CoordinatorOrder, now: float) -> None:
        """A Register needs no deed: the table holds it, and tells it before anything else. [REC-10]"""
        if isinstance(order, Tell):
            message = order.message
            if isinstance(message, Go):
                last = message.last and self._recoveries.said_in(message.last)
                message = msgspec.structs.replace(message, recovered=self._recoveries.untold, last=last)
            elif isinstance(message, Commit):
                message = self._recoveries.said_in(message)
            self.deeds.append(Send(order.uid, message))
        elif isinstance(order, Choose):
            self.deeds.append(AskLadder(order, self.job.last, self._terms or Terms()))
        elif isinstance(order, Wait):
            self._waits.begin(order, now, self._limits.wait_s(order.of, self._terms))
        elif isinstance(order, Recovered):
            self._record_recovery(self._recoveries.given_up())
            self._recoveries.complete(order, self.job.epoch, now)

    def _record_recovery(self, recovery: Recovery | None) -> None:
        if recovery is not None:
            self.deeds.append(Record(recovery_event(recovery)))

    def _ended(self, end: End, now: float) -> None:
        self._record_recovery(self._recoveries.given_up())
        self._departure = Departure(end)
        log.log(logging.INFO if end.code == 0 else logging.ERROR, "ended: %s", f"{end.reason}: {end.message}".lstrip(": "))
        self._departure.begin(self._workers.values(), now)

    def _record_member(self, worker: Worker) -> None:
        job = self.job
        if worker.who is not None and job.phase is not JobPhase.ENDED:
            stage = job.places.index(worker.uid) if worker.uid in job.members else None
            event = member_event(worker.who, stage, job.stages, epoch=job.epoch, generation=job.generation)
            self.deeds.append(Record(event))

    # -- time

    def tick(self, now: float) -> float:
        """What time alone brings; in how many seconds to ask again at the latest."""
        workers = list(self._workers.values())
        for at, worker in silent_at(workers, self._limits.heartbeat_s):
            if now >= at:
                worker.ends("silent", now)
        if self._departure is None:
            self._look_for_stalled(now)
            self._lose_patience(now)
        for worker in workers:
            if worker.ends_at is not None and now >= worker.ends_at:
                self._kill(worker, now)
        times = [*self._waits.ends, *due_at(self._workers.values(), self._limits.heartbeat_s)]
        return max(0.0, min([self._limits.beat_s / 2, *(at - now for at in times)]))

    def _kill(self, worker: Worker, now: float) -> None:
        """Ends it; the second time, it is given up though nobody could reap it. [REC-31]"""
        if not worker.managed:
            self.deeds.append(Send(worker.uid, End(75, "evicted", f"this worker was given up: {worker.ending}")))
        self.deeds.append(KillWorker(worker.uid))
        if not worker.managed or worker.killed:
            self._gone(worker, None, now, otherwise="closed")
        worker.killed, worker.ends_at = True, now + REAPED_S

    def _look_for_stalled(self, now: float) -> None:
        if self.job.phase is JobPhase.GATHERING:
            return
        members = [self._workers[uid] for uid in self.job.members if uid in self._workers]
        culprits, anybody = stalled([one for one in members if one.ending is None], now, self._history)
        for worker in culprits:
            worker.ends("stalled", now)
            worker.heard_at = worker.moved_at
        if anybody and not culprits:
            log.warning("members wait for each other without an end: they form anew")
            for worker in members:
                worker.moved_at = now
            self._event(WaitOver(self.job.generation, "broken"), now)

    def _lose_patience(self, now: float) -> None:
        coming = any(worker.who is None for worker in self._workers.values())
        for wait in self._waits.over(now, coming=coming):
            self._event(WaitOver(wait.generation, wait.of), now)
        if self._ends_at is not None and now >= self._ends_at:
            self._event(Over(End(75, "", f"ended after step {self.job.step}: no step was completed in {ENDING_S:g} s")), now)
