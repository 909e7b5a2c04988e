"""Saves beside training, on a thread of their own, one after the other: the pipeline, then what was staged goes to the writer.

    agree     if all stage by a structure that they know, and nothing else has to be asked, member 0 opens the attempt at its
    end
    open      else: a round, in which every rank has staged or does so by a structure that it knew
    contents  a round, only if a member has replicated values that member 0 lacks: those values
    hand over a share and its arena go to this rank's writer, which writes, attests, and takes part in the decision

What follows from each failure says the table in `save_states.py`: from the moment the attempt is open, a rank that cannot go on
withdraws by its writer, so that it ends alike on all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import NoneType

from elastickpt.commit.attempt import Committed
from elastickpt.commit.draft import require_token
from elastickpt.errors import CheckpointError, InternalError, StructureConflict, fault, kinds
from elastickpt.ranks.team import Question, Team, failure_of
from elastickpt.saving.agree import Offer
from elastickpt.saving.messages import TypedValues
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.save_states import Event, IllegalStep, Room, SaveState, TellOthers
from elastickpt.saving.staging import Stager
from elastickpt.saving.structures import KNOWN
from elastickpt.saving.task import SaveTask
from elastickpt.saving.writer_pool import WriterPool
from elastickpt.writer.share import Share, Written
from elastickpt.writer.submissions import StagedPortion, Submission

OnEnded = Callable[[SaveTask, "Committed | BaseException"], None]

log = logging.getLogger(__name__)

CONTENTS = Question("contents", TypedValues, NoneType)


class SavesBeside:
    """What goes on beside training for one saver. `meet` gives the team, in a call of that save; `ended` is told how each one
    ended, on some thread, once."""

    def __init__(
        self, saver: object, meet: Callable[[SaveTask], Team], writers: WriterPool, arena_nbytes: int | None, ended: OnEnded
    ) -> None:
        self._saver, self._meet, self._writers, self._arena_nbytes, self._ended = saver, meet, writers, arena_nbytes, ended

    def carry_out(self, task: SaveTask) -> None:
        """Agrees with the other ranks and hands over what was staged. Blocking; raises nothing."""
        try:
            task.progress.advance(Event.ASKED)
            task.pipeline = pipeline = Pipeline(self._meet(task), task.request, arena_nbytes=self._arena_nbytes)
            self._open(task, pipeline)
            task.progress.advance(Event.OPENED)
            share = self._share(task, pipeline)
            task.proposal = None
            pipeline.let_go()
            if len(share.prepared.portions) > 1:
                task.open.set_result(share)  # who stages the portions has them written, too
            else:
                self._hand_over(task, share)
        except IllegalStep as fault:
            task.fail(fault)
            self._break_off(task, fault)
        except BaseException as error:
            if isinstance(error, StructureConflict) and task.proposal is not None:
                KNOWN.forget(self._saver, task.proposal.table.digest)
            task.fail(error)
            reported = isinstance(error, CheckpointError) and error.report
            self.fail(task, Event.REPORTED if reported else Event.FAILED, error)

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def fail(self, task: SaveTask, event: Event, error: BaseException, *, writing: Submission | None = None) -> None:
        """Carries out what the table says of this failure; `writing` may still read the arena. From any thread; raises
        nothing."""
        try:
            row = task.progress.advance(event)
        except IllegalStep as fault:
            fault.__cause__ = error
            return self._break_off(task, fault)
        match row.tell:
            case TellOthers.ROUND:
                task.failure = error
            case TellOthers.LEAVE if task.pipeline is not None:
                task.pipeline.give_up(error)
                if task.pipeline.team.broken:
                    self._writers.leave_seats()
            case TellOthers.WITHDRAW:
                self._withdraw(task, error)
            case _:  # there is nobody to tell, or somebody else does
                pass
        self._make_room(task, row.room, writing)
        if row.then is SaveState.ENDED:
            self._ended(task, error)
        return None

    def _go_on(self, task: SaveTask, event: Event) -> bool:
        """The save is one step further; False where the table has no such step, which ends it."""
        try:
            row = task.progress.advance(event)
        except IllegalStep as fault:
            self._break_off(task, fault)
            return False
        self._make_room(task, row.room, None)
        return True

    def _break_off(self, task: SaveTask, fault: IllegalStep) -> None:
        """What the table does not have ends the save, on all ranks if that can be."""
        before = task.progress.end()
        if before in (SaveState.ENDED, SaveState.LET_GO):
            return
        if before in (SaveState.OPEN, SaveState.WRITING):
            self._withdraw(task, fault)
        elif task.pipeline is not None and before is SaveState.AGREEING:
            task.pipeline.give_up(fault)
        if task.slot is not None and not task.slot.lent:  # else it is free once it is written
            task.give_up_slot()
        error = InternalError(f"{task.handle.path}: {fault}; please report it")
        error.__cause__ = fault
        self._ended(task, error)

    def _make_room(self, task: SaveTask, room: Room, writing: Submission | None) -> None:
        slot = task.slot
        if room is Room.FREE:
            task.give_up_slot()
        elif room is Room.WHEN_READ and writing is not None and slot is not None:
            task.slot = None
            self._writers.of(writing.attempt.store).cancel(writing)  # behind the withdrawal, which says why
            writing.future.add_done_callback(lambda _: slot.release())

    def _withdraw(self, task: SaveTask, error: BaseException) -> None:
        """This rank takes no part in the open attempt any more: it fails on all ranks."""
        attempt = task.attempt
        if attempt is None:
            raise InternalError("there is no attempt to withdraw from")
        try:
            submission = self._writers.of(attempt.store).withdraw(attempt, _plain(error))
        except BaseException as problem:
            error.add_note(f"and the other ranks could not be told: {problem}")
            self.fail(task, Event.REPORTED, error)
        else:
            self._follow_decision(task, submission)

    # -- agree, open ---------------------------------------------------------------------------------------------------

    def _open(self, task: SaveTask, pipeline: Pipeline) -> None:
        """The attempt is open, and this rank has staged, or is going to in portions. Raises the same on all ranks."""
        pipeline.agree(
            lambda: self._offer(task),
            take_seats=lambda: self._writers.take_seats(pipeline.team, pipeline.offer.located.store),
        )
        attempt = pipeline.open(lambda: self._stage(task, pipeline))
        given, used = ({name for name, _ in metrics} for metrics in (task.destination.metrics, attempt.metrics))
        if ignored := sorted(given - used):
            said = "%s: %s: these metrics of this rank are ignored, as rank 0 gave none of that name"
            log.warning(said, task.handle.path, ", ".join(ignored))
        self._learn(task, pipeline)

    def _offer(self, task: SaveTask) -> Offer:
        if task.failure is not None:
            raise task.failure
        located = task.destination.locate()
        self._writers.require_reachable(located.store)
        if task.proposal is None:
            raise fault("nothing was captured")
        staged = "" if task.stages_by is None else task.stages_by.id
        return Offer(task.proposal, located, staged, self._writers.seated(located.store.url), task.hashed)

    def _stage(self, task: SaveTask, pipeline: Pipeline) -> None:
        """What this rank has to do before the attempt is opened. One that stages by a structure that it knew may still do so
        after it: should that fail, it withdraws."""
        prepared = self._learn(task, pipeline).prepared
        awaited = task.staged.done() or (len(prepared.portions) == 1 and task.stages_by is None)
        if awaited and (error := task.staged.exception()) is not None:
            self.fail(task, Event.NOT_STAGED, error)
            raise task.failure or error

    def _learn(self, task: SaveTask, pipeline: Pipeline) -> Stager:
        """The plan by which this rank stages, for which the thread that trains may be waiting."""
        structure = pipeline.agreed.structure
        if not task.agreed.done():
            _ = structure.for_writer(self._arena_nbytes).digest  # found out here, where it may fail
            structure.agreed_by(self._saver, task.request)
            task.agreed.set_result(structure.stager(self._arena_nbytes))
        return task.agreed.result()

    # -- write, by this rank's writer ----------------------------------------------------------------------------------

    def _share(self, task: SaveTask, pipeline: Pipeline) -> Share:
        """With all that this rank's writer has to know, once this rank sees the draft. What fails from here on is not told in a
        round, and need not be."""
        store, attempt = pipeline.agreed.located.store, pipeline.opened.attempt
        told: list[TypedValues] = []

        def own() -> TypedValues:
            require_token(store, attempt.draft)
            return pipeline.own_values()

        if pipeline.opened.gathers:
            CONTENTS.ask(pipeline.team, own, told.extend)
        else:
            require_token(store, attempt.draft)
            told.append(pipeline.own_values())
        share = pipeline.share(pipeline.replicated(told))
        _ = share.beside, share.encoded_values  # found out here, where it may fail
        return share

    def _hand_over(self, task: SaveTask, share: Share) -> None:
        if task.staged.done() and (error := task.staged.exception()) is not None:
            return self.fail(task, Event.NOT_STAGED, error)
        submission = self.submit(task, StagedPortion(share, 0))
        task.times.submitted = time.perf_counter()

        def staged(future: Future[None]) -> None:
            if (error := future.exception()) is None:
                self.follow(task, submission)
            else:
                self.fail(task, Event.NOT_STAGED, error, writing=submission)

        return task.staged.add_done_callback(staged)

    def submit(self, task: SaveTask, staged: StagedPortion) -> Submission:
        """Has a portion written that is staged, or will be by the thread that trains. Blocking while a device copies."""
        slot = task.slot
        if slot is None:
            raise fault("nothing was staged")
        if task.copies is not None:
            task.copies.wait()
            slot.arena.fill_to(staged.share.prepared.portions[staged.number].nbytes)
        task.progress.advance(Event.HANDED_OVER)
        return self._writers.of(staged.share.attempt.store).submit(staged, slot.arena)

    # -- commit, by all writers ----------------------------------------------------------------------------------------

    def follow(self, task: SaveTask, submission: Submission) -> None:
        """Ties the save's outcome to this portion, which is its last, or the first that failed."""

        def written(future: Future[Written]) -> None:
            task.times.written = time.perf_counter()
            if (error := future.exception()) is None:
                self._go_on(task, Event.WRITTEN)
            else:
                self.fail(task, Event.NOT_WRITTEN, error)

        submission.future.add_done_callback(written)
        self._follow_decision(task, submission)

    def _follow_decision(self, task: SaveTask, submission: Submission) -> None:
        def committed(outcome: Committed) -> None:
            if self._go_on(task, Event.COMMITTED):
                self._ended(task, outcome)

        def decided(future: Future[Committed]) -> None:
            if (error := future.exception()) is not None:
                self.fail(task, Event.REPORTED, error)
            else:  # behind what is written, which may be known a moment later here
                submission.future.add_done_callback(lambda _: committed(future.result()))

        submission.decided.add_done_callback(decided)


def _plain(error: BaseException) -> CheckpointError:
    """The error as other ranks can be told of it."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, IllegalStep):
        return InternalError(f"{error}; please report it")
    failure = failure_of(error, 0)
    return kinds()[failure.kind](failure.message)
