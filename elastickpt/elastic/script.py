"""Where in the user's script a member is, and where others are: who took a place goes through the script up to there, and so
does who was interrupted when others were further already. [REC-61]

A script has parts: 0 before its first loop of steps, 1 within that, 2 behind it, 3 within the second one, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Position:
    """In `part`, after `step`, which was taken in part `since`, or to which all rolled back when this member was in it.

    `values`: what evaluations came to since then, in their order, `before` of them before the newest loop ended; that was after
    `ended_at` steps. `met`: where the others are is known. It is not after a rollback: where those go on whose loop was at the
    report of a step that is gone, shows in the first call that all make.
    """

    part: int = 0
    since: int = 0
    step: int = 0
    values: tuple[float, ...] = ()
    before: int = 0
    ended_at: int = 0
    met: bool = True

    @property
    def within(self) -> bool:
        """Whether that is within a loop."""
        return self.part % 2 == 1

    def further(self, other: Position | None) -> Position:
        """The one of both, after the same step, that is further in the script."""
        return self if other is None or (self.part, len(self.values)) >= (other.part, len(other.values)) else other

    def rolled_back(self, step: int) -> Position:
        """The same part, after an earlier step. What was evaluated within the loop belonged to steps that come once more; what
        was evaluated behind it stays."""
        values = () if self.within else self.values[self.before :]
        return replace(self, since=self.part, step=step, values=values, before=0, met=False)

    def stepped(self, step: int) -> Position:
        """The next step is taken; behind a loop that is one of the way back to its end."""
        return (
            Position(self.part, self.part, step, ended_at=self.ended_at) if self.within else replace(self, step=step, met=True)
        )


class Script:
    """Of one member: its position, and the furthest one of all when they stood last."""

    def __init__(self) -> None:
        self._at = Position()
        self._others: Position | None = None
        self._had = 0  # of the values, by this member
        self._catches_up = False  # to where others were before all rolled back

    @property
    def furthest(self) -> Position:
        """That this member knows of."""
        return self._at.further(self._others)

    @property
    def position(self) -> Position:
        return self._at

    @property
    def part(self) -> int:
        return self._at.part

    @property
    def within(self) -> bool:
        return self._at.within

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
            self._at = replace(self._at, step=step, since=others.since, values=others.values, met=others.met)
        elif others is told:
            self._at = replace(self._at, values=told.values, met=told.met)
        elif self._at.part == others.part:
            self._had = 0 if self._at.within else max(0, self._had - self._at.before)
            self._at = others
        else:
            self._at = replace(self._at, step=step, values=told.values, met=False)
            self._catches_up = True
        self._join()

    def meet(self, furthest: Position) -> None:
        """All members have told where they are, as each of them was to make its next call with the others."""
        self._at, self._others = replace(self._at, met=True), replace(furthest, met=True)
        self._join()

    def begin_loop(self) -> int:
        """A loop of steps begins. Returns its part."""
        self._at = replace(self._at, part=self._at.part + (2 if self._at.within else 1))
        self._join()
        return self._at.part

    def end_loop(self, part: int, step: int) -> None:
        """The loop of this part ends, if it has not ended yet."""
        if self._at.part == part:
            self._at = replace(self._at, part=part + 1, before=self._had, ended_at=step)
            self._join()

    def stepped(self, step: int) -> None:
        """The next step is taken, by all."""
        if self._at.within:
            self._had = 0
        self._at, self._others, self._catches_up = self._at.stepped(step), None, False

    def known(self) -> float | None:
        """What the next evaluation came to, if others have had it without this member; it has had it then."""
        if self.is_passed_over or self._had == len(self._at.values):
            return None
        self._had += 1
        return self._at.values[self._had - 1]

    def evaluated(self, value: float) -> None:
        """All members have evaluated, with this result."""
        self._at = replace(self._at, values=(*self._at.values, value))
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
