"""A job as its coordinator knows it: where it stands, what can happen to it, and what can be ordered. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from elastickpt.elastic.messages import (
    Broke,
    Commit,
    End,
    Formed,
    Join,
    Left,
    Raised,
    Ready,
    Rebuilt,
    StageSource,
    Stepped,
    ToMember,
    Unbuilt,
)
from elastickpt.elastic.recovery import StepFate, Why
from elastickpt.elastic.script import Position

NOBODY = ""


class JobPhase(StrEnum):
    GATHERING = "gathering"  # a place is held by nobody; members wait
    FORMING = "forming"  # a view is out: members come to its step and make their groups
    REBUILDING = "rebuilding"  # every member stands: lost stages are rebuilt, each by a rung
    WORKING = "working"  # a step is in flight
    ENDED = "ended"  # the job is over


@dataclass(frozen=True, slots=True)
class Loss:
    """A place whose holder is gone, or whose user's code raised; `uid` held it. `signal` of the process, if one ended it."""

    stage: int
    uid: str
    why: Why
    signal: int | None = None
    traceback: str = ""


# What happens to a coordinator besides messages.


@dataclass(frozen=True, slots=True)
class Gone:
    """A member's process has ended, or was ended; nothing of it is at work any more."""

    uid: str
    why: Why
    signal: int | None = None
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class WaitOver:
    """A wait that was ordered is over; of no effect when `generation` is not the newest any more."""

    generation: int
    of: Literal["spare", "broken"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the ladder says for the lost stages of a view: one StageSource each, or why there is none for them. `epoch`: the
    claim under which things go on, None for the one before."""

    generation: int
    sources: tuple[StageSource, ...]
    why_not: str = ""
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """The job is to end after the next step that is committed, with 75."""


@dataclass(frozen=True, slots=True)
class Over:
    """The job ends now."""

    end: End


# What a coordinator orders besides messages.


@dataclass(frozen=True, slots=True)
class Tell:
    uid: str
    message: ToMember


@dataclass(frozen=True, slots=True)
class Register:
    """The register of a step, written once: what the decision on (generation, step) is."""

    generation: int
    step: int
    decision: Literal["commit", "abort"]


@dataclass(frozen=True, slots=True)
class Choose:
    """Ask the ladder for sources; answered by a Chosen. `finite`: stages that may be sources, their tensors being finite.
    `rollback`: all stages are read from the checkpoint of `step`. `refused`: sources that were tried, and why they failed.
    `begins`: no step was taken yet, and all stages come from the newest checkpoint, if there is one."""

    generation: int
    step: int
    lost: tuple[int, ...]
    finite: frozenset[int]
    rollback: bool
    refused: tuple[tuple[StageSource, str], ...]
    begins: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Answered by a WaitOver, unless something else comes first."""

    generation: int
    of: Literal["spare", "broken"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A view is complete: everybody stands. `failed` names what made it, `sources` how it was mended."""

    generation: int
    step: int
    decision: StepFate
    failed: tuple[Loss, ...]
    sources: tuple[StageSource, ...]


CoordinatorOrder = Tell | Register | Choose | Wait | Recovered
MemberSaid = Join | Formed | Rebuilt | Unbuilt | Ready | Stepped | Broke | Raised | Left
JobEvent = tuple[str, MemberSaid] | Gone | WaitOver | Chosen | Ending | Over


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands. `places` by stage: who holds it; `where`: uid, host and zone of each process. `ready`, `stepped`, ...
    are uids of the newest view.

    `failed` since the last Go, `lost` their stages that have to be rebuilt; `losses_of_step` counts them, a burst as one;
    `stood`: who held a place at the last Go; `raised` are (uid, step) of exceptions of the user's code. `ending`: it ends after
    the next commit.
    """

    stages: int
    epoch: int
    max_losses_of_step: int = 3
    phase: JobPhase = JobPhase.GATHERING
    generation: int = 0
    step: int = 0
    places: tuple[str, ...] = ()
    spares: tuple[str, ...] = ()
    where: tuple[tuple[str, str, str], ...] = ()
    began: bool = False
    rollback: bool = False
    decision: StepFate = "replay"
    failed: tuple[Loss, ...] = ()
    lost: frozenset[int] = frozenset()
    finite: frozenset[int] = frozenset()
    formed: frozenset[str] = frozenset()
    evaluating: bool = False
    position: Position | None = None
    rebuilt: frozenset[str] = frozenset()
    ready: tuple[tuple[str, Ready], ...] = ()
    stepped: frozenset[str] = frozenset()
    left: tuple[tuple[str, int], ...] = ()
    sources: tuple[StageSource, ...] = ()
    refused: tuple[tuple[StageSource, str], ...] = ()
    raised: frozenset[tuple[str, int]] = frozenset()
    losses_of_step: int = 0
    stood: frozenset[str] = frozenset()
    ending: bool = False
    last: Commit | None = None
    end: End | None = None

    def __post_init__(self) -> None:
        if not self.places:
            object.__setattr__(self, "places", (NOBODY,) * self.stages)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(uid for uid in self.places if uid != NOBODY)

    @property
    def lost_too_often(self) -> str:
        """In words."""
        named = "; ".join(f"stage {one.stage} ({one.uid}): {one.why}" for one in self.failed)
        how = f"failed {self.losses_of_step} times, the limit"
        return f"the step after {self.step} {how}; the last ones: {named or unreached(self)}"


def spare_for(stage: int, places: Sequence[str], spares: Sequence[str], where: Sequence[tuple[str, str, str]]) -> str:
    """The spare that takes a place: the first one that is least likely to be lost together with the stages beside it, which is
    what it could be rebuilt from: on no host of theirs, then in no zone of theirs. [REC-17]"""
    at = {uid: (host, zone) for uid, host, zone in where}
    beside = [at.get(places[one], ("", "")) for one in (stage - 1, stage + 1) if 0 <= one < len(places) and places[one]]

    def shared(uid: str) -> tuple[bool, bool]:
        host, zone = at.get(uid, ("", ""))
        return bool(host) and host in {one for one, _ in beside}, bool(zone) and zone in {one for _, one in beside}

    return min(spares, key=shared)


def batches_apart(places: tuple[str, ...], ready: Mapping[str, Ready]) -> str:
    """In words, how the batches differ that places have seen of one step; "" where they do not."""
    batches = {stage: ready[holder].batch for stage, holder in enumerate(places) if ready[holder].batch}
    if len(set(batches.values())) <= 1:
        return ""
    return "places have different batches: " + ", ".join(f"stage {stage} has {batch}" for stage, batch in batches.items())


def loops_apart(places: tuple[str, ...], left: Mapping[str, int], ready: Mapping[str, object]) -> str:
    """In words, where some members left the loop and others go on, or at another step; "" where they do not."""
    if len(set(left.values())) <= 1 and not ready:
        return ""
    gone = ", ".join(f"stage {places.index(uid)} after step {step}" for uid, step in sorted(left.items()))
    on = ", ".join(f"stage {places.index(uid)}" for uid in sorted(ready))
    return f"the loop ended at {gone}" + (f", and not at {on}" if on else "")


def unreached(job: JobState) -> str:
    """In words, why members wait for each other though none is gone: some may have left the loop that others go on with."""
    left = dict(job.left)
    going_on = {uid: None for uid in job.members if uid not in left}
    return loops_apart(job.places, left, going_on) if left else "members could not reach each other"
