"""What is known of one recovery, once every member stands again: the members of its event, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

StepFate = Literal["forward", "replay"]
Rung = Literal["stale", "partner", "checkfree", "rollback"]
Why = Literal["exit", "closed", "silent", "stalled", "raised"]
MendedBy = Literal["stale", "partner", "checkfree", "rollback", "replay"]
_APPROXIMATE: tuple[MendedBy, ...] = ("stale", "partner", "checkfree")


@dataclass(frozen=True, slots=True)
class From:
    """What a stage was rebuilt from: `stages` in order, and `alpha` for two; or the checkpoint at `path` of `step`."""

    stages: tuple[int, ...] | None = None
    alpha: float | None = None
    path: str | None = None
    step: int | None = None

    def to_json(self) -> dict[str, object]:
        if self.stages is None:
            return {"path": self.path, "step": self.step}
        return {"stages": list(self.stages), "alpha": self.alpha}


@dataclass(frozen=True, slots=True)
class Lost:
    """One place that was lost, and how it was mended. `signal` ended its process, None if none did; `traceback` is text, of
    what its own code raised."""

    stage: int
    uid: str
    pid: int
    why: Why
    signal: int | None = None
    rung: MendedBy = "replay"
    source: From = From(())
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Considered:
    """One rung for one lost stage that was passed over, or taken, and why."""

    rung: Rung
    why: str
    stage: int


@dataclass(frozen=True, slots=True)
class Seconds:
    """From the last sign of life of what was lost first, cumulative; None for what has not happened (yet).

    detected       the coordinator knew of it
    unblocked      no survivor waited any more for what cannot come
    formed         the groups of the view were made
    rebuilt        every place stood
    first_microbatch   the last member began the first microbatch of what runs next
    """

    detected: float | None = None
    unblocked: float | None = None
    formed: float | None = None
    rebuilt: float | None = None
    first_microbatch: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that the rebuilding took: `moved` between members, `read` from storage."""

    moved: int = 0
    read: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery. `step`: completed steps, that one included, after which every member stands; `time` in seconds since 1970,
    of the view that completed. `rung` and `source` are those of the lowest lost stage. Made by the job: a trainer's
    `on_rebuilt` gets it, and the next `Report` has it."""

    time: float
    epoch: int
    generation: int
    step: int
    decision: StepFate
    lost: tuple[Lost, ...]
    rung: MendedBy
    approximate: bool
    source: From
    considered: tuple[Considered, ...]
    seconds: Seconds
    bytes: Moved

    def begun(self, seconds: float) -> Recovery:
        """The same, once the first microbatch has begun.

        Args:
            seconds: How long after the last sign of life.

        Returns:
            A recovery whose `seconds.first_microbatch` that is.

        Raises nothing.
        """
        return replace(self, seconds=replace(self.seconds, first_microbatch=seconds))


def is_approximate(lost: Sequence[Lost]) -> bool:
    """Whether any place stands at a state that training without the loss would not have reached."""
    return any(one.rung in _APPROXIMATE for one in lost)
