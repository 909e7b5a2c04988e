"""From the end of a job until nobody of it is left: who has how long to leave, and what the job has come to. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from elastickpt.elastic.enlisting import Stopped
from elastickpt.elastic.limits import PARTING_S
from elastickpt.elastic.messages import End
from elastickpt.elastic.workers import Worker


@dataclass(frozen=True, slots=True)
class Departure:
    """`end` is what the members were told; `spoilt` what became of a process that had done its part. [REC-45]"""

    end: End
    spoilt: str = ""

    def begin(self, workers: Iterable[Worker], now: float) -> None:
        """Who has not joined is not needed any more. After a good end workers have all the time that their script takes; else
        they have a stated one."""
        for worker in workers:
            if worker.who is None:
                worker.ends_at = now
            elif self.end.code != 0:
                worker.ends_at = min(worker.ends_at or now + PARTING_S, now + PARTING_S)

    def left(self, said: Stopped) -> Departure:
        """A process that had joined has ended."""
        if self.end.code != 0 or self.spoilt or said.killed or (said.signal is None and said.code in (None, 0)):
            return self
        how = f"exit code {said.code}" if said.signal is None else f"signal {said.signal}"
        return replace(self, spoilt=f"{self.end.message}; worker {said.uid} ended by {how} afterwards")

    @property
    def outcome(self) -> End:
        return End(1, "", self.spoilt) if self.spoilt else self.end
