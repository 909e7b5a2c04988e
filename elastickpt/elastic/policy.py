"""By what rules a job goes on after a loss, and what a step reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal, get_args

from elastickpt.elastic.recovery import Recovery, Rung
from elastickpt.errors import Refused

if TYPE_CHECKING:
    from elastickpt.elastic.stages import Swap
    from elastickpt.saving.task import SaveHandle

Weighting = Literal["norm", "norm2", "uniform"]
Moments = Literal["reset", "average"]
LrMode = Literal["set", "multiply"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a lost stage is rebuilt from, and how it is trained then. Raises Refused for values that mean nothing.

    rungs               in this order, the first one that is possible for a lost stage
    max_stale_steps     how many steps old a checkpoint may be for `stale`
    weighting, clipped  of an average: by the gradient norms of the last committed step, after clipping or before it
    optimizer           moments of a rebuilt body: none ("reset"), or made as its weights are ("average")
    lr_factor           on top of the scheduler, for a body that was averaged or copied: set, or multiplied up to `lr_cap`
    spare_wait_s        seconds until a job with an empty place ends
    max_losses_of_step  how often one step may be lost before the job ends

    Examples:
        >>> policy = ek.elastic.Policy(rungs=("partner", "checkfree"), optimizer="average", lr_mode="multiply")
        >>> policy.lr_factor, policy.factor_after(1.1)
        (1.1, 1.2)
        >>> policy.needs_equal_stages(swap=None)
        True
    """

    rungs: tuple[Rung, ...] = ("stale", "partner", "checkfree", "rollback")
    max_stale_steps: int = 50
    weighting: Weighting = "norm"
    clipped: bool = True
    optimizer: Moments = "reset"
    lr_factor: float = 1.1
    lr_mode: LrMode = "set"
    lr_cap: float = 1.2
    spare_wait_s: float = 600.0
    max_losses_of_step: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(self.rungs))
        for rung in self.rungs:
            _require_word("rungs", rung, get_args(Rung))
        if len(set(self.rungs)) != len(self.rungs):
            raise Refused(f"Policy rungs={self.rungs!r}: expected each rung once")
        _require_word("weighting", self.weighting, get_args(Weighting))
        _require_word("optimizer", self.optimizer, get_args(Moments))
        _require_word("lr_mode", self.lr_mode, get_args(LrMode))
        for name in ("lr_factor", "lr_cap"):
            number = getattr(self, name)
            if not (isfinite(number) and number > 0):
                raise Refused(f"Policy {name}={number!r}: expected a number above 0")
        if not self.spare_wait_s >= 0:
            raise Refused(f"Policy spare_wait_s={self.spare_wait_s!r}: expected seconds from 0 on")
        for name, least in (("max_stale_steps", 0), ("max_losses_of_step", 1)):
            number = getattr(self, name)
            if type(number) is not int or number < least:
                raise Refused(f"Policy {name}={number!r}: expected an integer from {least} on")

    def needs_equal_stages(self, swap: Swap | None) -> bool:
        """Whether one stage may be made of others, which then all have bodies of one shape.

        Args:
            swap: The trainer's; without a swapped order no stage has a partner.

        Returns:
            Whether they have to.

        Raises nothing.
        """
        return "checkfree" in self.rungs or ("partner" in self.rungs and swap is not None)

    def factor_after(self, before: float) -> float:
        """The learning rate's factor of a body that was averaged or copied.

        Args:
            before: Its factor until then, 1 for one that never was.

        Returns:
            `lr_factor`, or `before` times that up to `lr_cap`, as `lr_mode` says.

        Raises nothing.
        """
        return self.lr_factor if self.lr_mode == "set" else min(before * self.lr_factor, self.lr_cap)


@dataclass(frozen=True, slots=True)
class Report:
    """One committed step. `step`: completed steps, this one included. `loss`: the mean over microbatches, equal on all members;
    `norms`: of each stage's body gradient. `recovered` since the report before; `saved`: the save of this step, where one was
    due; one that a loss cut off ends with an error, though the step may be saved once more. `seconds` from this member's first
    microbatch until it read the decision.

    Examples:
        >>> report = ek.elastic.Report(step=7, loss=0.25, norms={0: 1.5, 1: 0.5}, epoch=1, generation=1)  # as `steps` yields it
        >>> report.step, report.recovered
        (7, ())
    """

    step: int
    loss: float
    norms: Mapping[int, float]
    epoch: int
    generation: int
    recovered: tuple[Recovery, ...] = ()
    saved: SaveHandle | None = None
    seconds: float = 0.0


def _require_word(name: str, word: object, words: tuple[str, ...]) -> None:
    if word not in words:
        raise Refused(f"Policy {name}: {word!r}, expected one of {', '.join(map(repr, words))}")
