"""`PipelineTrainer`: trains the stages of one model on the members of a job, and goes on when some of them are lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from elastickpt.elastic.gradients import Clipping, NormScope
from elastickpt.elastic.joining import Job, JobTask
from elastickpt.elastic.links import LinkBroken
from elastickpt.elastic.membership import Compute, LoopEnded
from elastickpt.elastic.mending import Rebuilding
from elastickpt.elastic.messages import Terms
from elastickpt.elastic.passage import OwnCodeRaised, Passing, Schedule
from elastickpt.elastic.policy import Policy, Report
from elastickpt.elastic.recovery import Recovery
from elastickpt.elastic.reports import by_stage
from elastickpt.elastic.saves import NoSaves, Saves
from elastickpt.elastic.stages import Place, Stage, Swap
from elastickpt.elastic.starts import Batch, Batches, require_batch, untouched
from elastickpt.elastic.tasks import Tasks, Training
from elastickpt.errors import RecoveryFailed, Refused
from elastickpt.runs.run import Run
from elastickpt.runs.view_saves import Claims, ViewSaves

log = logging.getLogger(__name__)


class PipelineTrainer:
    """The trainer of one member. All members make it with the same arguments, in `with ek.elastic.join() as job`.

    `build(place)` makes the Stage of a place, once in a process. `loader.batch(step)` gives inputs and targets of the whole
    batch after `step` completed steps, on every place that asks the same. `clip` limits gradient norms, by `clip_scope` of each
    stage, embedding and head, or of all. `run`, a Run without a state, is restored first, and saved to when it is due.
    `on_rebuilt(trainer, recovery)` runs on every member after a recovery, before the next step.

    Raises Refused, here or on the first step, for what cannot be trained together.

    Examples:
        A script for `elastickpt-run --stages 1`; with more stages, `build` makes the part of `place.stage`:

        >>> class Loader:
        ...     def batch(self, step):
        ...         inputs = torch.linspace(0, 1, 8).reshape(8, 1) + step
        ...         return inputs, 2 * inputs
        >>> def build(place):
        ...     model = torch.nn.Linear(1, 1)
        ...     return ek.elastic.Stage(model, torch.optim.SGD(model.parameters(), lr=0.01), loss=torch.nn.functional.mse_loss)
        >>> with ek.elastic.join() as job:
        ...     trainer = ek.elastic.PipelineTrainer(job, build, loader=Loader(), microbatches=4)
        ...     for report in trainer.steps(until=3):
        ...         print(report.step, sorted(report.norms), report.recovered)
        ...     trainer.evaluate([Loader().batch(9)]) > 0
        1 [0] ()
        2 [0] ()
        3 [0] ()
        True
    """

    def __init__(
        self,
        job: Job,
        build: Callable[[Place], Stage],
        *,
        loader: object,
        microbatches: int,
        schedule: Schedule = "1f1b",
        swap: Swap | None = None,
        clip: float | None = None,
        clip_scope: NormScope = "stage",
        run: Run | None = None,
        policy: Policy = Policy(),  # noqa: B008
        seed: int = 0,
        on_rebuilt: Callable[[PipelineTrainer, Recovery], object] | None = None,
    ) -> None:
        _require("schedule", schedule, get_args(Schedule))
        _require("swap", swap, (None, *get_args(Swap)))
        _require("clip_scope", clip_scope, get_args(NormScope))
        if type(microbatches) is not int or microbatches < 1:
            raise Refused(f"microbatches={microbatches!r}: expected an integer from 1 on")
        if clip is not None and not clip > 0:
            raise Refused(f"clip={clip!r}: expected a norm above 0, or None")
        saves: Saves = NoSaves() if run is None else ViewSaves(run)
        clipping = Clipping(clip, clip_scope, "after" if policy.clipped else "before")
        passing = Passing(microbatches, schedule, swap)
        training = Training(build, Batches(loader, microbatches), passing, clipping, policy, seed)
        self._job, self._passing, self._on_rebuilt = job, passing, on_rebuilt
        self._tasks = Tasks(job, training, saves)
        self._arrived: JobTask | None = None  # of which what it says has been taken in
        self._reported = 0  # the step of the newest report of the newest loop
        self._rebuilt_in: int | None = None  # the generation of the recovery whose `on_rebuilt` runs
        job.declare(_terms(policy, passing, saves.claims))
        job.on_interrupt(self._tasks.interrupt)
        job.on_leaving(self._leave)

    @property
    def stage(self) -> Stage:
        """What `build` returned. Raises Refused before this process has a place."""
        return self._tasks.require_held().stage

    @property
    def place(self) -> Place:
        """Raises Refused before this process has one."""
        return self._tasks.require_held().place

    @property
    def step(self) -> int:
        """Completed steps; during a step those before it."""
        return self._tasks.step

    def steps(self, until: int) -> Iterator[Report]:
        """Trains. A spare blocks in here until it gets a place, or the job ends. A script may have several loops, the
        same on all members: who takes a place goes through it up to where the others are, and loops that they are behind end at
        once.

        Args:
            until: So many steps are to be completed in all, those before a restart included.

        Yields:
            One report per committed step, the same on all members.

        Raises:
            RecoveryFailed: The job cannot go on; the error has the reason.
            Refused: Before the first step: what the members built cannot be trained together.
            Superseded: Another job has the run. What the user's own code raised is raised as it is, where a step cannot do
                without it.
        """
        script = self._tasks.script
        part, self._reported = script.begin_loop(), 0
        try:
            while (task := self._at_boundary()) is not None:
                if script.is_passed_over:
                    return
                due = script.position.tells_of_step
                report = self._tasks.reports.next(self._job.epoch, task.generation) if due else None
                if report is not None:
                    self._reported = report.step
                    script.report()
                    with self._job.loop_body():
                        yield report
                elif script.is_past:
                    return
                elif not self._tasks.meet(task):
                    continue
                elif _act(task).ending:
                    self._end(task)
                elif self._tasks.step >= until:
                    return
                else:
                    self._tasks.compute(task)
        finally:
            self._end_loop(part)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Evaluates the model as it is, in the normal order of stages; all members call it with the same batches. Changes
        nothing, and is begun again after a loss.

        Where all roll back to an earlier step, what was to be evaluated is gone: within the loop the result is not a number
        then, and the steps since are reported once more; behind the loop they are taken once more, and evaluated then.
        `on_rebuilt` may evaluate; what a loss interrupts in there is not a number, and the next recovery's call evaluates.

        Args:
            batches: Inputs and targets of whole batches, as a loader gives them.

        Returns:
            The mean over batches of what `Report.loss` is, the same on all members; on one that took a place since, what it was
            for the others. Not a number, where that was after an earlier step, and on a spare, for which the job is over by
            then.

        Raises:
            RecoveryFailed: The job cannot go on, or ended meanwhile; or the members' batches differ.
            Refused: No batch, or one that cannot be cut into microbatches.
        """
        given = [require_batch(one, self._passing.microbatches, what="evaluate") for one in batches]
        if not given:
            raise Refused("evaluate: expected at least one batch")
        with self._job.waiting():
            found = self._evaluate(given) if self._rebuilt_in is None else self._evaluate_rebuilt(given, self._rebuilt_in)
        if found is not None:
            return found
        if self._job.rank is None:
            return float("nan")  # a spare, whose loop ended with the job
        raise RecoveryFailed("the job ended while it evaluated", code=75)

    def _evaluate(self, given: list[Batch]) -> float | None:
        """None where the job ends."""
        tasks, script = self._tasks, self._tasks.script
        tasks.evaluating = not tasks.reports.new
        while (task := self._at_boundary()) is not None:
            tasks.evaluating = False
            if (loss := script.known()) is not None:
                return loss
            if script.is_past:
                log.warning("others are past this evaluation, which is not begun again: it was after an earlier step")
                return float("nan")
            if script.position.in_loop and tasks.step < self._reported:
                log.warning("step %d is not evaluated: all stages were rolled back to step %d", self._reported, tasks.step)
                return float("nan")
            tasks.evaluating = True
            if not tasks.meet(task, evaluates=True):
                continue
            if not script.position.in_loop and tasks.step < script.ended_at:
                tasks.evaluating = False
                self._go_back(task)
                continue
            if (loss := self._evaluate_once(task, given)) is not None:
                script.evaluated(loss)
                tasks.evaluating = False
                return loss
        return None

    def _evaluate_rebuilt(self, given: list[Batch], generation: int) -> float | None:
        """Within `on_rebuilt`, which all members call, wherever in the script they are. None where the job ends."""
        task = self._at_boundary()
        if task is not None and task.generation == generation:
            loss = self._evaluate_once(task, given)
            if loss is not None:
                return loss
            task = self._at_boundary()
        return None if task is None else float("nan")

    def _evaluate_once(self, task: JobTask, given: list[Batch]) -> float | None:
        """None where that was interrupted."""
        held, standing = self._tasks.require_standing()
        try:
            with untouched(held.stage.module):
                return standing.passage.evaluate(given)
        except (LinkBroken, OwnCodeRaised) as error:
            self._tasks.give_up(task, error)
            return None

    def _end_loop(self, part: int) -> None:
        """After the step that was reported last, also where all were rolled back while the loop had that report."""
        self._tasks.script.end_loop(part, max(self._tasks.step, self._reported))

    def _at_boundary(self) -> JobTask | None:
        """Every member stands after the same step, and what that brings is done: the task to compute the next one."""
        task = self._tasks.standing()
        if task is not None and task is not self._arrived:
            self._arrived = task
            self._arrive(_act(task))
        return task

    def _arrive(self, act: Compute) -> None:
        tasks, go = self._tasks, act.go
        if go is not None:
            tasks.script.stand(go.step, go.position, new=tasks.reports.new)
            tasks.reports.arrived(go)
            if go.last is not None:
                tasks.history.norms = by_stage(go.last)
        if go is None or (go.recovered is not None and go.recovered.decision == "forward"):
            tasks.reports.saved(tasks.saves.at(tasks.step, tasks.state()))
        else:
            tasks.reports.saved(None)  # whoever took a place knows of no save, and all are to act alike
        if go is not None and go.recovered is not None:
            self._recovered(go.recovered)

    def _recovered(self, recovery: Recovery) -> None:
        tasks = self._tasks
        _, standing = tasks.require_standing()
        for stage, factors in tasks.pending.factors.items():
            tasks.history.put_factors(standing.trained[stage], factors)
        tasks.pending = Rebuilding()
        tasks.history.mended(recovery)
        tasks.reports.recovered(recovery)
        if self._on_rebuilt is not None:
            before, self._rebuilt_in = self._rebuilt_in, recovery.generation
            try:
                self._on_rebuilt(self, recovery)
            finally:
                self._rebuilt_in = before

    def _end(self, task: JobTask) -> None:
        """The job is to end here: what is not saved yet is, and waited for."""
        tasks = self._tasks
        handle = tasks.reports.saving or tasks.saves.now(tasks.step, tasks.state())
        error = None if handle is None else handle.exception()
        if error is not None:
            log.warning("step %d is not saved at the end: %s", tasks.step, error)
        self._job.done(task, LoopEnded())

    def _go_back(self, task: JobTask) -> None:
        """One step of the way to where this member's loop ended; nothing is reported of it."""
        if _act(task).ending:
            self._end(task)
        else:
            self._tasks.compute(task)

    def _leave(self) -> None:
        """The user's loop is over on this member; what becomes of the others is waited for. After a rollback the way back to
        where the loop ended is gone without it."""
        script = self._tasks.script
        if script.position.in_loop:
            self._end_loop(script.position.part)
        while (task := self._at_boundary()) is not None:
            if not self._tasks.meet(task):
                continue
            if self._tasks.step < script.ended_at or _act(task).ending:
                self._go_back(task)
            else:
                self._job.done(task, LoopEnded())
                self._tasks.part()


def _terms(policy: Policy, passing: Passing, claims: Claims) -> Terms:
    return Terms(
        run=claims.root,
        keep=claims.keep,
        take_over=claims.take_over,
        orphans_s=claims.orphans_s,
        rungs=policy.rungs,
        swap=passing.swap is not None,
        weighting=policy.weighting,
        max_stale_steps=policy.max_stale_steps,
        max_losses_of_step=policy.max_losses_of_step,
        spare_wait_s=policy.spare_wait_s,
    )


def _act(task: JobTask) -> Compute:
    assert isinstance(task.act, Compute)
    return task.act


def _require(name: str, value: object, words: tuple[object, ...]) -> None:
    if value not in words:
        raise Refused(f"{name}={value!r}: expected one of {', '.join(map(repr, words))}")
