"""Saves into a run by a job whose process groups come and go: who claimed the run, and who restored it, is somebody else.

A view has a group and a saver of its own. A save under way when its view ends is left to its writers: it commits whole, or
there is no checkpoint of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from elastickpt.commit.destination import RunDestination
from elastickpt.errors import CheckpointError
from elastickpt.ledger.epochs import Holding
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Adopted
from elastickpt.ledger.stored import read_adopted, read_claim
from elastickpt.ranks.process_group import Group, end_team, job_group
from elastickpt.runs.calendar import Board, Calendar, LocalBoard, Saves
from elastickpt.runs.due import Every, Measured
from elastickpt.runs.run import Run
from elastickpt.saving.request import CheckpointInfo
from elastickpt.saving.saver import Saver
from elastickpt.saving.task import SaveHandle

log = logging.getLogger(__name__)

LEFT_LIMIT_S = 2.0
"""For how long a saver of a view that is over waits for its saves, beside training."""


class ViewSaves:
    """One member's saves into `run`, which was made before there was a group, and which nobody restores. For the thread that
    trains, but for `interrupt`."""

    def __init__(self, run: Run) -> None:
        self._run, self._store, self._options = run, run._store, run._options
        self._epoch, self._views = 0, 0
        self._group: Group | None = None
        self._purpose = ""
        self._saver: Saver | None = None
        self._calendar: Calendar | None = None
        self._holding: Holding | None = None
        self._last: CheckpointInfo | None = None
        self._under_way = 0
        self._began: float | None = None
        self._changing = threading.Lock()

    @property
    def root(self) -> str:
        return self._run.root

    def stand(self, view: str) -> None:
        """A view begins, whose name is the same on all members and no other one's; its process group is the default one."""
        self._leave()
        self._group, self._purpose = job_group(None), f"view-{view}-saves"

    def goes_on(self, epoch: int) -> None:
        """The run is claimed for this job as `epoch`, from here on."""
        if epoch != self._epoch:
            self._epoch, self._holding = epoch, None

    def at(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        """A save of `step` completed steps, if it is due; all members call this after the same steps. Blocks as `save` does."""
        if self._epoch == 0:
            return None
        day = self._calendar_now().day(step, notice=None, measured=self._measured(), saves=self._saves())
        return self.now(step, state) if day.saves else None

    def now(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        """A save of `step` completed steps, due or not; None where no run is claimed."""
        if self._epoch == 0 or self._group is None:
            return None
        if self._saver is None:
            self._saver = Saver(self._group, self._options.saving, purpose=self._purpose)
        self._calendar_now().saved()
        destination = RunDestination(self._store, self._holding_now(), step, self._epoch)
        handle = self._saver.save(state, destination, self._options.request(destination.place, step))
        with self._changing:
            self._under_way += 1
        handle.add_done_callback(self._ended)
        return handle

    def interrupt(self) -> None:
        """The view is over: what the thread that trains waits for in here ends. From any thread."""
        group, saver = self._group, self._saver
        if group is not None and saver is not None:
            end_team(group, self._purpose, "its view is over")

    def close(self) -> None:
        """What is under way is waited for as at the end of a run."""
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()
        self._run.close()

    def _leave(self) -> None:
        saver, self._saver, self._calendar = self._saver, None, None
        if saver is not None:
            _beside(lambda: saver.close(limit_s=LEFT_LIMIT_S))

    def _calendar_now(self) -> Calendar:
        if self._calendar is None:
            assert self._group is not None, "a view stands"
            board: Board = LocalBoard()
            if not (isinstance(self._options.due, Every) and self._options.due.steps is not None):
                board = self._group.own_store(f"{self._purpose}/steps-{self._epoch}")
            self._calendar = Calendar(board, self._options.due, member=self._group.member, members=len(self._group.ranks))
        return self._calendar

    def _holding_now(self) -> Holding | None:
        """The job's claim, as the run has it; on member 0, which opens attempts."""
        if self._group is None or self._group.member != 0:
            return None
        if self._holding is None:
            claim, adopted = complete(read_claim(self._store, self._epoch)), complete(read_adopted(self._store, self._epoch))
            if isinstance(adopted, Adopted):
                self._holding = Holding(self._epoch, claim.by, adopted)
                self._run._upkeep.started(self._holding, verified={})
        return self._holding

    def _measured(self) -> Measured:
        return Measured(0.0 if self._last is None else self._last.stall_s, 0.0, 0)

    def _saves(self) -> Saves:
        last = self._last
        with self._changing:
            return Saves(0.0 if last is None else last.stall_s + last.plan_s + last.write_s + last.commit_s, self._under_way)

    def _ended(self, handle: SaveHandle) -> None:
        error = handle.exception()
        with self._changing:
            self._under_way -= 1
        if error is None:
            self._last = handle.result()
            if self._group is not None and self._group.member == 0:
                self._run._upkeep.committed()
        else:
            log.warning("%s: not saved: %s", handle.path, error)


def _beside(work: Callable[[], None]) -> None:
    def carefully() -> None:
        try:
            work()
        except CheckpointError as error:
            log.warning("saves of a view that is over: %s", error)

    threading.Thread(target=carefully, name="elastickpt-old-saves", daemon=True).start()
