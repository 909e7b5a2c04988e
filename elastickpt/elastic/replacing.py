"""How many processes are started in place of those that ended. No I/O. [REC-34]"""

from __future__ import annotations

from dataclasses import dataclass

from elastickpt.elastic.limits import FRUITLESS


@dataclass
class Replacing:
    """`workers` are kept alive; `left` more may be started over the job. After FRUITLESS in a row that ended before they joined
    no more are: the next one would not fare better."""

    workers: int
    left: int
    fruitless: int = 0
    ordered: int = 0  # to be started, and not started yet

    def order(self, alive: int) -> int:
        """How many are to be started now, while so many live."""
        if self.fruitless >= FRUITLESS:
            return 0
        count = min(max(0, self.workers - alive - self.ordered), self.left)
        self.ordered += count
        self.left -= count
        return count

    def started(self) -> None:
        self.ordered = max(0, self.ordered - 1)

    def joined(self) -> None:
        self.fruitless = 0

    def ended_unjoined(self) -> None:
        self.fruitless += 1
