"""What a member's thread that trains is given to do (`duties`), and how: groups, rebuilding, gradients, the optimizer's step.

Only the optimizer's step, and rebuilding, change the state of a stage; of whatever else is interrupted nothing is left.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastickpt.elastic.checkpoints import NoGood, read_known
from elastickpt.elastic.duties import Exchange, TaskOver
from elastickpt.elastic.gradients import Clipping, clip, divide, keep_buffers_equal, sum_over_replicas
from elastickpt.elastic.history import History, scaled
from elastickpt.elastic.joining import Job, JobTask
from elastickpt.elastic.limits import OTHERS_S
from elastickpt.elastic.links import LinkBroken, Links
from elastickpt.elastic.membership import (
    Compute,
    Computed,
    Erred,
    Failed,
    Form,
    Made,
    Mend,
    Mended,
    NotMended,
    Stop,
    TakeStep,
    Took,
)
from elastickpt.elastic.mending import Mending, Rebuilding
from elastickpt.elastic.passage import OwnCodeRaised, Passage, Passing, flushes_of, raised_by_user, sees_batches
from elastickpt.elastic.policy import Policy
from elastickpt.elastic.reports import Reports, by_stage
from elastickpt.elastic.saves import Saves
from elastickpt.elastic.script import Position, Script
from elastickpt.elastic.stages import Place, Stage
from elastickpt.elastic.starts import BatchChanged, Batches, KeptBuffers, digest_of, seed_streams
from elastickpt.elastic.view_links import ViewLinks
from elastickpt.elastic.view_passage import ViewPassage, require_equal_replicas, stand_together
from elastickpt.errors import DeadlineExceeded, Refused, StateMismatch
from elastickpt.ranks.messages import decode, encode

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Training:
    """By what a member trains."""

    build: Callable[[Place], Stage]
    batches: Batches
    passing: Passing
    clipping: Clipping
    policy: Policy
    seed: int


@dataclass(slots=True)
class _Held:
    """What this member holds once it has a place. `kept`: the buffers as the step in flight found them; `replicated_nbytes`:
    what it sent in the newest step to keep its replicas equal."""

    place: Place
    stage: Stage
    mending: Mending
    kept: KeptBuffers | None = None
    replicated_nbytes: int = 0
    standing: ViewPassage | None = None


class Tasks:
    """The tasks of one member, and what it holds between them. `step`: completed steps; `pending`: what the newest rebuilding
    is to change in the history once every member stands."""

    def __init__(self, job: Job, training: Training, saves: Saves) -> None:
        self._job, self._training, self.saves = job, training, saves
        self.history, self.reports, self.script = History(training.seed), Reports(), Script()
        self.step, self.evaluating, self.over = 0, False, False
        self.pending = Rebuilding()
        self._held: _Held | None = None
        self._links: Links | None = None
        self._task: JobTask | None = None
        self._raised: BaseException | None = None
        self._watch = _Watched(job)

    def standing(self) -> JobTask | None:
        """Carries out tasks until every member stands and a step can be computed: that Compute, None once the job is over.

        Raises what ends the job on this member.
        """
        while not self.over:
            if self._task is None or self._task.over:
                self._task = self._job.next_task()
            task = self._task
            if isinstance(task.act, Compute):
                if task.act.go is not None:
                    self.step = task.act.go.step
                return task
            self._task = None
            try:
                self._carry_out(task)
            except TaskOver:
                continue
            except (LinkBroken, DeadlineExceeded) as error:
                self._job.done(task, Failed(str(error)))
        return None

    def compute(self, task: JobTask) -> None:
        held, standing = self.require_standing()
        stage, place, step, links = held.stage, held.place, self.step, self._require_links()
        try:
            batch = None
            if sees_batches(self._training.passing, place.stage, stages=place.stages):
                with raised_by_user(), self._watch.own_code():
                    batch = self._training.batches.of(step)
            held.kept = kept = KeptBuffers(stage.module)
            self._zero(held)
            seed_streams(self._training.seed, step, place.stage)
            losses = standing.passage.train(step, batch)
            if self._training.passing.swap is not None:
                with raised_by_user():
                    self._unite_replicas(held, links, kept)
            divide(stage.module.parameters(), self._training.passing.microbatches)
            norm = clip(stage, place, self._training.clipping, links)
        except (LinkBroken, OwnCodeRaised) as error:
            self.give_up(task, error)
            return
        self._task = None
        digest = "" if batch is None else digest_of(batch)
        self._job.done(task, Computed(digest, norm, tuple(float(one.double()) for one in losses)))

    def _unite_replicas(self, held: _Held, links: Links, kept: KeptBuffers) -> None:
        """Both replicas of embedding and head have one gradient, and one content of each buffer."""
        passing, place = self._training.passing, held.place
        first, *_ = flushes_of(passing, step=self.step, stages=place.stages)
        nbytes = sum_over_replicas(held.stage, place, links) + keep_buffers_equal(held.stage, place, first.order, links, kept)
        if nbytes != held.replicated_nbytes:
            held.replicated_nbytes = nbytes
            log.info("stage %d: %d bytes a step keep its replicas of embedding and head equal", place.stage, nbytes)

    def give_up(self, task: JobTask, error: LinkBroken | OwnCodeRaised) -> None:
        self._undo()
        self._task = None
        if isinstance(error, LinkBroken):
            self._job.done(task, Failed(str(error)))
        else:
            self._raised = error.error
            final = str(error.error) if isinstance(error.error, BatchChanged) else ""
            self._job.done(task, Erred("".join(traceback.format_exception(error.error)), final))

    def meet(self, task: JobTask, *, evaluates: bool = False) -> bool:
        """Before what all members do together: whether they are known to be in the same part of the script. If not, they tell
        each other, and this one has to look again; blocking. `evaluates`: that is an evaluation. [REC-61]"""
        if self.script.position.met:
            return True
        held, exchange = self.require_held(), self._job.exchange(task)
        exchange.set(f"position/{held.place.stage}", encode(replace(self.script.position, evaluates=evaluates)))
        keys = [f"position/{one}" for one in range(held.place.stages)]
        try:
            told = [decode(one, Position) for one in exchange.get_all(keys, limit_s=OTHERS_S)]
        except TaskOver:
            return False
        except DeadlineExceeded as error:
            self.give_up(task, LinkBroken(str(error)))
            return False
        if self.script.meet(told):
            self.reports.repeat()
        return False

    def part(self) -> None:
        """This member takes no part in the steps to come: whoever waits for it hears so at once."""
        if self._links is not None:
            self._links.abort()

    def state(self) -> dict[str, object]:
        stage = self.require_held().stage
        state: dict[str, object] = {"model": stage.module, "optimizer": stage.optimizer, "elastic": self.history}
        if stage.scheduler is not None:
            state["scheduler"] = stage.scheduler
        return state

    def require_held(self) -> _Held:
        if self._held is None:
            raise Refused("this member has no place yet: it gets one in steps()")
        return self._held

    def _carry_out(self, task: JobTask) -> None:
        act = task.act
        if isinstance(act, Form):
            self._form(task, act)
        elif isinstance(act, Mend):
            self._mend(task, act)
        elif isinstance(act, TakeStep):
            self._take(task, act)
        elif isinstance(act, Stop):
            self._stop(act)

    def _form(self, task: JobTask, act: Form) -> None:
        self._unlink()
        self._undo()
        held = self._held or self._built(len(act.view.places))
        stage, stages = held.place.stage, held.place.stages
        exchange = self._job.exchange(task)
        self._links = links = ViewLinks(exchange, stage=stage, stages=stages, limit_s=OTHERS_S, over=lambda: task.over)
        if task.over:
            raise TaskOver
        training = self._training

        def first_batch() -> None:
            if not training.batches.seen and sees_batches(training.passing, stage, stages=stages):
                training.batches.of(act.view.step)

        passage = Passage(held.stage, held.place, training.passing, links, self._watch)
        equal = training.policy.needs_equal_stages(training.passing.swap)
        held.standing = stand_together(
            held.stage, held.place, training.passing, passage, exchange, equal=equal, ask=first_batch
        )
        self.saves.stand(f"{act.view.epoch}-{act.view.generation}")
        finite = stage not in act.view.lost and _are_finite(held.mending.given())
        at = self.script.furthest
        if self.script.position.tells_of_step and self.reports.is_due_of(self.step):
            at = replace(at, met=False)
        self._job.done(task, Made(finite, self.evaluating, None if self.reports.new else at))

    def _built(self, stages: int) -> _Held:
        number = self._job.rank
        assert number is not None, "who makes groups has a place"
        place = Place(number, stages)
        stage = self._training.build(place)
        if not isinstance(stage, Stage):
            raise Refused(f"build returned a {type(stage).__name__}, expected an elastic.Stage")
        self._held = _Held(place, stage, Mending(stage, self._training.policy, swap=self._training.passing.swap))
        return self._held

    def _mend(self, task: JobTask, act: Mend) -> None:
        held, standing = self.require_standing()
        exchange, done = self._job.exchange(task), Rebuilding()
        back = next((one for one in act.sources if one.rung == "rollback"), None)
        self.pending = done
        try:
            if back is not None:
                done.read = held.mending.load_all(back.path, back.step or 0, self.history)
                self.history.goes_on(self._training.seed)
                self.step = back.step or 0
                self.reports.rolled_back(self.step)
            elif act.sources:
                self._hear_history(act, exchange)
                links = self._require_links()
                done = held.mending.take_part(act.sources, act.view.step, self.history, standing.trained, links, exchange)
                self.pending = done
            elif self.reports.new and self._training.passing.swap is not None:
                require_equal_replicas(held.stage, held.place, exchange)
        except (NoGood, StateMismatch) as error:
            if isinstance(error, StateMismatch) and not (act.view.lost or act.view.rollback):
                raise  # the first start from this checkpoint: an older one is no other model's
            self._job.done(task, NotMended(str(error)))
            return
        self.saves.goes_on(act.epoch)
        self._job.done(task, Mended(done.moved, done.read))

    def _hear_history(self, act: Mend, exchange: Exchange) -> None:
        """Who takes a place knows nothing of the job; the first stage that stands tells it. Where none stands, the checkpoint
        does that all stages are read from: they are made of nothing else then."""
        held, lost = self.require_held(), {one.stage for one in act.sources}
        standing = [stage for stage in range(held.place.stages) if stage not in lost]
        if not standing:
            read_known({"elastic": self.history}, act.sources[0].path)
            self.history.goes_on(self._training.seed)
        elif held.place.stage == standing[0]:
            exchange.set("history", encode(self.history))
        elif held.place.stage in lost:
            told = exchange.get("history", limit_s=OTHERS_S)
            self.history.load_state_dict(decode(told, History).state_dict())

    def _take(self, task: JobTask, act: TakeStep) -> None:
        """The optimizer steps; what the user's code raises in here is the loss of this place."""
        held, decided = self.require_held(), time.monotonic()
        stage = held.stage
        with scaled(stage, self.history.lr_factors):
            stage.optimizer.step()
        if stage.scheduler is not None:
            stage.scheduler.step()
        self._zero(held)
        held.kept, self._raised, self.step = None, None, act.step
        self.script.stepped(act.step)
        self.reports.took(decided - self._watch.began_at)
        if act.commit is not None:
            self.history.norms = by_stage(act.commit)
            self.reports.committed(act.commit)
        self._job.done(task, Took())

    def _stop(self, act: Stop) -> None:
        self.over = True
        self.saves.close()  # while there is a group, in which what is under way comes to its end
        self._unlink()
        if self._raised is not None and act.end.culprit == self._job.uid:
            raise self._raised
        self._job.require_good_end()

    def _zero(self, held: _Held) -> None:
        for parameter in held.stage.module.parameters():
            parameter.grad = None

    def _undo(self) -> None:
        """What a step that is not taken has left: gradients, and what forward did to buffers."""
        if self._held is not None:
            self._zero(self._held)
            if self._held.kept is not None:
                self._held.kept.put_back()
                self._held.kept = None

    def interrupt(self) -> None:
        """In the thread that hears so."""
        links = self._links
        if links is not None:
            links.abort()
        self.saves.interrupt()
        if self._job.forms:
            self.saves.leave()

    def _unlink(self) -> None:
        """The groups of the view are gone, now: whatever else holds them would do so until a collection of garbage."""
        links, self._links = self._links, None
        if self._held is not None and self._held.standing is not None:
            self._held.standing.passage.close()
            self._held.standing = None
        if links is not None:
            links.close()

    def require_standing(self) -> tuple[_Held, ViewPassage]:
        held = self.require_held()
        assert held.standing is not None, "a view was formed before"
        return held, held.standing

    def _require_links(self) -> Links:
        assert self._links is not None, "a view was formed before"
        return self._links


class _Watched:
    """A job that is told how a step goes on; it remembers when the first microbatch began."""

    def __init__(self, job: Job) -> None:
        self._job, self.began_at = job, time.monotonic()

    def began(self) -> None:
        self.began_at = time.monotonic()
        self._job.began()

    def progress(self) -> None:
        self._job.progress()

    def own_code(self) -> AbstractContextManager[None]:
        return self._job.own_code()


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point() or one.is_complex())
