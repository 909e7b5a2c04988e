"""Where in the user's script a member is, and where others are: who took a place goes through the script up to there, and so
does who was interrupted when others were further already. [REC-61]

A script has parts: 0 before its first loop of steps, 1 within that, 2 behind it, 3 within the second one, and so on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import reduce


@dataclass(frozen=True, slots=True)
class Position:
    """In `part`, after `step`, which was taken in part `since`, or to which all rolled back when this member was in it.

    `values`: what evaluations came to since then, in their order; `within` of them in part `since`, `before` of them before the
    newest loop ended, which was after `ended_at` steps. `met`: it is known in which call the others are. It is not where loops
    have still to be told of a step, or were at the report of one that a rollback undid: what they do then shows in the first
    call that all make. `evaluates`: that call is an evaluation.
    """

    part: int = 0
    since: int = 0
    step: int = 0
    values: tuple[float, ...] = ()
    within: int = 0
    before: int = 0
    ended_at: int = 0
    met: bool = True
    evaluates: bool = False

    @property
    def in_loop(self) -> bool:
        return self.part % 2 == 1

    @property
    def stepped_in_loop(self) -> bool:
        """Whether the newest step was taken within a loop, which was told of it, or is to be."""
        return self.since % 2 == 1

    @property
    def tells_of_step(self) -> bool:
        """Whether this is the loop that took the newest step, and is told of it."""
        return self.in_loop and self.part == self.since

    def further(self, other: Position) -> Position:
        """The one of both, after the same step, that is further in the script; `met` where both have."""
        further = max(self, other, key=lambda one: (one.part, len(one.values)))
        return replace(further, met=self.met and other.met)

    def rolled_back(self, step: int) -> Position:
        """The same part, after an earlier step. What was evaluated within the loop belonged to steps that come once more; what
        was evaluated behind it stays."""
        values = () if self.in_loop else self.values[self.before :]
        return replace(self, since=self.part, step=step, values=values, within=len(values), before=0, met=False)

    def stepped(self, step: int) -> Position:
        """The next step is taken; behind a loop that is one of the way back to its end."""
        if self.in_loop:
            return Position(self.part, self.part, step, ended_at=self.ended_at)
        return replace(self, step=step, met=True)

    def evaluated(self, value: float) -> Position:
        within = self.within + (self.part == self.since)
        return replace(self, values=(*self.values, value), within=within)


class Script:
    """Of one member: its position, and the furthest one of all when they stood last."""

    def __init__(self) -> None:
        self._at = Position()
        self._others: Position | None = None
        self._had = 0  # of the values, by this member
        self._reports_later = False  # its loop is told of no step that it had not
        self._catches_up = False  # to where others were before all rolled back

    @property
    def position(self) -> Position:
        return self._at

    @property
    def furthest(self) -> Position:
        """That this member knows of."""
        return self._at if self._others is None else self._at.further(self._others)

    @property
    def ended_at(self) -> int:
        """After how many steps the newest loop ended."""
        return self._at.ended_at

    @property
    def is_passed_over(self) -> bool:
        """Whether this part was over before the step after which the others' calls are known: nothing of it is told."""
        return self._at.part < self._at.since

    @property
    def is_past(self) -> bool:
        """Whether others are in a later part."""
        return self._others is not None and self._at.part < self._others.part

    def stand(self, step: int, told: Position | None, *, new: bool) -> None:
        """All members stand after `step`. `told`: the furthest of those that stood before, where they then were; None where all
        are new. `new`: this member is."""
        if told is None:
            self._at = replace(self._at, step=step, ended_at=step)
            return
        others = self._others = told if told.step == step else told.rolled_back(step)
        if new:
            at = self._at
            self._at = replace(others, part=at.part, before=at.before, ended_at=at.ended_at)
            self._reports_later = True
        elif others is told:
            self._at = replace(self._at, values=told.values, within=told.within, met=told.met)
        elif self._at.part == others.part:
            self._had = 0 if self._at.in_loop else max(0, self._had - self._at.before)
            self._at = others
        else:
            self._at = replace(self._at, step=step, values=told.values, within=told.within, met=False)
            self._catches_up = True
        self._join()

    def meet(self, told: Collection[Position]) -> bool:
        """All members have told where they are, as each of them was to make its next call with the others. Returns whether the
        others evaluate after the step of which the loop of this one was told nothing."""
        at, furthest = self._at, reduce(Position.further, told)
        self._at, self._others = replace(at, met=True), replace(furthest, met=True, evaluates=False)
        self._join()
        return self._reports_later and at.part == at.since and any(one.evaluates and one.part == at.part for one in told)

    def begin_loop(self) -> int:
        """A loop of steps begins. Returns its part."""
        self._at = replace(self._at, part=self._at.part + (2 if self._at.in_loop else 1))
        self._join()
        return self._at.part

    def report(self) -> None:
        """The loop is told of the newest step: it goes through what is evaluated then, too."""
        self._reports_later = False

    def end_loop(self, part: int, step: int) -> None:
        """The loop of this part ends, if it has not ended yet."""
        at = self._at
        if at.part != part:
            return
        if self._reports_later and part == at.since:
            self._had = max(self._had, at.within)
        self._at = replace(at, part=part + 1, before=self._had, ended_at=step)
        self._join()

    def stepped(self, step: int) -> None:
        """The next step is taken, by all."""
        if self._at.in_loop:
            self._had = 0
        self._at, self._others = self._at.stepped(step), None
        self._catches_up = self._reports_later = False

    def known(self) -> float | None:
        """What the next evaluation came to, if others have had it without this member; it has had it then."""
        if self.is_passed_over or self._had == len(self._at.values):
            return None
        self._had += 1
        return self._at.values[self._had - 1]

    def evaluated(self, value: float) -> None:
        """All members have evaluated, with this result."""
        self._at = self._at.evaluated(value)
        self._had += 1

    def _join(self) -> None:
        """In the part where the others are, what they went through counts."""
        others = self._others
        if others is None or others.part != self._at.part:
            return
        if self._catches_up:
            self._at, self._had, self._catches_up = others, 0, False
        else:
            self._at = replace(self._at, ended_at=others.ended_at)
