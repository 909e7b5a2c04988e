"""What a member of a job does next, as a table: (duty, event) → the member after it, what it says, what it sets about.

    spare        holds no place; waits for a view that names it
    idle         its view has an empty place; waits for the next one
    forming      makes the groups of its view
    standing     has made them; waits to hear how lost stages are rebuilt
    rebuilding   takes part in that
    resting      has done its part; waits for the others
    computing    forward, backward, reduction and clipping of the next step
    deciding     holds the gradients of the next step; waits for the decision
    stepping     the optimizer steps: nothing interrupts that, what arrives meanwhile waits
    left         its loop has ended; waits for the others, and takes part in what becomes of them
    broken       cannot reach other members, and was not told why; waits for the next view
    ended        the job is over for it

Whoever carries this out does one act at a time; when a new act is named, the one before is ended first: its pending
communication fails, and it changes nothing of the state. Only TakeStep changes state, and it runs to its end. [REC-16]

Pure, as `coordination` is, and explored together with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from elastickpt.elastic.messages import (
    Broke,
    Commit,
    End,
    Formed,
    FromMember,
    Go,
    Left,
    Raised,
    Ready,
    Rebuild,
    Rebuilt,
    StageSource,
    Stepped,
    Unbuilt,
    View,
)
from elastickpt.elastic.script import Position


class Duty(StrEnum):
    SPARE = "spare"
    IDLE = "idle"
    FORMING = "forming"
    STANDING = "standing"
    REBUILDING = "rebuilding"
    RESTING = "resting"
    COMPUTING = "computing"
    DECIDING = "deciding"
    STEPPING = "stepping"
    LEFT = "left"
    BROKEN = "broken"
    ENDED = "ended"


# What a member sets about.


@dataclass(frozen=True, slots=True)
class Form:
    """Make the groups of this view; a stage that is held for the first time is built first."""

    view: View


@dataclass(frozen=True, slots=True)
class Mend:
    """Take part in rebuilding: fill the own stage if `sources` names it, give from it where another one needs it. `epoch` is
    that of the claim under which things go on."""

    view: View
    sources: tuple[StageSource, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute the gradients of `step`, from the state after `step` − 1; or evaluate, which the loop may ask for before.
    `ending`: do neither, but save the state, say LoopEnded, and end."""

    step: int
    go: Go | None
    ending: bool = False


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Step the optimizer with the gradients that are held. `commit` is None when a view said so, not a commit."""

    step: int
    commit: Commit | None


@dataclass(frozen=True, slots=True)
class Stop:
    end: End


Act = Form | Mend | Compute | TakeStep | Stop


# What happens to a member besides messages.


@dataclass(frozen=True, slots=True)
class Made:
    """Form is done. All as in `Formed`."""

    finite: bool = True
    evaluating: bool = False
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Mended:
    moved: int = 0
    read: int = 0


@dataclass(frozen=True, slots=True)
class NotMended:
    """The source of the own stage is no good."""

    why: str


@dataclass(frozen=True, slots=True)
class Computed:
    batch: str = ""
    norm: float | None = None
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Took:
    """The optimizer has stepped."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Communication failed; why is not known here."""

    message: str = ""


@dataclass(frozen=True, slots=True)
class Erred:
    """The user's code raised while computing. `final` as in `Raised`."""

    traceback: str = ""
    final: str = ""


@dataclass(frozen=True, slots=True)
class LoopEnded:
    """The user's loop wants no step beyond the member's own; after a rollback it is asked anew."""


MemberEvent = View | Rebuild | Go | Commit | End | Made | Mended | NotMended | Computed | Took | Failed | Erred | LoopEnded


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member stands. `step`: completed steps of its state, None while it has no state to stand at.

    `waiting` is the newest view that came while the optimizer stepped; `ending`: the job ends at the next boundary of steps.
    """

    uid: str
    duty: Duty = Duty.SPARE
    stage: int | None = None
    view: View | None = None
    step: int | None = None
    waiting: View | None = None
    ending: bool = False

    @property
    def generation(self) -> int:
        return 0 if self.view is None else self.view.generation


class CannotFollow(RuntimeError):
    """Our own mistake: a view wants a step at which this member does not stand and to which nothing brings it."""


@dataclass(slots=True)
class _Turn:
    member: Member
    said: list[FromMember] = field(default_factory=list)
    act: Act | None = None

    def set(self, **changes: object) -> None:
        self.member = replace(self.member, **changes)  # type: ignore[arg-type]


def after(member: Member, event: MemberEvent) -> tuple[Member, tuple[FromMember, ...], Act | None]:
    """The member after one event, what it says, and the act it sets about, None for none. Raises CannotFollow, which no order
    of messages and deaths makes it do."""
    turn = _Turn(member)
    TABLE[member.duty, type(event)](turn, event)
    return turn.member, tuple(turn.said), turn.act


def _viewed(turn: _Turn, view: View) -> None:
    """[REC-12, REC-16]"""
    member = turn.member
    if view.generation <= member.generation or member.uid not in view.places:
        return
    stage = view.places.index(member.uid)
    if stage in view.lost:
        step = None  # whatever it had: this stage is rebuilt
    elif member.stage is None:
        step = view.step  # built anew, before any step was taken
    else:
        step = member.step
    turn.set(stage=stage, view=view, step=step)
    if step is None or step == view.step:
        _form(turn, view)
    elif member.duty is Duty.DECIDING and step == view.step - 1:
        turn.set(duty=Duty.STEPPING, waiting=view)
        turn.act = TakeStep(view.step, None)
    else:
        raise CannotFollow(f"{member.duty} after step {member.step}, and view {view.generation} says step {view.step}")


def _form(turn: _Turn, view: View) -> None:
    if view.complete:
        turn.set(duty=Duty.FORMING)
        turn.act = Form(view)
    else:
        turn.set(duty=Duty.IDLE)


def _view_waits(turn: _Turn, view: View) -> None:
    turn.set(waiting=view)


def _made(turn: _Turn, event: Made) -> None:
    turn.set(duty=Duty.STANDING)
    turn.said.append(Formed(turn.member.generation, event.finite, event.evaluating, event.position))


def _rebuild(turn: _Turn, message: Rebuild) -> None:
    member = turn.member
    if message.generation != member.generation or member.view is None:
        return
    turn.set(duty=Duty.REBUILDING)
    if any(source.stage == member.stage for source in message.sources):
        turn.set(step=None)
    turn.act = Mend(member.view, message.sources, message.epoch)


def _mended(turn: _Turn, event: Mended) -> None:
    turn.set(duty=Duty.RESTING)
    turn.said.append(Rebuilt(turn.member.generation, event.moved, event.read))


def _not_mended(turn: _Turn, event: NotMended) -> None:
    turn.set(duty=Duty.BROKEN)
    turn.said.append(Unbuilt(turn.member.generation, turn.member.stage or 0, event.why))


def _go(turn: _Turn, message: Go) -> None:
    member = turn.member
    if message.generation != member.generation or member.view is None:
        return
    if member.step not in (None, message.step):
        raise CannotFollow(f"stands after step {member.step}, and all are said to stand after step {message.step}")
    turn.set(step=message.step, ending=message.ending)
    _next_step(turn, message)


def _next_step(turn: _Turn, go: Go | None) -> None:
    turn.set(duty=Duty.COMPUTING)
    turn.act = Compute((turn.member.step or 0) + 1, go, turn.member.ending)


def _computed(turn: _Turn, event: Computed) -> None:
    member = turn.member
    turn.set(duty=Duty.DECIDING)
    turn.said.append(Ready(member.generation, (member.step or 0) + 1, event.batch, event.norm, event.losses))


def _committed(turn: _Turn, message: Commit) -> None:
    """[REC-10]"""
    if message.generation == turn.member.generation:
        turn.set(duty=Duty.STEPPING, ending=message.ending)
        turn.act = TakeStep(message.step, message)


def _took(turn: _Turn, _: Took) -> None:
    member = turn.member
    step, view = (member.step or 0) + 1, member.waiting
    turn.set(step=step, waiting=None)
    if view is None:
        turn.said.append(Stepped(member.generation, step))
        _next_step(turn, None)
    else:
        turn.set(duty=Duty.IDLE)
        if view.generation == member.generation:  # the view that said so
            _form(turn, view)
        else:
            _viewed(turn, view)


def _failed(turn: _Turn, event: Failed) -> None:
    turn.set(duty=Duty.BROKEN)
    turn.said.append(Broke(turn.member.generation, event.message))


def _erred(turn: _Turn, event: Erred) -> None:
    turn.set(duty=Duty.BROKEN)
    turn.said.append(Raised(turn.member.generation, (turn.member.step or 0) + 1, event.traceback, event.final))


def _loop_ended(turn: _Turn, _: LoopEnded) -> None:
    turn.set(duty=Duty.LEFT)
    turn.said.append(Left(turn.member.step or 0))


def _end(turn: _Turn, message: End) -> None:
    turn.set(duty=Duty.ENDED)
    turn.act = Stop(message)


def _no_effect(turn: _Turn, event: object) -> None:
    """Of a view that is over, or of an act that was ended."""


_WAITING = (Duty.SPARE, Duty.IDLE, Duty.STANDING, Duty.RESTING, Duty.DECIDING, Duty.LEFT, Duty.BROKEN)
_INTERRUPTED = (Duty.FORMING, Duty.REBUILDING, Duty.COMPUTING)
_WORKED: dict[tuple[Duty, type], Callable[..., None]] = {
    **{(duty, View): _viewed for duty in (*_WAITING, *_INTERRUPTED)},
    (Duty.STEPPING, View): _view_waits,
    **{(duty, End): _end for duty in Duty if duty is not Duty.ENDED},
    **{(duty, Failed): _failed for duty in _INTERRUPTED},
    (Duty.FORMING, Made): _made,
    (Duty.STANDING, Rebuild): _rebuild,
    (Duty.REBUILDING, Mended): _mended,
    (Duty.REBUILDING, NotMended): _not_mended,
    (Duty.RESTING, Go): _go,
    (Duty.COMPUTING, Computed): _computed,
    (Duty.COMPUTING, Erred): _erred,
    (Duty.COMPUTING, LoopEnded): _loop_ended,
    (Duty.DECIDING, Commit): _committed,
    (Duty.STEPPING, Took): _took,
}
_EVENTS = (View, Rebuild, Go, Commit, End, Made, Mended, NotMended, Computed, Took, Failed, Erred, LoopEnded)
TABLE: dict[tuple[Duty, type], Callable[..., None]] = {
    (duty, event): _WORKED.get((duty, event), _no_effect) for duty in Duty for event in _EVENTS
}
