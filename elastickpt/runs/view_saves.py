"""Saves into a run by a job whose process groups come and go: who claimed the run, and who restored it, is somebody else.

Each view has a group, and a saver for it; all of them save by the same arenas and the same writer process. A save under way
when a view is over is left to the writers: it commits whole, or there is no checkpoint of it, shortly after the next view. If
it did commit, a save of the same step in the next view gives that checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from elastickpt.commit.attempt import RunDestination
from elastickpt.commit.record import read_records
from elastickpt.errors import CheckpointError, DeadlineExceeded, PathOccupied, Refused, Superseded
from elastickpt.ledger.epochs import Holding
from elastickpt.ledger.objects import Operations, complete
from elastickpt.ledger.records import Adopted, CommitRegister
from elastickpt.ledger.retention import words_of
from elastickpt.ledger.stored import list_commits, read_adopted, read_claim, read_register, read_start
from elastickpt.ranks.process_group import Group, job_group
from elastickpt.ranks.threads import apart
from elastickpt.runs.calendar import Calendar, LocalBoard, NoticeBoard, SaveTimes
from elastickpt.runs.due import Every, Measured
from elastickpt.runs.events import EndedSave
from elastickpt.runs.run import Run
from elastickpt.saving.request import CheckpointInfo
from elastickpt.saving.saver import Saver
from elastickpt.saving.task import SaveHandle
from elastickpt.saving.writer_pool import Yard
from elastickpt.storage.opening import path_in
from elastickpt.storage.store import Store

log = logging.getLogger(__name__)

LEFT_LIMIT_S = 1.5
"""How long what is under way when a view is over has to commit, from the next view on; beside training."""


@dataclass(frozen=True, slots=True)
class Claims:
    """How a run is claimed by who restores it for the members: its `root`, "" for no run; what it keeps, in words; `take_over`
    and `orphans_s` as in `RunOptions`."""

    root: str = ""
    keep: str = ""
    take_over: bool = False
    orphans_s: float = 60.0


class ViewSaves:
    """One member's saves into `run`, which was made before there was a group, and which nobody restores. For the thread that
    trains, but for `interrupt` and `leave`. Raises Refused for a run that has a state of its own."""

    def __init__(self, run: Run) -> None:
        if run._state is not None:
            raise Refused(f"{run.root}: a Run with a state, expected one without: what is saved is that of the stages")
        self._run, self._store, self._options = run, run._store, run._options
        self._epoch = 0
        self._group: Group | None = None
        self._purpose, self._of_view = "", 0
        self._yard: Yard | None = None
        self._saver: Saver | None = None
        self._leaving: list[threading.Thread] = []
        self._calendar: Calendar | None = None
        self._holding: Holding | None = None
        self._last: CheckpointInfo | None = None
        self._superseded: Superseded | None = None
        self._under_way = 0
        self._changing = threading.Lock()

    @property
    def claims(self) -> Claims:
        return Claims(self._run.root, words_of(self._run._keep), self._options.take_over, self._options.orphans_s)

    def stand(self, view: str) -> None:
        """A view begins, whose name is the same on all members and no other one's; its process group is the default one."""
        self.leave()
        with self._changing:
            self._group, self._purpose, self._calendar = job_group(None), f"view-{view}-saves", None
            self._of_view = 0  # saves so far

    def goes_on(self, epoch: int) -> None:
        """The run is claimed for this job as `epoch`, from here on."""
        with self._changing:
            if epoch != self._epoch:
                self._epoch, self._holding, self._superseded = epoch, None, None

    def at(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        """A save of `step` completed steps, if it is due; all members call this after the same steps. Blocks as `save` does.
        Raises Superseded once a save has found that another job has the run."""
        if self._superseded is not None:
            raise self._superseded
        group = self._group
        if self._epoch == 0 or group is None:
            return None
        measured, saves = self._measured(), self._saves()
        try:
            decision = self._calendar_now(group).decided(step, notice=None, measured=measured, saves=saves)
        except (DeadlineExceeded, RuntimeError) as error:  # of the store, as the member that keeps it is gone
            log.warning("step %d: whether it is to be saved is not known: %s", step, error)
            return None
        return self.now(step, state) if decision.saves else None

    def now(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        """A save of `step` completed steps, due or not; None where no run is claimed, and where the view is over."""
        with self._changing:
            group = self._group
            if self._epoch == 0 or group is None:
                return None
            self._yard = self._yard or Yard(self._options.saving)
            self._saver = saver = self._saver or Saver(group, self._yard, purpose=self._purpose)
            self._of_view += 1
        if self._of_view == 2:  # by now a stage that was rebuilt has moments
            saver.ask_once()
        if self._calendar is not None:
            self._calendar.saved()
        begun, about, place = time.monotonic(), (step, self._epoch), (group.rank, group.member)
        destination = RunDestination(self._store, self._holding_now(group), step, self._epoch)
        try:
            begun_save = saver.save(state, destination, self._options.request(destination.path, step))
        except Refused:
            if self._saver is saver:
                raise
            return None  # the view was over before
        with self._changing:
            self._under_way += 1
        staged = time.monotonic()
        handle = SaveHandle(destination.path)
        handle.staging(begun_save.wait_staged)
        begun_save.add_done_callback(lambda ended: handle.end(self._outcome(ended, about)))
        handle.add_done_callback(lambda ended: self._ended(ended, place, about, begun, staged))
        return handle

    def interrupt(self) -> None:
        """The view is over: what the thread that trains waits for in here ends. From any thread."""
        with self._changing:
            saver = self._saver
        if saver is not None:
            saver.interrupt("its view is over")

    def leave(self) -> None:
        """The next view is known, and whole: what is under way ends within a stated time. From any thread; not blocking."""
        with self._changing:
            saver, self._saver, self._group, self._calendar = self._saver, None, None, None
            if saver is not None:
                thread = apart("elastickpt-old-saves", partial(_leave, saver))
                self._leaving = [*(one for one in self._leaving if one.is_alive()), thread]
                thread.start()

    def close(self) -> None:
        """What is under way is waited for as at the end of a run."""
        with self._changing:
            saver, self._saver, self._group = self._saver, None, None
        until = time.monotonic() + self._options.saving.exit_limit_s
        if saver is not None:
            saver.close()
        for thread in self._leaving:
            thread.join(max(0.0, until - time.monotonic()))
        if self._yard is not None:
            self._yard.close(limit_s=max(0.0, until - time.monotonic()))
        self._run.close()

    def _calendar_now(self, group: Group) -> Calendar:
        if self._calendar is None:
            board: NoticeBoard = LocalBoard()
            if not (isinstance(self._options.due, Every) and self._options.due.steps is not None):
                board = group.own_store(f"{self._purpose}/steps-{self._epoch}")
            self._calendar = Calendar(board, self._options.due, member=group.member, members=len(group.ranks))
        return self._calendar

    def _holding_now(self, group: Group) -> Holding | None:
        """The job's claim, as the run has it; on member 0, which opens attempts."""
        if group.member != 0:
            return None
        if self._holding is None:
            claim, adopted = complete(read_claim(self._store, self._epoch)), complete(read_adopted(self._store, self._epoch))
            if isinstance(adopted, Adopted):
                self._holding = Holding(self._epoch, claim.by, adopted)
                continued = complete(read_start(self._store, self._epoch)).continued  # all members have loaded it
                self._run._upkeep.started(self._holding, verified={} if continued is None else {continued: True})
        return self._holding

    def _measured(self) -> Measured:
        return Measured(0.0 if self._last is None else self._last.stall_s, 0.0, 0)

    def _saves(self) -> SaveTimes:
        last = self._last
        with self._changing:
            return SaveTimes(
                0.0 if last is None else last.stall_s + last.plan_s + last.write_s + last.commit_s, self._under_way
            )

    def _outcome(self, ended: SaveHandle, about: tuple[int, int]) -> CheckpointInfo | BaseException:
        error = ended.exception()
        if isinstance(error, PathOccupied):
            try:
                return complete(_committed(self._store, *about)) or error
            except CheckpointError as why:
                log.warning("step %d was saved in an earlier view, and cannot be read: %s", about[0], why)
        return ended.result() if error is None else error

    def _ended(self, handle: SaveHandle, place: tuple[int, int], about: tuple[int, int], begun: float, staged: float) -> None:
        rank, member = place
        error = handle.exception()
        info = handle.result() if error is None else None
        ended = EndedSave(*about, info, error, begun, staged, time.monotonic())
        with self._changing:
            self._under_way -= 1
            self._last = info or self._last
            if isinstance(error, Superseded) and ended.epoch == self._epoch:  # a rollback supersedes saves under way
                self._superseded = error
        if info is not None and member == 0:
            self._run._upkeep.committed()
        self._run._upkeep.call(lambda: self._run.tell_saved(ended, rank=rank, member=member))


def _committed(store: Store, step: int, epoch: int) -> Operations[CheckpointInfo | None]:
    """The checkpoint of this step and epoch, which took this process no time; None where there is none."""
    listing = yield from list_commits(store)
    for one in sorted(listing.registers, key=lambda one: one.attempt, reverse=True):
        if (one.step, one.epoch) == (step, epoch):
            register = yield from read_register(store, one)
            if isinstance(register, CommitRegister):
                records = read_records(store, one.folder)
                place, attempt = path_in(store, one.folder), records.manifest.attempt
                return CheckpointInfo(place, step, attempt, records.nbytes, len(records.arrays), 0.0, 0.0, 0.0, 0.0)
    return None


def _leave(saver: Saver) -> None:
    try:
        saver.leave("its view of the job is over", limit_s=LEFT_LIMIT_S)
    except CheckpointError as error:
        log.warning("saves of a view that is over: %s", error)
