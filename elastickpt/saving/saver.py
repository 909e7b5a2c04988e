"""Saves beside training, as the thread that trains sees them: capture, stage, go on.

    save() --> capture --> a free slot  --> known structure: stage ----------------------------------> handle
                                |             much of it: meanwhile the ranks agree and writers begin
                                |                 new one: wait for the other ranks, then stage -----> handle
                                '-- none within `stall_limit_s`: this rank's failure, so nobody saves -> handle

With a known structure nobody is asked anything here: a rank that is dead or hangs keeps no other one from training.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

from elastickpt.commit.attempt import Committed, Destination, leave_path, take_path
from elastickpt.commit.draft import ended
from elastickpt.errors import Cancelled, CheckpointError, DeadlineExceeded, RankLost, Refused, SaveSkipped, fault
from elastickpt.ranks.process_group import Group, end_team, team_of
from elastickpt.ranks.team import Call, Team
from elastickpt.ranks.threads import WorkerThread
from elastickpt.saving.arenas import ArenaSlot
from elastickpt.saving.beside import SavesBeside
from elastickpt.saving.request import AsyncOptions, Request
from elastickpt.saving.save_states import Event
from elastickpt.saving.staging import Stager
from elastickpt.saving.structures import KNOWN, propose
from elastickpt.saving.task import SaveHandle, SaveTask, Times, info_of
from elastickpt.saving.writer_pool import WriterPool, Yard
from elastickpt.training.device import DeviceCopier, StepGate
from elastickpt.training.held import HeldArray
from elastickpt.writer.arena_plan import ArenaPlan
from elastickpt.writer.share import Share
from elastickpt.writer.submissions import StagedPortion, Submission

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

T = TypeVar("T")
UNDECIDED = 4  # saves that were written and are not committed, beside those that have an arena
MEANWHILE_NBYTES = 128 << 20


class Saver:
    """One rank's saves beside training, for one process group; `purpose` tells the savers of a group apart, and is the same on
    all ranks. All ranks call `save` in the same order, from one thread.
    """

    def __init__(self, group: Group, yard: AsyncOptions | Yard, *, purpose: str, copier: DeviceCopier | None = None) -> None:
        """In a yard that others come to after it, or in one of its own with these options."""
        self._yard = yard if isinstance(yard, Yard) else Yard(yard, copier)
        self._own = None if self._yard is yard else self._yard
        options = self._yard.options
        self._owner = os.getpid()
        self._rank, self._world_size = group.rank, group.world_size
        self._meetings = _Meetings(group, purpose, options)
        self._options = options
        self._gate = StepGate()
        self._writers = WriterPool(self._yard)
        self._arenas = self._yard.arenas
        self._beside = SavesBeside(self, self._meetings.meet, self._writers, options.arena_nbytes, self._ended)
        self._rounds = WorkerThread("elastickpt-rounds")
        self._endings = WorkerThread("elastickpt-endings")
        self._open: set[SaveTask] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._asks = False
        self._saves = 0
        self._skipped = 0

    @property
    def exit_limit_s(self) -> float:
        return self._options.exit_limit_s

    @property
    def skipped(self) -> int:
        """Saves that were left out, because some rank had no free arena."""
        return self._skipped

    def save(
        self,
        state: Mapping[str, object],
        destination: Destination,
        request: Request,
        *,
        mesh: DeviceMesh | None = None,
    ) -> SaveHandle:
        """Stages the state and returns; what follows goes on beside training, and its outcome is the handle's.

        Blocking for capture and copy; for a structure that this rank has not saved before, also until the ranks agreed on it.
        Raises Refused after `close` and in a forked process; all else is raised by the handle.
        """
        if self._closed or os.getpid() != self._owner:
            raise Refused("this saver was closed" if self._closed else "a saver belongs to the process that made it")
        self._saves += 1
        task = SaveTask(SaveHandle(destination.path), destination, request, Times(time.perf_counter()), self._saves)
        with self._changed:
            self._open.add(task)
        left = False
        try:
            then = self._prepare(task, state, mesh)
            task.times.staged = time.perf_counter()
            self._rounds.put(lambda: self._beside.carry_out(task))
            left = True
            then()
        except BaseException as error:  # an interrupt
            task.interrupt(_as_exception(error))
            if not left:
                self._beside.fail(task, Event.INTERRUPTED, error)
            raise
        return task.handle

    def ask_once(self) -> None:
        """The next save asks the other ranks before it stages, as what some of them hold may have changed; all ranks call this
        before the same save."""
        self._asks = True

    def close(self, *, limit_s: float | None = None) -> None:
        """Takes no more saves, waits for those under way at most `limit_s` (default: the option), and leaves the rest to the
        writer process to finish. Blocking."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        limit_s = self._options.exit_limit_s if limit_s is None else limit_s
        until = time.monotonic() + limit_s
        left = self._still_open(limit_s)
        if left:
            places = ", ".join(sorted(task.handle.path for task in left))
            log.warning("not waiting any longer for saves under way, which are left to their writers: %s", places)
        self._end_all(until)

    def interrupt(self, why: str) -> None:
        """Its team is gone: no save waits for the other ranks any more. Not blocking, from any thread."""
        self._meetings.end(why)

    def leave(self, why: str, *, limit_s: float) -> None:
        """Takes no more saves, as its team is gone. A save that all ranks have handed over commits, if it does within the
        limit; every other one ends without a checkpoint. Their places are free at once. Blocking, for as long as the storage
        takes beyond the limit."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        self._meetings.end(why)
        with self._changed:
            for task in self._open:
                if task.marked:
                    task.marked = False
                    leave_path(task.destination.path)
        for task in self._still_open(limit_s):
            if task.attempt is not None:
                self._writers.settle(task.attempt, RankLost(why))
        self._still_open(None)
        self._end_all(time.monotonic())

    def _still_open(self, limit_s: float | None) -> list[SaveTask]:
        """The saves that have not ended within the limit, if there is one. Blocking."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, limit_s)
            return list(self._open)

    def _end_all(self, until: float) -> None:
        self._writers.close(limit_s=max(0.0, until - time.monotonic()))
        if self._own is not None:
            self._own.close(limit_s=max(0.0, until - time.monotonic()))
        self._rounds.put(
            lambda: self._meetings.end("its saver was closed")
        )  # not before: saves that are in their rounds still end
        self._rounds.put(self._endings.stop)
        self._rounds.stop()
        self._gate.open()

    # -- on the thread that trains -------------------------------------------------------------------------------------

    def _prepare(self, task: SaveTask, state: Mapping[str, object], mesh: DeviceMesh | None) -> Callable[[], None]:
        """Captures, and stages by a plan that is known; returns what is left to do once the rounds have begun. What fails is
        left to the rounds, in which all ranks learn of it."""
        try:
            task.destination.require_accepted()
            take_path(task.destination.path)
            task.marked = True
            task.proposal = propose(state, mesh, rank=self._rank, world_size=self._world_size)
            self._require_decisions(task)
            task.slot = self._arenas.reserve(limit_s=self._options.stall_limit_s)
            arrays = task.proposal.live.arrays
            known = None if self._asks else KNOWN.to_stage_by(self, task.proposal.table.digest, task.request)
            self._asks = False
            stager = None if known is None else known.stager(self._options.arena_nbytes)
            if known is None or stager is None or len(stager.prepared.portions) > 1:
                return lambda: self._stage_together(task, arrays)
            slot = task.slot
            slot.fit(stager)
            task.hashed = known.hashed(arrays, task.request)
            task.stages_by = known
            if self._writes_meanwhile(stager.prepared) and slot.copies_nothing_beside(arrays):
                task.staged.set_running_or_notify_cancel()
                return lambda: self._stage_meanwhile(task, slot, arrays)
            self._stage(task, slot, arrays)
            task.staged.set_result(None)
        except Exception as error:
            self._beside.fail(task, Event.FAILED, error)
        return _nothing

    def _writes_meanwhile(self, prepared: ArenaPlan) -> bool:
        """Whether what is staged is written while the rest is: by a process, as a thread would wait for this one, and of what
        takes longer to copy than the ranks to agree."""
        return self._options.executor == "process" and prepared.arena_nbytes >= MEANWHILE_NBYTES

    def _stage_meanwhile(self, task: SaveTask, slot: ArenaSlot, arrays: Sequence[HeldArray]) -> None:
        """Copies, and says on the way how far. What fails is said by the writer, as the attempt may be open by now."""
        try:
            slot.stage(0, arrays)
        except Exception as error:
            task.staged.set_exception(error)
        else:
            task.times.staged = time.perf_counter()
            task.staged.set_result(None)

    def _require_decisions(self, task: SaveTask) -> None:
        """Storage that takes bytes and decides nothing must not be filled with drafts. Raises SaveSkipped. [SAVE-101]"""
        with self._changed:
            waiting = len(self._open - {task})
        if waiting >= self._options.arenas + UNDECIDED:
            raise SaveSkipped(
                f"{waiting} earlier saves are under way and not decided yet; save less often, or look at the storage"
            )

    def _stage(self, task: SaveTask, slot: ArenaSlot, arrays: Sequence[HeldArray]) -> None:
        task.copies = copies = slot.stage(0, arrays)
        if copies is not None:
            self._gate.close_for(copies, until=task.handle.done)
            task.handle.staging(copies.wait)

    def _stage_together(self, task: SaveTask, arrays: Sequence[HeldArray]) -> None:
        """Waits until the ranks have agreed; then stages, or all portions but the last are also written before this returns.

        Where they take longer than training may wait, this rank gives the save up, and all ranks skip it. [SAVE-104]
        """
        try:
            stager = self._of_the_others(task.agreed)
            if stager is None:
                return
            if len(stager.prepared.portions) == 1:
                if task.slot is None:
                    raise fault("no arena was reserved")
                task.slot.fit(stager)
                self._stage(task, task.slot, arrays)
                task.times.staged = time.perf_counter()
                task.staged.set_result(None)
        except BaseException as error:
            task.staged.set_exception(failure := _as_exception(error))
            task.open.add_done_callback(lambda share: self._withdraw(task, share, failure))
            if not isinstance(error, Exception):
                raise
        else:
            if len(stager.prepared.portions) > 1:
                self._stage_open(task, stager, arrays)

    def _stage_open(self, task: SaveTask, stager: Stager, arrays: Sequence[HeldArray]) -> None:
        """Stages all portions once the attempt is open, which nobody else hands to the writer."""
        try:
            share = self._of_the_others(task.open)
        except BaseException as error:
            failure = _as_exception(error)
            task.open.add_done_callback(lambda share: self._withdraw(task, share, failure))
            if not isinstance(error, Exception):
                raise
        else:
            if share is not None:
                self._stage_portions(task, share, stager, arrays)

    def _of_the_others(self, found: Future[T]) -> T | None:
        """What came of them; None if the save failed there, as its handle says. Blocking, at most `stall_limit_s`; then raises
        SaveSkipped."""
        limit_s = self._options.stall_limit_s
        if not wait((found,), timeout=limit_s).done:
            raise SaveSkipped(f"the ranks did not agree within {limit_s:g} s, for which training would have had to wait")
        return None if found.exception() is not None else found.result()

    def _withdraw(self, task: SaveTask, opened: Future[Share], error: BaseException) -> None:
        if opened.exception() is None:
            self._beside.fail(task, Event.NOT_STAGED, error)

    def _stage_portions(self, task: SaveTask, share: Share, stager: Stager, arrays: Sequence[HeldArray]) -> None:
        prepared, slot, checksums = share.prepared, task.slot, b""
        last, submission = len(prepared.portions) - 1, None
        words = (task.handle.path, last + 1, prepared.arena_nbytes)
        log.info("%s: in %d portions of at most %d bytes, so training waits for all but one", *words)
        try:
            for number in range(last + 1):
                if slot is None:
                    raise fault("no arena was reserved")
                slot.fit(stager)
                task.copies = slot.stage(number, arrays)
                submission = self._beside.submit(task, StagedPortion(share, number, checksums))
                task.times.staged = time.perf_counter()
                if number == last or not _written(submission, limit_s=self._options.stall_limit_s):
                    self._beside.follow(task, submission)
                    return
                checksums += submission.result().checksums
        except BaseException as error:
            self._beside.fail(task, Event.NOT_STAGED, error, writing=submission)
            if not isinstance(error, Exception):
                raise

    # -- on other threads ----------------------------------------------------------------------------------------------

    def _ended(self, task: SaveTask, outcome: Committed | BaseException) -> None:
        at = time.perf_counter()
        self._endings.put(lambda: self._end(task, outcome, at))

    def _end(self, task: SaveTask, outcome: Committed | BaseException, at: float) -> None:
        if task.attempt is not None:
            ended(task.attempt.draft)
        with self._changed:
            marked, task.marked = task.marked, False
        if marked:
            leave_path(task.destination.path)
        if isinstance(outcome, SaveSkipped):
            self._skipped += 1
            log.warning("%s: skipped (%d so far): %s", task.handle.path, self._skipped, outcome)
        elif isinstance(outcome, BaseException):
            log.error("%s: not saved: %s", task.handle.path, outcome)
        task.handle.end(info_of(task, outcome, at) if isinstance(outcome, Committed) else outcome)
        with self._changed:
            self._open.discard(task)
            self._changed.notify_all()


class _Meetings:
    """The team of these savers, in the call that a save is, and its end. They hold no process group, so that one that is gone
    takes its savers along. All ranks make as many saves: one that is behind is told so."""

    def __init__(self, group: Group, purpose: str, options: AsyncOptions) -> None:
        self._rank, self._ranks, self._limit_s = group.rank, group.ranks, group.timeout_s
        self._handle = None if group.handle is None else weakref.ref(group.handle)
        self._purpose, self._options, self._over = purpose, options, ""

    def meet(self, task: SaveTask) -> Team:
        """Blocking. Raises what `Team.enter` does; Cancelled after the end, also where that comes before the team."""
        live = None if self._handle is None else self._handle()
        if self._handle is not None and live is None:
            raise Refused("the process group of this save is gone")
        team = team_of(Group(self._rank, self._ranks, live), purpose=self._purpose)
        what = f"save beside training to {task.handle.path}"
        if self._over:  # an end from here on finds the team
            self.end(self._over)
            raise Cancelled(f"{what}: ended here, as {self._over}")
        team.enter(Call(what, self._limit_s, "the process group's timeout", self._options.stall_limit_s, task.number))
        return team

    def end(self, why: str) -> None:
        """No save meets the other ranks any more; who waits for them does not. From any thread."""
        self._over = why
        live = None if self._handle is None else self._handle()
        if live is not None:
            end_team(Group(self._rank, self._ranks, live), self._purpose, why)


def _nothing() -> None:
    return None


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else CheckpointError(f"interrupted: {type(error).__name__}")


def _written(submission: Submission, *, limit_s: float) -> bool:
    """Whether a portion is written. Blocking as long as it gets on; False if it failed. Raises DeadlineExceeded where nothing
    is written for `limit_s`: the storage must not keep training."""
    seen, since = -1, time.monotonic()
    while not submission.future.done():
        wait((submission.future,), timeout=min(0.25, limit_s))
        if submission.written != seen:
            seen, since = submission.written, time.monotonic()
        elif time.monotonic() - since > limit_s:
            raise DeadlineExceeded(f"nothing was written for {limit_s:g} s while training waited for a portion")
    return submission.future.exception() is None
