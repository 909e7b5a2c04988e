"""How many processes are started in place of those that ended. No I/O. [REC-34]"""

from __future__ import annotations

from dataclasses import dataclass

from elastickpt.elastic.limits import FRUITLESS


@dataclass
class Replacing:
    """`workers` are kept alive; `left` more may be started, None for no limit. After FRUITLESS in a row that ended before they
    joined no more are: the next one would not fare better."""

    workers: int
    left: int | None
    fruitless: int = 0

    def wanted(self, alive: int) -> int:
        """How many to start while so many live."""
        if self.fruitless >= FRUITLESS:
            return 0
        missing = max(0, self.workers - alive)
        return missing if self.left is None else min(missing, self.left)

    def replaced(self, count: int) -> None:
        if self.left is not None:
            self.left -= count

    def joined(self) -> None:
        self.fruitless = 0

    def ended_unjoined(self) -> None:
        self.fruitless += 1
