"""What the ranks of a job tell the one who watches, in order: a save has begun, was acknowledged or has failed, is over; the
rank has ended."""

from __future__ import annotations

import os
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

_RECORD = struct.Struct("<iiidq")

Kind = Literal["begun", "acknowledged", "failed", "ended", "over"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Event:
    """`at`: monotonic time, one clock for all processes; `position`: length of the block log then, 0 without one."""

    rank: int
    kind: Kind
    step: int
    at: float
    position: int


class Teller:
    """A rank's end. Small records into a named pipe arrive whole, whoever is killed."""

    def __init__(self, pipe: Path, rank: int, log: Path | None = None) -> None:
        self._descriptor = os.open(pipe, os.O_WRONLY)
        self._rank, self._log = rank, log

    def tell(self, kind: Kind, step: int) -> None:
        """Blocks only while the watcher is 64 KiB behind."""
        position = self._log.stat().st_size if self._log else 0
        os.write(self._descriptor, _RECORD.pack(self._rank, _KINDS.index(kind), step, time.monotonic(), position))


class Watcher:
    """The watcher's end, which makes the pipe; all events are in `seen`."""

    def __init__(self, pipe: Path) -> None:
        os.mkfifo(pipe)
        self._descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self.seen: list[Event] = []

    def wait(self, kind: Kind, ranks: frozenset[int], step: int | None, until: float) -> bool:
        """Whether each of `ranks` has told of `kind` (and of this step, if one is given) before the monotonic time `until`.

        False at once where one of them has ended without.
        """
        while True:
            self.take()
            told = {event.rank for event in self.seen if event.kind == kind and step in (None, event.step)}
            if ranks <= told:
                return True
            ended = {event.rank for event in self.seen if event.kind == "ended"}
            left = until - time.monotonic()
            if left <= 0 or (ranks - told) & ended:
                return False
            select.select([self._descriptor], [], [], left)

    def take(self) -> None:
        """Take in what was told so far, without waiting."""
        while select.select([self._descriptor], [], [], 0)[0]:
            data = os.read(self._descriptor, _RECORD.size * 1024)
            for rank, kind, step, at, position in _RECORD.iter_unpack(data):
                self.seen.append(Event(rank, cast("Kind", _KINDS[kind]), step, at, position))

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._descriptor)
