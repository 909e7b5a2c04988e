"""What the coordinator of a job decides, as a table: (phase, event) → the job after it, and what is said and done.

A step is decided once, by one register per (epoch, generation, step): `commit` when every member of the view is ready, `abort`
when the view ends before. Members step their optimizers behind a commit only, so what the register holds says where everybody
stands, or can still be brought: a member that is ready holds its gradients until the decision. Before a new view is told, the
register of the step in flight is closed.

1. Only in `working` can a step be committed: every member of the newest view has said Ready in that view.          [REC-10]
2. A loss in any phase makes a view; a newer view supersedes the one before at once, whatever stood still in it.      [REC-11]
3. `step` of a view is the newest committed one, until a rollback sets it back; it never lies between.                [REC-12]
4. Stages lost since the last Go are lost together: none of them is a source, even if it was rebuilt already.         [REC-13]
5. After a rollback was told, every view is one until a Go: who has begun to load has no state to stand at.           [REC-14]
6. A user's exception before the decision aborts the step, which is replayed; the second one of a member at the same
   step ends the job. A step that fails `max_losses_of_step` times ends it too.                                       [REC-15]

Pure: values in, values out; no clock, no socket, no tensor. `tests/elastic` runs it, with the real member, over every order of
messages and deaths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from elastickpt.elastic.job import (
    NOBODY,
    Choose,
    Chosen,
    CoordinatorOrder,
    Ending,
    Gone,
    JobEvent,
    JobPhase,
    JobState,
    Loss,
    Over,
    Recovered,
    Register,
    Tell,
    Wait,
    WaitOver,
    batches_apart,
    loops_apart,
    spare_for,
)
from elastickpt.elastic.messages import (
    Broke,
    Commit,
    End,
    Formed,
    Go,
    Join,
    Left,
    Raised,
    Ready,
    Rebuild,
    Rebuilt,
    Stepped,
    ToMember,
    Unbuilt,
    View,
)


@dataclass(slots=True)
class _Turn:
    """One event's work: the job as it becomes, and the orders so far."""

    job: JobState
    orders: list[CoordinatorOrder] = field(default_factory=list)

    def set(self, **changes: object) -> None:
        self.job = replace(self.job, **changes)  # type: ignore[arg-type]

    def tell(self, message: ToMember, *uids: str) -> None:
        self.orders += [Tell(uid, message) for uid in uids]


def after(job: JobState, event: JobEvent) -> tuple[JobState, tuple[CoordinatorOrder, ...]]:
    """The job after one event, and what is to be said and done, in order."""
    turn = _Turn(job)
    if isinstance(event, tuple):
        uid, message = event
        handler = TABLE[job.phase, type(message)]
        if uid in job.members or isinstance(message, Join):
            handler(turn, uid, message)
    else:
        TABLE[job.phase, type(event)](turn, NOBODY, event)
    return turn.job, tuple(turn.orders)


# -- who is there


def _joined(turn: _Turn, uid: str, message: Join) -> None:
    turn.set(spares=(*turn.job.spares, uid), where=(*turn.job.where, (uid, message.host, message.zone)))
    if turn.job.phase is JobPhase.GATHERING:
        _view(turn)


def _gone(turn: _Turn, _: str, event: Gone) -> None:
    turn.set(where=tuple(one for one in turn.job.where if one[0] != event.uid))
    job = turn.job
    if event.uid in job.spares:
        turn.set(spares=tuple(uid for uid in job.spares if uid != event.uid))
    if event.uid not in job.members:
        return
    stage = job.places.index(event.uid)
    places = tuple(NOBODY if uid == event.uid else uid for uid in job.places)
    _close_register(turn)
    loss = Loss(stage, event.uid, event.why, event.signal, event.traceback)
    if event.why == "raised" and not job.began:
        _end(turn, End(1, "step-failed", f"the code of stage {stage} raised before the first step", culprit=event.uid))
        return
    lost = turn.job.lost | {stage} if job.began else turn.job.lost
    counts = job.phase is JobPhase.WORKING or event.uid not in job.stood  # of a burst one counts, and who came after it
    turn.set(places=places, lost=lost, failed=(*turn.job.failed, loss), losses_of_step=job.losses_of_step + counts)
    _lose(turn)


def _lose(turn: _Turn) -> None:
    """A view failed: the next one begins, or the job ends for good. [REC-15]"""
    if turn.job.began and turn.job.losses_of_step >= turn.job.max_losses_of_step:
        _end(turn, End(1, "step-failed", turn.job.lost_too_often))
    else:
        _view(turn)


def _close_register(turn: _Turn) -> None:
    """Before any new view: what is not committed by now never will be. [REC-10]"""
    job = turn.job
    if job.phase is not JobPhase.WORKING:
        return
    turn.set(decision="replay" if job.stepped == frozenset(job.places) else "forward")
    turn.orders.append(Register(job.generation, job.step + 1, "abort"))


def _view(turn: _Turn) -> None:
    """The next view: empty places go to spares. [REC-11, REC-12, REC-17]"""
    places, spares = list(turn.job.places), list(turn.job.spares)
    for stage, uid in enumerate(places):
        if uid == NOBODY and spares:
            places[stage] = spare_for(stage, places, spares, turn.job.where)
            spares.remove(places[stage])
    turn.set(
        places=tuple(places),
        spares=tuple(spares),
        generation=turn.job.generation + 1,
        phase=JobPhase.FORMING if all(places) else JobPhase.GATHERING,
        formed=frozenset(),
        finite=frozenset(),
        evaluating=False,
        position=None,
        rebuilt=frozenset(),
        ready=(),
        sources=(),
        left=(),
    )
    job = turn.job
    lost = tuple(range(job.stages)) if job.rollback else tuple(sorted(job.lost))
    turn.tell(View(job.epoch, job.generation, job.step, job.places, lost, job.rollback), *job.members)
    if job.phase is JobPhase.GATHERING:
        turn.orders.append(Wait(job.generation, "spare"))


# -- a view becomes whole


def _formed(turn: _Turn, uid: str, message: Formed) -> None:
    job = turn.job
    if message.generation != job.generation:
        return
    finite = job.finite | {job.places.index(uid)} if message.finite else job.finite
    position = job.position or message.position
    if job.position is not None and message.position is not None:
        position = message.position.further(job.position)
    evaluating = job.evaluating or message.evaluating
    turn.set(formed=job.formed | {uid}, finite=finite, evaluating=evaluating, position=position)
    job = turn.job
    if job.formed != frozenset(job.places):
        return
    turn.set(phase=JobPhase.REBUILDING)
    if job.lost or job.rollback or not job.began:
        lost, finite = tuple(sorted(job.lost)), job.finite - job.lost
        turn.orders.append(Choose(job.generation, job.step, lost, finite, job.rollback, job.refused, not job.began))
    else:
        turn.tell(Rebuild(job.generation, job.epoch, ()), *job.members)


def _chosen(turn: _Turn, _: str, event: Chosen) -> None:
    """[REC-13, REC-14]"""
    job = turn.job
    if event.generation != job.generation:
        return
    if event.why_not:
        _end(turn, End(75, "no-source", event.why_not))
        return
    back = next((one for one in event.sources if one.rung == "rollback"), None)
    turn.set(sources=event.sources, epoch=job.epoch if event.epoch is None else event.epoch)
    if back is not None:
        turn.set(rollback=True, step=back.step or 0)
    turn.tell(Rebuild(job.generation, turn.job.epoch, event.sources), *job.members)


def _unbuilt(turn: _Turn, _: str, message: Unbuilt) -> None:
    """The next view tries another source."""
    job = turn.job
    if message.generation == job.generation:
        turn.set(refused=(*job.refused, *((one, message.why) for one in job.sources if one.stage == message.stage)))
        _view(turn)


def _rebuilt(turn: _Turn, uid: str, message: Rebuilt) -> None:
    job = turn.job
    if message.generation != job.generation:
        return
    turn.set(rebuilt=job.rebuilt | {uid})
    job = turn.job
    if job.rebuilt != frozenset(job.places):
        return
    if job.began:
        turn.orders.append(Recovered(job.generation, job.step, job.decision, job.failed, job.sources))
    last = job.last if job.last is not None and job.last.step == job.step else None
    turn.tell(Go(job.generation, job.step, last, job.evaluating, job.ending, job.position), *job.members)
    turn.set(
        phase=JobPhase.WORKING,
        began=True,
        rollback=False,
        failed=(),
        lost=frozenset(),
        sources=(),
        refused=(),
        stepped=frozenset(job.places),
        stood=frozenset(job.places),
    )


# -- a step is decided


def _ready(turn: _Turn, uid: str, message: Ready) -> None:
    """The last one ready makes the commit. [REC-10]"""
    job = turn.job
    if message.generation != job.generation or message.step != job.step + 1:
        return
    turn.set(ready=(*job.ready, (uid, message)))
    told = dict(turn.job.ready)
    if (left := dict(job.left)) and _ends_apart(turn, left, told):
        return
    if set(told) != set(job.places):
        return
    if apart := batches_apart(job.places, told):
        _end(turn, End(1, "step-failed", f"step {message.step}: {apart}"))
        return
    losses = [loss for one in told.values() for loss in one.losses]
    norms = tuple(told[holder].norm for holder in job.places)
    commit = Commit(job.generation, message.step, norms, sum(losses) / len(losses) if losses else None, job.ending)
    turn.orders.append(Register(job.generation, message.step, "commit"))
    turn.set(step=message.step, last=commit, ready=(), stepped=frozenset(), losses_of_step=0)
    turn.tell(commit, *job.members)


def _stepped(turn: _Turn, uid: str, message: Stepped) -> None:
    if message.step == turn.job.step and message.generation == turn.job.generation:
        turn.set(stepped=turn.job.stepped | {uid})


def _raised(turn: _Turn, uid: str, message: Raised) -> None:
    """[REC-15]"""
    job = turn.job
    again = (uid, message.step) in job.raised
    turn.set(raised=job.raised | {(uid, message.step)})
    stage = job.places.index(uid)
    if message.final:
        _end(turn, End(1, "step-failed", f"step {message.step}: stage {stage}: {message.final}"))
    elif again:
        why = f"step {message.step}: the code of stage {stage} raised again after the step was replayed"
        _end(turn, End(1, "step-failed", why, culprit=uid))
    elif message.generation == job.generation:
        _close_register(turn)
        turn.set(failed=(*job.failed, Loss(stage, uid, "raised", traceback=message.traceback)))
        _view(turn)


def _broke(turn: _Turn, _: str, message: Broke) -> None:
    """Somebody may be gone: who it is shows soon, else the same members form anew."""
    if message.generation == turn.job.generation:
        turn.orders.append(Wait(message.generation, "broken"))


def _patience(turn: _Turn, _: str, event: WaitOver) -> None:
    job = turn.job
    if event.generation != job.generation:
        return
    if event.of == "spare" and job.phase is JobPhase.GATHERING:
        empty = [stage for stage, uid in enumerate(job.places) if uid == NOBODY]
        _end(turn, End(75, "no-spare", f"no process came for stages {empty} of {job.stages} in time"))
    elif event.of == "broken" and job.phase is not JobPhase.GATHERING:
        _close_register(turn)
        turn.set(losses_of_step=job.losses_of_step + 1)
        _lose(turn)


# -- the end


def _left(turn: _Turn, uid: str, message: Left) -> None:
    job = turn.job
    turn.set(left=(*job.left, (uid, message.step)))
    left = dict(turn.job.left)
    if not _ends_apart(turn, left, dict(job.ready)) and set(left) == set(job.places):
        code, how = (75, "ended, as was asked for,") if job.ending else (0, "done")
        _end(turn, End(code, "", f"{how} after step {message.step}"))


def _ending(turn: _Turn, _: str, __: Ending) -> None:
    """After the next commit; where no step is in flight or follows soon, now."""
    turn.set(ending=True)
    if turn.job.phase is JobPhase.GATHERING:
        _end(turn, End(75, "", f"ended after step {turn.job.step}, as was asked for, while places were empty"))


def _ends_apart(turn: _Turn, left: dict[str, int], ready: dict[str, Ready]) -> bool:
    """Whether some members left the loop and others go on, or at another step: that is said, and ends the job."""
    why = loops_apart(turn.job.places, left, ready)
    if why:
        _end(turn, End(1, "step-failed", why))
    return bool(why)


def _end(turn: _Turn, end: End) -> None:
    turn.tell(end, *turn.job.members, *turn.job.spares)
    turn.set(phase=JobPhase.ENDED, end=end)


def _too_late(turn: _Turn, uid: str, _: Join) -> None:
    if turn.job.end is not None:
        turn.tell(turn.job.end, uid)


def _no_effect(turn: _Turn, uid: str, message: object) -> None:
    """Comes from a view that is over, or after the end."""


_EVENTS = (Join, Formed, Rebuilt, Unbuilt, Ready, Stepped, Broke, Raised, Left, Gone, WaitOver, Chosen, Ending, Over)
_FORMED = (JobPhase.FORMING, JobPhase.REBUILDING, JobPhase.WORKING)
_LIVE = (JobPhase.GATHERING, *_FORMED)

_WORKED: dict[tuple[JobPhase, type], Callable[..., None]] = {
    **{(phase, Join): _joined for phase in _LIVE},
    **{(phase, Gone): _gone for phase in _LIVE},
    **{(phase, WaitOver): _patience for phase in _LIVE},
    **{(phase, Ending): _ending for phase in _LIVE},
    **{(phase, Over): lambda turn, _, event: _end(turn, event.end) for phase in _LIVE},
    **{(phase, Broke): _broke for phase in _FORMED},
    **{(phase, Raised): _raised for phase in _FORMED},
    (JobPhase.FORMING, Formed): _formed,
    (JobPhase.REBUILDING, Chosen): _chosen,
    (JobPhase.REBUILDING, Rebuilt): _rebuilt,
    (JobPhase.REBUILDING, Unbuilt): _unbuilt,
    (JobPhase.WORKING, Ready): _ready,
    (JobPhase.WORKING, Stepped): _stepped,
    (JobPhase.WORKING, Left): _left,
    (JobPhase.ENDED, Join): _too_late,
}
TABLE: dict[tuple[JobPhase, type], Callable[..., None]] = {
    (phase, event): _WORKED.get((phase, event), _no_effect) for phase in JobPhase for event in _EVENTS
}
