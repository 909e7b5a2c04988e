"""What the coordinator of a job and its members tell each other: the whole protocol.

    member -> coordinator                                    coordinator -> member
    Join       first: who this process is                    Welcome    it is in, with a place or as a spare
    Terms      by what it trains                             View       who holds which place, and the step where all stand
    Formed     it stands at the view's step, its groups are  Rebuild    how each lost stage is rebuilt
               made                                          Go         every place stands: the next step begins
    Rebuilt    its part of the rebuilding is done            Commit     the step is decided: step the optimizer
    Unbuilt    its part of it cannot be done                 Held       what stands under a key of its view
    Ready      its gradients of a step are final             End        the job is over, and why
    Stepped    its optimizer has stepped
    Broke      it cannot reach other members
    Raised     the user's code raised before the decision
    Left       its loop ended
    Quit       an error left its block: its process ends
    Reached    a point of a recovery, for its timeline
    Put, Ask   a key of its view is set; some are wanted
    Beat       it lives, and what it is at

1. A member takes messages in order; one that names another generation than its newest view's is of no effect.
2. A step of the optimizer runs only behind a Commit, or behind a View whose step is one more than the member's own.
3. What a View says of steps holds for every later View until a Go: a member that reaches it need not ask again.
4. Nothing here is a pickle; a message that does not have these fields and types is refused, and the connection with it.
"""

from __future__ import annotations

from typing import Literal, cast

from elastickpt.elastic.recovery import Recovery, Rung
from elastickpt.elastic.script import Position
from elastickpt.ranks.messages import Message, decode_from

RecoveryPoint = Literal["unblocked", "first_microbatch"]
OWN_CODE = "own code"  # the phase of who computes where the user has declared none


class Join(Message, frozen=True, tag=True):
    """`uid` is unique in the job; `host` and `zone` say with whom it may be lost at once."""

    uid: str
    pid: int
    host: str
    zone: str


class Terms(Message, frozen=True, tag=True):
    """By what a member trains; equal on all of them. `run` is the root of the run, "" for none, which is claimed as the next
    three say (`runs.view_saves.Claims`); the rest is its policy."""

    run: str = ""
    keep: str = ""
    take_over: bool = False
    orphans_s: float = 60.0
    rungs: tuple[Rung, ...] = ()
    swap: bool = False
    weighting: str = "norm"
    max_stale_steps: int = 50
    max_losses_of_step: int = 3
    spare_wait_s: float = 600.0


class Formed(Message, frozen=True, tag=True):
    """`finite`: no tensor of its stage has an infinity or a NaN. `evaluating`: the view came while it evaluated;
    `position`: where in the script it is, None for a new member."""

    generation: int
    finite: bool
    evaluating: bool = False
    position: Position | None = None


class Rebuilt(Message, frozen=True, tag=True):
    """`moved` and `read` in bytes: between members, and from storage."""

    generation: int
    moved: int = 0
    read: int = 0


class Unbuilt(Message, frozen=True, tag=True):
    """The source of `stage` is no good: `why` is for people."""

    generation: int
    stage: int
    why: str


class Ready(Message, frozen=True, tag=True):
    """`step` is the number of completed steps once this one is taken. `batch` is a digest of the batch, "" where a place sees
    none; `norm` that of its stage's gradient; `losses`, of each microbatch, come from the last stage alone."""

    generation: int
    step: int
    batch: str = ""
    norm: float | None = None
    losses: tuple[float, ...] = ()


class Stepped(Message, frozen=True, tag=True):
    generation: int
    step: int


class Broke(Message, frozen=True, tag=True):
    generation: int
    message: str


class Raised(Message, frozen=True, tag=True):
    """`step` as in Ready. `traceback` is text. `final`: why a replay would fare no better, "" where it may."""

    generation: int
    step: int
    traceback: str
    final: str = ""


class Left(Message, frozen=True, tag=True):
    step: int


class Quit(Message, frozen=True, tag=True):
    """`kind` is that of an error of this library, "" of any other one. `traceback` is text."""

    kind: str
    traceback: str


class Reached(Message, frozen=True, tag=True):
    """`unblocked`: nothing of an older view is under way any more. `first_microbatch`: that of what runs after a Go begins."""

    generation: int
    point: RecoveryPoint


class Put(Message, frozen=True, tag=True):
    generation: int
    key: str
    value: bytes


class Ask(Message, frozen=True, tag=True):
    """Answered by a Held for each key once that is set; by nothing, where the view is over."""

    generation: int
    keys: tuple[str, ...]


class Beat(Message, frozen=True, tag=True):
    """`phase` is a declared phase, OWN_CODE where none is, or "" where it does not compute; `count` grows with each microbatch
    and phase. `limit_s` bounds the time between two counts within the phase, None for what its history says. `own`: at work in
    its own code, and not waiting for others. `longest`: the longest times between two counts since the last Beat, in seconds,
    of each phase that has no limit of its own."""

    phase: str
    count: int
    limit_s: float | None = None
    own: bool = False
    longest: tuple[tuple[str, float], ...] = ()


class Welcome(Message, frozen=True, tag=True):
    """`spare`: it holds no place, and waits for one. `beat_s`: how often a Beat is expected."""

    spare: bool
    beat_s: float


class View(Message, frozen=True, tag=True):
    """`places` by stage: the uid that holds it, "" for nobody. `lost` are stages that are rebuilt; with `rollback` all are.
    `step` is where every member stands, or is brought, before the next step."""

    epoch: int
    generation: int
    step: int
    places: tuple[str, ...]
    lost: tuple[int, ...]
    rollback: bool = False

    @property
    def complete(self) -> bool:
        """Whether every place is held: only then are groups formed."""
        return all(self.places)


class StageSource(Message, frozen=True, tag=True):
    """How one stage is rebuilt. `stages` in order, with `alpha` for two of them; or the checkpoint at `path` of `step`."""

    stage: int
    rung: Rung
    stages: tuple[int, ...] = ()
    alpha: float | None = None
    path: str = ""
    step: int | None = None


class Rebuild(Message, frozen=True, tag=True):
    """`sources` of every lost stage, of all stages in a rollback. `epoch` is the claim under which things go on."""

    generation: int
    epoch: int
    sources: tuple[StageSource, ...]


class Commit(Message, frozen=True, tag=True):
    """`norms` by stage, of the gradients that are stepped with; `loss` is the mean over microbatches. `ending`: the job ends
    after this step, which is saved. `begun` by generation: seconds until the first microbatch of what ran after a recovery."""

    generation: int
    step: int
    norms: tuple[float | None, ...]
    loss: float | None
    ending: bool = False
    begun: tuple[tuple[int, float], ...] = ()


class Go(Message, frozen=True, tag=True):
    """`step` is where every member stands; `last` the newest commit of the job, None before the first and after a rollback.
    `evaluating`: the view came while members evaluated, which begins again; `position`: the furthest one told. `ending` as in
    Commit. `recovered`: what was mended, None at the start."""

    generation: int
    step: int
    last: Commit | None
    evaluating: bool = False
    ending: bool = False
    position: Position | None = None
    recovered: Recovery | None = None


class Held(Message, frozen=True, tag=True):
    generation: int
    key: str
    value: bytes


class End(Message, frozen=True, tag=True):
    """`reason` is "" where the job is done, else a word of `RecoveryFailed`; `culprit` the uid whose own error it is, or ""."""

    code: int
    reason: str
    message: str
    culprit: str = ""


FromMember = (
    Join | Terms | Formed | Rebuilt | Unbuilt | Ready | Stepped | Broke | Raised | Left | Quit | Reached | Put | Ask | Beat
)
ToMember = Welcome | View | Rebuild | Go | Commit | Held | End

_FROM_MEMBER = cast("type[FromMember]", FromMember)
_TO_MEMBER = cast("type[ToMember]", ToMember)


def from_member(data: bytes) -> FromMember:
    """What a member encoded. Raises Malformed for anything else."""
    return decode_from("member", data, _FROM_MEMBER)


def to_member(data: bytes) -> ToMember:
    """What the coordinator encoded. Raises Malformed for anything else."""
    return decode_from("coordinator", data, _TO_MEMBER)
