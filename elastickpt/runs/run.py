"""`Run`: a training job's checkpoints over its whole history, from one start to the next.

run = ek.Run("runs/llama", state, keep=ek.Keep(last=3))
start = run.restore()
for step in range(start.step, n):
    train_step(step)
    if run.due(step + 1):
        run.save(step + 1)
    if run.ending:
        break
run.close()
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex

from elastickpt.commit.attempt import RunDestination
from elastickpt.errors import CheckpointError, Refused, Superseded
from elastickpt.ledger.epochs import Holding
from elastickpt.ledger.names import AttemptId, step_number
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import metrics_of
from elastickpt.ledger.retention import Keep
from elastickpt.ledger.stored import read_claim
from elastickpt.loading.session import Strict
from elastickpt.ranks.addresses import own_address
from elastickpt.ranks.process_group import end_team, job_group
from elastickpt.ranks.team import Call
from elastickpt.runs.answering import Answering
from elastickpt.runs.calendar import Calendar, LocalBoard, NoticeBoard, SaveTimes
from elastickpt.runs.due import Measured
from elastickpt.runs.events import EndedSave, Phase, RestoreEvent
from elastickpt.runs.options import RunOptions
from elastickpt.runs.preemption import Notices, heard_here
from elastickpt.runs.restoring import Restored, Restoring, WantedCommit
from elastickpt.runs.run_team import call_of, met, new_purpose
from elastickpt.runs.trace import trace_in
from elastickpt.runs.trainer_address import claimer
from elastickpt.runs.upkeep import Upkeep
from elastickpt.saving.request import CheckpointInfo
from elastickpt.saving.saver import Saver
from elastickpt.saving.task import SaveHandle
from elastickpt.storage.opening import locate_for_saving, open_store, path_in
from elastickpt.storage.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class Run:
    """A training job's checkpoints in one folder, from one start to the next.

    All ranks make it, and call its methods in the same order. Nothing is written before `restore`.

    Args:
        root: The folder or URL of the run; it is made if need be.
        state: What is saved and restored, as `save` takes it.
        keep: What stays when newer checkpoints are there; by default everything.
        process_group: Whose ranks save; by default all.
        mesh: Ranks over which plain tensors are declared to be replicas.
        options: All else.

    Raises:
        Refused: `root` cannot be written, or ranks disagree about it.

    Examples:
        >>> options = ek.RunOptions(due=ek.Every(steps=2))
        >>> run = ek.Run("runs/new", state, keep=ek.Keep(last=2), options=options)
        >>> run.restore().step
        0
        >>> for step in range(5):
        ...     loss = train_step(step)
        ...     if run.due(step + 1):
        ...         handle = run.save(step + 1, metrics={"loss": loss})
        >>> handle.result().step
        4
        >>> run.add_metrics(4, {"quality": 0.7})
        >>> run.notify("maintenance", left_s=120)
        >>> for step in range(5, 1000):
        ...     if run.due(step + 1):
        ...         handle = run.save(step + 1)
        ...     if run.ending:
        ...         break
        >>> run.ending
        True
        >>> run.close()
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        state: Mapping[str, object] | None = None,
        *,
        keep: Keep | None = None,
        process_group: ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        options: RunOptions | None = None,
    ) -> None:
        self._state, self._mesh, self._process_group = state, mesh, process_group
        self._options = options or RunOptions()
        self._group = job_group(process_group)
        self._member = self._group.member
        self._store = _root(root)
        self._purpose = new_purpose(self._group, self._store)
        self._team = met(self._group, self._purpose, self._call("making of the run"))
        self._saver = Saver(self._group, self._options.saving, purpose=f"{self._purpose}-saves")
        self._keep = keep or Keep()
        self._upkeep = Upkeep(self._store, self._keep)
        heard = {} if state is None else heard_here(self._options.signals, where=self.root)  # a member of a job just ends
        self._notices = Notices(heard)
        self._answering = Answering(tcp_host=_reached_at(self._team.hosts)) if self._member == 0 else None
        self._calendar = self._calendar_of(epoch=0)
        self._trace = trace_in(self._options.trace, rank=self._group.rank)
        self._tokens: tuple[str, ...] = ()  # of all claims of this job
        self._holding: Holding | None = None
        self._epoch = 0
        self._began = time.time()
        self._rollbacks = 0
        self._under_way: set[SaveHandle] = set()
        self._changing = threading.Lock()
        self._superseded: Superseded | None = None
        self._last: CheckpointInfo | None = None
        self._ending = False
        self._told_whose_metrics = False
        self._closed = False
        self._owner = os.getpid()
        _OPEN.add(self)

    @property
    def root(self) -> str:
        """Where the run is, as people write it."""
        return path_in(self._store, "").rstrip("/")

    @property
    def epoch(self) -> int:
        """The epoch of this job, 0 before `restore`."""
        return self._epoch

    @property
    def ending(self) -> bool:
        """Whether the job is to end now: a notice came, and `due` was asked about the last step. The same on all ranks."""
        return self._ending

    @property
    def skipped(self) -> int:
        """Saves that were left out, because some rank had no free memory for them in time."""
        return self._saver.skipped

    def restore(self, *, step: SupportsIndex | None = None, epoch: int | None = None, strict: Strict = "all") -> Restored:
        """Takes the run over, and fills `state` with its newest checkpoint that verifies, the same one on all ranks. Blocking.

        Called again it is a rollback: the live branch goes on from what is restored now. What writers of an earlier job
        have staged is waited for, at most `orphans_s`.

        Args:
            step: Takes that one instead of the newest.
            epoch: With `step`, takes one that an epoch left behind.
            strict: As for `load`.

        Returns:
            Where the job goes on: step 0 of a run that is empty.

        Raises:
            RunBusy: Another job lives, and is not to be taken over.
            StateMismatch: `state` and checkpoint differ.
            NotACheckpoint: No checkpoint is of that step.
            Damaged: There are checkpoints, and none of them loads.
            Superseded: Another job took the run meanwhile.
            StorageFailed: The store does not answer. After any of these, which are the same on all ranks, nothing can be
                saved before `restore` was called again.
        """
        state = self._require_open()
        begun = time.monotonic()
        own = self._epoch > 0
        self._settle_own()
        call = self._call("rollback of the run" if own else "restore of the run")
        restoring = Restoring(self._team, self._store, self._process_group, call=call)
        token = secrets.token_hex(16)
        self._upkeep.claiming(token)
        address = ""
        if self._answering is not None:
            self._answering.answer_for(token)
            address = self._answering.address
        tokens, self._tokens = self._tokens, (*self._tokens, token)
        epoch_now, candidates, broken, notes = restoring.claim(
            claimer(address, token),
            orphans_s=0.0 if own else self._options.orphans_s,
            tokens=tokens,
            take_over=self._options.take_over,
            choice=WantedCommit(None if step is None else step_number(step), epoch),
        )
        loaded = restoring.load_first(state, self._mesh, candidates, broken, strict=strict)
        taken = loaded.taken
        restoring.start(loaded, keep=self._keep)
        with self._changing:
            self._holding, self._epoch, self._superseded = restoring.holding, epoch_now, None
        self._rollbacks += own
        self._calendar = self._calendar_of(epoch=epoch_now)
        at, path = (0, None) if taken is None else (taken.id.step, taken.path)
        found = Restored(at, path, epoch_now, loaded.skipped, loaded.report, notes)
        self._tell_restored(found, begun, verified=loaded.verified)
        return found

    def due(self, step: SupportsIndex) -> bool:
        """Whether a save is due now; the same on all ranks, which call it once after each step. Not blocking but for one
        question to the job's store.

        Args:
            step: The number of completed steps.

        Returns:
            Whether to save. Afterwards `ending` says whether the job should end.

        Raises:
            Refused: The run was closed, or `step` is no number.
        """
        self._require_open()
        step = step_number(step)
        notice = self._notices.notice
        with self._changing:
            last, under_way = self._last, len(self._under_way)
        stall_s = 0.0 if last is None else last.stall_s
        took_s = 0.0 if last is None else last.stall_s + last.plan_s + last.write_s + last.commit_s
        measured = Measured(stall_s, max(0.0, time.time() - self._began), max(0, self._epoch - 1 - self._rollbacks))
        decision = self._calendar.decided(step, notice=notice, measured=measured, saves=SaveTimes(took_s, under_way))
        if decision.ends and not self._ending:
            self._ending = True
            why = self._calendar.ending
            log.warning("%s: the job ends after step %d%s", self.root, step, f": {why.why}" if why else "")
        return decision.saves

    def notify(self, why: str, *, left_s: float) -> None:
        """Says that this process is going to be ended, as who asks for spot notices learns: `due` and `ending` go by it as by
        a signal. From any thread, on any rank; not blocking.

        Args:
            why: A word for it; of one word the first call holds.
            left_s: In how many seconds.

        Raises nothing.
        """
        self._notices.give(why, left_s=left_s)

    def save(self, step: SupportsIndex, *, metrics: Mapping[str, SupportsFloat] | None = None) -> SaveHandle:
        """Saves `state` as the checkpoint of a step; returns when it is staged, and blocks for that as `async_save` does. What
        is not kept any more is removed after the commit.

        Args:
            step: The number of completed steps.
            metrics: Rank 0's count: numbers, numpy's, or tensors without a dimension, for which it waits.

        Returns:
            The save under way; what goes wrong in it the handle says, on all ranks alike.

        Raises:
            Superseded: A save has found that another job has the run.
            Refused: Before `restore`; and, on the rank where it is so, a step or metrics that are no numbers: the other
                ranks hear of that by the handle.
        """
        state = self._require_open()
        if self._epoch == 0:
            raise Refused(f"{self.root}: expected restore() before the first save, which says where the run goes on")
        if self._superseded is not None:
            raise self._superseded
        number, known, refused = None, metrics_of(()), None
        try:
            number = step_number(step)
            known = metrics_of((metrics or {}).items())
        except Refused as error:
            refused = error
        begun = time.monotonic()
        self._calendar.saved()
        destination = RunDestination(self._store, self._holding, number, self._epoch, known, refused)
        request = self._options.request(destination.path, number)
        handle = self._saver.save(state, destination, request, mesh=self._mesh)
        if refused is not None or number is None:
            raise refused or Refused(f"{destination.path}: expected the number of completed steps")
        with self._changing:
            self._under_way.add(handle)
        staged, about = time.monotonic(), (number, self._epoch)
        handle.add_done_callback(lambda ended: self._ended(ended, about, begun, staged))
        return handle

    def add_metrics(self, step: SupportsIndex, metrics: Mapping[str, SupportsFloat]) -> None:
        """Gives the checkpoint of a step metrics that are known later; `keep` may go by them. Not blocking: what goes wrong
        later is logged.

        Args:
            step: The step of the checkpoint.
            metrics: Rank 0's count, another rank's are named in its log once; of one name the last one holds.

        Raises:
            Refused: What is no number.
        """
        self._require_open()
        number, known = step_number(step), metrics_of(metrics.items())
        if self._member == 0:
            self._upkeep.add_metrics(number, dict(known))
        elif not self._told_whose_metrics:
            self._told_whose_metrics = True
            rank, first = self._group.rank, self._group.ranks[0]
            log.warning("%s: metrics added on rank %d are ignored: those of rank %d count", self.root, rank, first)

    def close(self, *, limit_s: float | None = None) -> None:
        """Ends the job's part in the run. Blocking: saves under way are waited for, then left to their writers.

        Args:
            limit_s: For how many seconds; by default the option of saving, or what a notice leaves.

        Raises nothing of saves: what becomes of each says its handle.
        """
        if self._closed:
            return
        self._closed = True
        notice = self._notices.notice
        if limit_s is None:
            limit_s = self._options.saving.exit_limit_s if notice is None else notice.left_s(time.monotonic())
        until = time.monotonic() + limit_s
        self._saver.close(limit_s=limit_s)
        self._upkeep.close(limit_s=max(1.0, until - time.monotonic()))
        end_team(self._group, self._purpose, "its run was closed")
        if self._answering is not None:
            self._answering.close()
        self._notices.close()
        if self._trace is not None:
            self._trace.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- beside training -----------------------------------------------------------------------------------------------

    def _call(self, what: str) -> Call:
        return call_of(self._group, f"{what} {self.root}", self._options.wait_limit_s)

    def _require_open(self) -> Mapping[str, object]:
        if self._closed or os.getpid() != self._owner:
            why = "this run was closed" if self._closed else "a run belongs to the process that made it"
            raise Refused(f"{self.root}: {why}")
        if self._state is None:
            raise Refused(f"{self.root}: expected a state to save and restore, found none")
        return self._state

    def _settle_own(self) -> None:
        """A rollback gives up what it does not wait for: saves under way count, if they commit before the claim."""
        with self._changing:
            open_now = list(self._under_way)
        for handle in open_now:
            try:
                handle.exception(self._options.saving.exit_limit_s)
            except CheckpointError:
                log.warning("%s: still under way at a rollback, given up", handle.path)

    def _calendar_of(self, *, epoch: int) -> Calendar:
        """A new one for each epoch: after a rollback what was published for later steps is out of date."""
        board: NoticeBoard = LocalBoard()
        if self._group.handle is not None:
            board = self._group.own_store(f"{self._purpose}/steps-{epoch}")
        return Calendar(board, self._options.due, member=self._member, members=len(self._group.ranks))

    def _ended(self, handle: SaveHandle, about: tuple[int, int], begun: float, staged: float) -> None:
        error = handle.exception()
        info = handle.result() if error is None else None
        ended = EndedSave(*about, info, error, begun, staged, time.monotonic())
        with self._changing:
            self._under_way.discard(handle)
            self._last = info or self._last
            if isinstance(error, Superseded) and ended.epoch == self._epoch:  # a rollback supersedes saves that it gave up
                self._superseded = error
        if info is not None and self._member == 0:
            self._upkeep.committed()
        self._upkeep.call(lambda: self.tell_saved(ended, rank=self._group.rank, member=self._member))

    def tell_saved(self, ended: EndedSave, *, rank: int, member: int) -> None:
        """Who watches hears of a save of this rank. In the thread of the upkeep."""
        if self._trace is not None:
            for phase in ended.phases(rank):
                self._trace.add(phase)
        if member == 0:
            event = ended.event()
            for watcher in self._options.watchers:
                watcher.saved(event)

    def _tell_restored(self, found: Restored, begun: float, *, verified: Mapping[AttemptId, bool]) -> None:
        ended = time.monotonic()
        log.info("%s: epoch %d goes on from step %d (%s)", self.root, found.epoch, found.step, found.path or "nothing")
        if self._trace is not None:
            self._trace.add(Phase("restore", self._group.rank, "trainer", begun, ended))
        if self._holding is None:
            return
        holding = self._holding
        with suppress(CheckpointError):  # it says only how long the run has been going, and to this rank alone
            self._began = complete(read_claim(self._store, 1)).by.time
        self._upkeep.started(holding, verified=verified)
        nbytes = 0 if found.report is None else found.report.nbytes
        event = RestoreEvent(found.step, found.epoch, len(found.skipped), nbytes, ended - begun, time.time())
        for watcher in self._options.watchers:
            self._upkeep.call(lambda watcher=watcher: watcher.restored(event))  # type: ignore[misc]


def _root(root: str | os.PathLike[str]) -> Store:
    """The store of the run, made if need be."""
    parent, name = locate_for_saving(root)
    parent.make_directories(name)
    if parent.capabilities.directory_sync:
        parent.sync_directory("")
    return open_store(path_in(parent, name))


def _reached_at(hosts: tuple[str, ...]) -> str | None:
    """Where other hosts may ask whether this job lives; None for a job of one host."""
    return own_address() if len(set(hosts)) > 1 else None


_OPEN: weakref.WeakSet[Run] = weakref.WeakSet()


def _close_all() -> None:
    """The end of a process is the end of its runs: what was staged last is handed over as it is by `close`."""
    for run in list(_OPEN):
        if run._owner == os.getpid():
            run.close()


atexit.register(_close_all)
