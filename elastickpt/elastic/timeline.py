"""When what happened in a recovery, and the Recovery that is told of it. Times are of one monotonic clock, in seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import msgspec

from elastickpt.elastic.job import Loss, Recovered
from elastickpt.elastic.messages import Commit, StageSource
from elastickpt.elastic.recovery import Considered, From, Lost, MendedBy, Moved, Recovery, Seconds, is_approximate


@dataclass
class Timeline:
    """Of the recovery under way: from the first loss until the first microbatch of what runs next. [REC-42]"""

    alive_at: float | None = None  # the last sign of life of what was lost first
    detected_at: float | None = None
    unblocked_at: float | None = None
    formed_at: float | None = None
    pids: dict[str, int] = field(default_factory=dict)
    considered: tuple[Considered, ...] = ()
    moved: int = 0
    read: int = 0

    def lost(self, uid: str, pid: int, *, alive_at: float, now: float) -> None:
        """A place is lost; of several, the first one's sign of life counts, and the last one's detection."""
        self.alive_at = alive_at if self.alive_at is None else min(self.alive_at, alive_at)
        self.detected_at = now
        self.pids[uid] = pid

    def viewed(self) -> None:
        """A view is out: what was reached of the one before counts no more."""
        self.unblocked_at = self.formed_at = None
        self.considered, self.moved, self.read = (), 0, 0

    def since(self, at: float | None) -> float | None:
        return None if at is None or self.alive_at is None else max(0.0, at - self.alive_at)

    def recovery(self, order: Recovered, *, epoch: int, now: float, time: float) -> Recovery:
        """What is known when every place stands."""
        sources = {source.stage: source for source in order.sources}
        lost = tuple(self._lost(loss, sources) for loss in sorted(order.failed, key=lambda one: one.stage))
        rung, source = (lost[0].rung, lost[0].source) if lost else ("replay", From(()))
        seconds = Seconds(*(self.since(at) for at in (self.detected_at, self.unblocked_at, self.formed_at, now)))
        return Recovery(
            *(time, epoch, order.generation, order.step, order.decision, lost, rung),
            is_approximate(lost),
            *(source, self.considered, seconds, Moved(self.moved, self.read)),
        )

    def _lost(self, loss: Loss, sources: Mapping[int, StageSource]) -> Lost:
        rung, source = mended_by(sources.get(loss.stage))
        pid = self.pids.get(loss.uid, 0)
        return Lost(loss.stage, loss.uid, pid, loss.why, loss.signal, rung, source, loss.traceback)


class Recoveries:
    """The recovery that is under way, and the one that is complete and not told yet. `clock_offset` makes times since 1970."""

    def __init__(self, clock_offset: float) -> None:
        self._offset = clock_offset
        self.timeline = Timeline()
        self.untold: Recovery | None = None
        self._told_of = self.timeline
        self._reached: set[str] = set()
        self._begun: list[tuple[int, int, float]] = []  # recoveries of the last two steps: step, generation, seconds
        self.survivors: frozenset[str] = frozenset()  # who held a place when all stood last

    def complete(self, order: Recovered, epoch: int, now: float) -> None:
        """Every place stands. Losses from now on are of another recovery."""
        self.untold = self.timeline.recovery(order, epoch=epoch, now=now, time=now + self._offset)
        self._told_of, self.timeline, self._reached = self.timeline, Timeline(), set()

    def unblocked(self, uid: str, now: float) -> None:
        """Nothing of an older view holds this member any more; who is new has nothing to be held by."""
        if uid in self.survivors:
            self.timeline.unblocked_at = now

    def reached(self, uid: str, members: Collection[str], now: float) -> Recovery | None:
        """A member begins what runs next; what is to be told, once all do."""
        self._reached.add(uid)
        if self.untold is None or not self._reached >= set(members):
            return None
        seconds = self._told_of.since(now)
        if seconds is not None:
            self.untold = self.untold.begun(seconds)
            step = self.untold.step
            self._begun = [one for one in self._begun if one[0] >= step - 1] + [(step, self.untold.generation, seconds)]
        return self.given_up()

    def said_in(self, commit: Commit) -> Commit:
        """With when what ran after a recovery began, of those recoveries that a report of this step names."""
        begun = tuple((generation, seconds) for step, generation, seconds in self._begun if step <= commit.step)
        return msgspec.structs.replace(commit, begun=begun)

    def given_up(self) -> Recovery | None:
        """What is to be told as it is: nothing more becomes known of it."""
        told, self.untold = self.untold, None
        return told


def mended_by(source: StageSource | None) -> tuple[MendedBy, From]:
    """How a place was mended: by its source, or by a replay where it needed none."""
    if source is None:
        return "replay", From(())
    if source.rung in ("stale", "rollback"):
        return source.rung, From(path=source.path, step=source.step)
    return source.rung, From(source.stages, source.alpha)
