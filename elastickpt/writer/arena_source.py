"""The bytes of slices in an arena that its trainer may still be filling: they are taken once they are there.

[SAVE-102, SAVE-103]
"""

from __future__ import annotations

import threading
import time

from elastickpt.errors import DeadlineExceeded, RankLost
from elastickpt.writer.arena import Arena
from elastickpt.writer.portions import Slice
from elastickpt.writer.priority import lower
from elastickpt.writer.write_files import Bytes, Watch

LOOK_S = 0.001  # what is copied meanwhile is a part of a unit
GIVE_WAY = 10  # niceness of who writes while the trainer copies, which training waits for
STILL_S = 120.0  # a trainer that fills nothing for so long was stopped; its save must not keep the others for ever


class ArenaSource:
    """A `carry.Source`. `watch` ends a wait, too, by raising."""

    def __init__(self, arena: Arena, watch: Watch, *, still_s: float = STILL_S) -> None:
        self._arena, self._watch, self._still_s = arena, watch, still_s
        self._filled = 0
        self._looking = threading.Lock()
        self._maker = threading.get_ident()
        self._of_thread = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes in place. Blocking until the trainer has copied them. Raises RankLost if it ended before,
        DeadlineExceeded if it stands still, and what `watch` raises."""
        first, end = at.offset + start - at.start, at.offset + stop - at.start
        if self._filled < end and self._arena.filled < end:
            self._give_way()
            with self._looking:
                self._wait(end)
        return self._arena.memory[first:end]

    def _give_way(self) -> None:
        """Threads that write for this save alone leave the processor to the trainer; what is lowered cannot be raised again."""
        if threading.get_ident() != self._maker and not hasattr(self._of_thread, "gave_way"):
            self._of_thread.gave_way = True
            lower(GIVE_WAY, "normal")

    def _wait(self, end: int) -> None:
        since = time.monotonic()
        while self._filled < end:
            abandoned = self._arena.abandoned  # seen before what it had filled by then
            found = self._arena.filled
            if found > self._filled:
                self._filled, since = found, time.monotonic()
            elif abandoned:
                raise RankLost("the trainer ended before it had staged the rest")
            elif time.monotonic() - since > self._still_s:
                raise DeadlineExceeded(f"nothing was staged for {self._still_s:g} s: {found} bytes are, {end} are needed")
            else:
                self._watch(0)
                time.sleep(LOOK_S)
