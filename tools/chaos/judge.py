"""From what a reader finds to what it means. Pure.

| outcome | means |
|---|---|
| silently wrong | a load reported success and gave what no save was given, or another step's than the place says |
| lost | an acknowledged checkpoint that must be there loads no more |
| hang | a survivor, or a reader, had not returned at the limit |
| error | something stands where checkpoints stand, was never acknowledged, and does not load |
| new | the save that was cut off is there, whole |
| old | it is absent, and what was there before is whole |
| does not mount | the file system itself is gone, after e2fsck too |
| crash | the reader died of it |
| detected | a bit was flipped, and the load raised |
| harmless | a bit was flipped, and the load gave what was saved, bit for bit |

The first that applies, in this order, is the outcome; the last three where a bit was flipped only, `error`, `new` and `old`
where a save was cut off only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .entrants import ALL_STEPS

Verdict = Literal["whole", "wrong", "error"]
Outcome = Literal["silently wrong", "lost", "hang", "error", "new", "old", "does not mount", "crash", "detected", "harmless"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
BAD: frozenset[Outcome] = frozenset({"silently wrong", "lost", "hang", "error", "does not mount", "crash"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One place that a reader takes for a checkpoint, and what loading it gave: if whole, the step and job that saved it."""

    place: str
    verdict: Verdict
    step: int | None = None
    job: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Promised:
    """What must hold. `begun`: the newest step whose save has begun; `newest`: the newest acknowledged one, 0 if there is none;
    `each`: acknowledged steps that must all be there, but for those that retention of `keeps` steps removes behind a newer one,
    which stands although nobody has heard of it yet."""

    begun: int
    newest: int
    each: frozenset[int] = frozenset()
    keeps: int = ALL_STEPS


@dataclass(frozen=True, slots=True)
class Judgement:
    outcome: Outcome
    detail: str = ""


def promised(begun: Sequence[int], acknowledged: Sequence[int], keeps: int) -> Promised:
    """The promise when these saves have begun and were acknowledged, by a library that keeps so many acknowledged ones."""
    kept = sorted(acknowledged)[-keeps:] if keeps else []
    return Promised(max(begun, default=0), max(acknowledged, default=0), frozenset(kept), keeps)


def judge(seen: Sequence[Seen] | None, promise: Promised) -> Judgement:
    """The outcome; `seen` is None where the reader did not return."""
    if seen is None:
        return Judgement("hang", "the reader did not return")
    steps = {found.step for found in seen if found.verdict == "whole" and found.step is not None}
    wrong = [found for found in seen if found.verdict == "wrong"]
    failed = [found for found in seen if found.verdict == "error"]
    if wrong:
        return Judgement("silently wrong", _told(wrong))
    if never := sorted(step for step in steps if step > promise.begun):
        return Judgement("silently wrong", f"step {never[0]} was never saved")
    missing = sorted(one for one in promise.each - steps if sum(step > one for step in steps) < promise.keeps)
    if not missing and promise.newest and not any(step >= promise.newest for step in steps):
        missing = [promise.newest]
    if missing:
        return Judgement(
            "lost", f"step {missing[0]} was acknowledged" + (f"; {_told(failed)}" if failed else ", and is absent")
        )
    if failed:
        return Judgement("error", _told(failed))
    return Judgement("new" if promise.begun in steps else "old")


def judge_flipped(seen: Sequence[Seen], step: int) -> Judgement:
    """The outcome where one bit of the only checkpoint was flipped, which job 0 saved at `step`."""
    if wrong := [found for found in seen if found.verdict == "wrong"]:
        return Judgement("silently wrong", _told(wrong))
    if others := [found for found in seen if found.verdict == "whole" and (found.step, found.job) != (step, 0)]:
        return Judgement("silently wrong", f"{others[0].place}: step {others[0].step} of job {others[0].job} was never saved")
    if failed := [found for found in seen if found.verdict == "error"]:
        return Judgement("detected", _told(failed))
    return Judgement("harmless") if seen else Judgement("lost", "it is not seen any more")


def _told(found: Sequence[Seen]) -> str:
    return "; ".join(f"{one.place}: {one.detail}" for one in found)[:600]
