"""The waits that a job has ordered, until they are over. No I/O."""

from __future__ import annotations

from elastickpt.elastic.job import Wait


class Waits:
    """Of one view. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._ordered: list[tuple[float, float, Wait]] = []

    def begin(self, wait: Wait, now: float, limit_s: float) -> None:
        self._ordered.append((now + limit_s, limit_s, wait))

    @property
    def ends(self) -> list[float]:
        """When each is over."""
        return [at for at, _, _ in self._ordered]

    def over(self, now: float, *, coming: bool) -> list[Wait]:
        """Those that are over now, and are so once. While a process is `coming`, a wait for one begins anew."""
        due = [one for one in self._ordered if now >= one[0]]
        self._ordered = [one for one in self._ordered if now < one[0]]
        for _, limit_s, wait in due:
            if wait.of == "spare" and coming:
                self.begin(wait, now, limit_s)
        return [wait for _, _, wait in due if wait.of != "spare" or not coming]
