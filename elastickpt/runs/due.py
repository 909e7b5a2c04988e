"""When the next save is due. Decides only; clocks are given. [RUN-90..93]

By steps every rank decides alone. What depends on a clock is decided by rank 0 when it completed a step, for a later one, and
published before it goes on; training steps have collectives, so no rank reaches that later step before. A step that nobody
published is not due.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite, sqrt

from elastickpt.errors import Refused

LEAD_STEPS = 2  # a rank may be in the step after the one that rank 0 completed, never past it


@dataclass(frozen=True, slots=True)
class Every:
    """Save at regular intervals; exactly one of both is given.

    Args:
        steps: Every so many steps.
        seconds: Every so many seconds.

    Raises:
        Refused: None or both are given, or a value means nothing.

    Examples:
        >>> options = ek.RunOptions(due=ek.Every(steps=100))
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise Refused("Every: expected exactly one of steps= and seconds=")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise Refused(f"Every steps={self.steps!r}: expected an integer from 1 on")
        if self.seconds is not None and not (isfinite(self.seconds) and self.seconds > 0):
            raise Refused(f"Every seconds={self.seconds!r}: expected seconds above 0")


@dataclass(frozen=True, slots=True)
class YoungDaly:
    """Save at the interval that loses least: sqrt(2 · cost of a save · mean time between failures), as measured.

    Args:
        mtbf_s: The mean time between failures in seconds that is believed before anything failed; failures that are seen
            correct it.

    Raises:
        Refused: It is not above 0.

    Examples:
        >>> options = ek.RunOptions(due=ek.YoungDaly(mtbf_s=3 * 3600))
    """

    mtbf_s: float

    def __post_init__(self) -> None:
        if not (isfinite(self.mtbf_s) and self.mtbf_s > 0):
            raise Refused(f"YoungDaly mtbf_s={self.mtbf_s!r}: expected seconds above 0")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run has seen of itself: what the last saves cost training, how long it ran in all, how often it failed."""

    stall_s: float
    uptime_s: float
    failures: int


def young_daly_s(*, stall_s: float, mtbf_s: float) -> float:
    """Seconds between saves: sqrt(2 · cost · MTBF), which holds while a save costs less than half the MTBF; MTBF beyond."""
    return min(sqrt(2 * stall_s * mtbf_s), mtbf_s)


def mtbf_s(prior: YoungDaly, measured: Measured) -> float:
    """The mean time between failures, the belief counting as one failure seen after its time."""
    return (prior.mtbf_s + measured.uptime_s) / (1 + measured.failures)


def interval_s(rule: Every | YoungDaly, measured: Measured) -> float | None:
    """Seconds between saves, None for a rule that counts steps."""
    if isinstance(rule, Every):
        return rule.seconds
    return young_daly_s(stall_s=measured.stall_s, mtbf_s=mtbf_s(rule, measured))


def decide_step(*, step: int, since_save_s: float, step_s: float, interval_s: float, published: Collection[int]) -> int | None:
    """Rank 0, when it completed `step`: the later step to publish as due, or None.

    It is the first step that nobody can have reached; it is due if the interval is over, or nearer to its end, when it comes.
    `since_save_s` counts from the last save that was begun; `published`: steps that were published and are not saved yet.
    """
    if published and max(published) >= step:
        return None
    if since_save_s + (LEAD_STEPS + 0.5) * step_s < interval_s:
        return None
    return step + LEAD_STEPS


def due(rule: Every | YoungDaly, *, step: int, published: Collection[int]) -> bool:
    """Whether a save is due at `step`, the number of completed steps; the same on every rank."""
    if isinstance(rule, Every) and rule.steps is not None:
        return step > 0 and step % rule.steps == 0
    return step in published
