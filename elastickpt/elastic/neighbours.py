"""Which stages a lost one can be made of, and with which weights: values only, so that a coordinator needs no torch for it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

from elastickpt.errors import Refused

EPS = 1e-4
"""What is added to each norm, so that two norms of 0 make an average: the published code's 1e-4. [REC-1]"""

Weighting = Literal["norm", "norm2", "uniform"]
_WEIGHTINGS = ("norm", "norm2", "uniform")

MIN_SWAPPED_STAGES = 4
"""Below this the two end pairs of a swapped order share a stage."""


def alpha(before: float | None, after: float | None, *, weighting: Weighting = "norm") -> float:
    """The share of the stage before the lost one, from the gradient norms of both neighbours. [REC-1, REC-2]

    (x + ε) / ((x + y) + 2ε) in float64, evaluated left to right, with x = `before` and y = `after` ("norm"), or their
    squares ("norm2").

    Args:
        before: The norm of the stage before, not negative.
        after: The norm of the stage after.
        weighting: "norm", "norm2" or "uniform".

    Returns:
        A share in [0, 1]; 0.5 for "uniform", for a norm that is None or not finite, and where a square or the sum
        overflows.

    Raises:
        Refused: A norm is negative, or `weighting` is another word.

    Examples:
        >>> ek.elastic.checkfree.alpha(3.0, 1.0)
        0.7499875006249688
        >>> ek.elastic.checkfree.alpha(None, 1.0)
        0.5
    """
    if weighting not in _WEIGHTINGS:
        raise Refused(f"weighting {weighting!r}: expected one of {', '.join(map(repr, _WEIGHTINGS))}")
    if before is None or after is None or weighting == "uniform":
        return 0.5
    x, y = float(before), float(after)
    if x < 0 or y < 0:
        raise Refused(f"gradient norms {x} and {y}: expected norms, which are not negative")
    if weighting == "norm2":
        x, y = x * x, y * y
    above, below = x + EPS, (x + y) + 2 * EPS
    return above / below if math.isfinite(above) and math.isfinite(below) else 0.5


def partner(stage: int, stages: int) -> int | None:
    """The stage with which a stage changes places in the swapped order of CheckFree+: 0↔1 and S−1↔S−2. [REC-6]

    Args:
        stage: A stage, from 0.
        stages: How many there are.

    Returns:
        Its partner; None for another stage, and for every stage of fewer than four, whose end pairs would share a stage.

    Raises:
        Refused: It is none of the stages.

    Examples:
        >>> ek.elastic.checkfree.partner(1, 6), ek.elastic.checkfree.partner(2, 6)
        (0, None)
    """
    if not 0 <= stage < stages:
        raise Refused(f"stage {stage}: expected one of the {stages} stages, from 0")
    if stages < MIN_SWAPPED_STAGES:
        return None
    return {0: 1, 1: 0, stages - 1: stages - 2, stages - 2: stages - 1}.get(stage)


def sources(lost: Collection[int], *, stages: int, swap: str | None) -> dict[int, tuple[int, ...]]:
    """For each lost stage the stages that it can be made of. [REC-7]

    Both neighbours, of which none is lost. With `swap` a stage of an end pair has its partner only. A lost stage is never a
    source.

    Args:
        lost: The lost stages.
        stages: How many there are.
        swap: None, "microbatch" or "step".

    Returns:
        Lost stage → its sources in order; () where there are none.

    Raises:
        Refused: It is none of the stages.

    Examples:
        >>> ek.elastic.checkfree.sources({1, 2}, stages=6, swap="microbatch")
        {1: (0,), 2: ()}
    """
    found: dict[int, tuple[int, ...]] = {}
    for stage in sorted(lost):
        twin = partner(stage, stages)
        if swap and twin is not None:
            wanted: tuple[int, ...] = (twin,)
        else:
            wanted = (stage - 1, stage + 1) if 0 < stage < stages - 1 else ()
        found[stage] = () if any(source in lost for source in wanted) else wanted
    return found
