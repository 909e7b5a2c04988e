"""What happens at which step, where clocks and notices decide it: rank 0 publishes, all ranks read. [RUN-90..97]

    rank 0, having completed step s      publishes at most one word for step s + 2
    every rank, having completed step t  looks for the word of step t; it stands there, if ever, since rank 0 completed t - 2

Words: "save" is due; "last", a save is due and the job ends after this step; "end", the job ends without a save.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from elastickpt.runs.due import Every, Measured, YoungDaly, decide_step, due, interval_s
from elastickpt.runs.preemption import LastStep, Notice, decide_ending


class NoticeBoard(Protocol):
    """Where words are published; what one rank sets, every rank finds."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, *, timeout_s: float) -> bytes: ...

    def has(self, key: str) -> bool: ...


class LocalBoard:
    """The board of a job with one process."""

    def __init__(self) -> None:
        self._words: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._words[key] = value

    def get(self, key: str, *, timeout_s: float) -> bytes:
        return self._words[key]

    def has(self, key: str) -> bool:
        return key in self._words


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What this step brings."""

    saves: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class SaveTimes:
    """What this rank knows of its saves: how long one takes from its begin until it is committed, and how many are not yet."""

    took_s: float
    under_way: int


class Calendar:
    """One rank's view. `decided` is called once for each completed step, rising, by the thread that trains."""

    def __init__(self, board: NoticeBoard, rule: Every | YoungDaly, *, member: int, members: int) -> None:
        self._board, self._rule, self._member, self._members = board, rule, member, members
        self._published: set[int] = set()
        self._told_notice = False
        self._ending: LastStep | None = None
        self._stepped_at: float | None = None
        self._step_s = 0.0
        self._saved_at = time.monotonic()

    def saved(self) -> None:
        """A save was begun now."""
        self._saved_at = time.monotonic()

    def decided(self, step: int, *, notice: Notice | None, measured: Measured, saves: SaveTimes) -> StepDecision:
        """What `step`, which is completed, brings; on rank 0 also decides for a later one."""
        now = time.monotonic()
        if self._stepped_at is not None:
            self._step_s = now - self._stepped_at
        self._stepped_at = now
        self._pass_on(notice, now)
        if self._member == 0:
            self._decide(step, now, notice, measured, saves)
        word = self._word(step)
        self._published.discard(step)
        return StepDecision(
            saves=word in ("save", "last") or (word == "" and due(self._rule, step=step, published=())),
            ends=word in ("last", "end"),
        )

    def _word(self, step: int) -> str:
        key = f"step/{step}"
        return self._board.get(key, timeout_s=10.0).decode() if self._board.has(key) else ""

    def _pass_on(self, notice: Notice | None, now: float) -> None:
        """What this rank noticed reaches rank 0."""
        if notice is not None and self._member != 0 and not self._told_notice:
            self._board.set(f"notice/{self._member}", str(notice.left_s(now)).encode())
            self._board.set("noticed", b"")
            self._told_notice = True

    def _left_s(self, notice: Notice | None, now: float) -> dict[int, float]:
        left = {} if notice is None else {0: notice.left_s(now)}
        if self._board.has("noticed"):
            for member in range(1, self._members):
                if self._board.has(f"notice/{member}"):
                    left[member] = float(self._board.get(f"notice/{member}", timeout_s=10.0))
        return left

    def _decide(self, step: int, now: float, notice: Notice | None, measured: Measured, saves: SaveTimes) -> None:
        if self._ending is not None:
            return
        ending = decide_ending(
            self._left_s(notice, now), step=step, step_s=self._step_s, save_s=saves.took_s, due=self._published
        )
        if ending is not None:
            self._board.set(f"step/{ending.step}", b"last" if ending.saves else b"end")
            self._ending = ending  # it holds once it is published
            return
        interval = interval_s(self._rule, measured)
        if interval is None or saves.under_way:
            return
        later = decide_step(
            step=step,
            since_save_s=now - self._saved_at,
            step_s=self._step_s,
            interval_s=max(interval, 2 * saves.took_s),  # the next one should not meet the one before
            published=self._published,
        )
        if later is not None:
            self._board.set(f"step/{later}", b"save")
            self._published.add(later)

    @property
    def ending(self) -> LastStep | None:
        """On rank 0: what was decided about the end of the job, and why."""
        return self._ending
