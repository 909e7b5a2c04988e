"""What a member is at, whether it moves, and how long that took: what its beats tell the coordinator. [REC-32, REC-33]"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from elastickpt.elastic.messages import Beat
from elastickpt.errors import Refused


class Progress:
    """`beat` is for the thread that sends beats, the rest for the one that trains."""

    def __init__(self) -> None:
        self._own: str | None = None  # the phase of its own code, where the user declares none; None: it waits for others
        self._declared: list[tuple[str, float | None]] = []
        self._moving = threading.Lock()  # of what a beat takes with it
        self._count, self._moved_at = 0, time.monotonic()
        self._longest: dict[str, float] = {}  # times between two moves, since the last beat

    @contextmanager
    def declared(self, name: str, limit_s: float | None) -> Iterator[None]:
        """Within a phase that the user declares. Raises Refused for a limit that is not above 0."""
        if limit_s is not None and not limit_s > 0:
            raise Refused(f"phase {name!r}: limit_s={limit_s!r}: expected seconds above 0")
        self.moves()
        self._declared.append((name, limit_s))
        try:
            yield
        finally:
            self.moves()
            self._declared.pop()

    @contextmanager
    def working(self, phase: str | None) -> Iterator[None]:
        """In its own code: in this phase where none is declared, "" for one without a limit; None: it waits for others."""
        self.moves()
        before, self._own = self._own, phase
        try:
            yield
        finally:
            self.moves()
            self._own = before

    def moves(self) -> None:
        """Something moved in the phase that it is in. Cheap."""
        (phase, limit_s), now = self._phase, time.monotonic()
        with self._moving:
            if phase and limit_s is None:
                self._longest[phase] = max(now - self._moved_at, self._longest.get(phase, 0.0))
            self._count, self._moved_at = self._count + 1, now

    def beat(self) -> Beat:
        """What is to be told now; the longest times are told once."""
        (phase, limit_s), own = self._phase, self._own is not None
        with self._moving:
            longest, self._longest = tuple(self._longest.items()), {}
            return Beat(phase, self._count, limit_s, own, longest)

    @property
    def _phase(self) -> tuple[str, float | None]:
        name, limit_s = self._declared[-1] if self._declared else ("", None)
        return name or self._own or "", limit_s
