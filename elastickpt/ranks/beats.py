"""The thread that says for every team at work that this process lives. One for all teams; it ends with the last of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from elastickpt.ranks.team import BEAT_S

LINGERS_S = 3.0  # after the last round it still looks about by itself, so that a round which begins need not wake it


class Beating(Protocol):
    """A team at work."""

    def beat(self) -> None:
        """Says to its peers that this process lives. Not blocking, from any thread."""
        ...


class Heart:
    """Who is at work, and the thread that beats for them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nobody is at work, and there is no thread."""
        self._changed = threading.Condition()
        self._at_work: set[Beating] = set()
        self._teams = 0
        self._thread: threading.Thread | None = None
        self._asleep = False

    def joined(self) -> None:
        """There is one team more."""
        with self._changed:
            self._teams += 1

    def left(self) -> None:
        """A team has ended. With the last one the thread does."""
        with self._changed:
            self._teams -= 1
            self._changed.notify_all()

    @contextmanager
    def at_work(self, team: Beating) -> Iterator[None]:
        """Beats for this team meanwhile."""
        with self._changed:
            self._at_work.add(team)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="elastickpt-beat", daemon=True)
                self._thread.start()
            elif self._asleep:
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._at_work.discard(team)

    def _beat(self) -> None:
        worked_at = time.monotonic()
        while True:
            with self._changed:
                if self._teams <= 0 and not self._at_work:
                    self._thread = None
                    return
                self._asleep = not self._at_work and time.monotonic() - worked_at > LINGERS_S
                self._changed.wait(None if self._asleep else BEAT_S)
                self._asleep = False
            if self._beat_once():
                worked_at = time.monotonic()

    def _beat_once(self) -> bool:
        """Whether anybody was at work. Afterwards no team is held here: one that ends must go."""
        with self._changed:
            teams = tuple(self._at_work)
        for team in teams:
            team.beat()
        return bool(teams)


HEART = Heart()


def _forked() -> None:
    HEART.begin()  # a child has none of its parent's threads and teams


os.register_at_fork(after_in_child=_forked)
