"""How a run behaves, but for what it keeps."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

from elastickpt.errors import Refused
from elastickpt.ranks.team import require_limit
from elastickpt.runs.due import Every, YoungDaly
from elastickpt.runs.events import RestoreEvent, SaveEvent
from elastickpt.runs.preemption import SIGNALS
from elastickpt.saving.request import DEFAULT, AsyncOptions, PlacementChoice, Replicas, Request
from elastickpt.storage.store import Durability

_LEAST_LOSS = YoungDaly(6 * 3600.0)


class Watcher(Protocol):
    """Who is told of saves and restores, as `prometheus.RunMetrics` is; by a thread of the run, never by training."""

    def saved(self, event: SaveEvent) -> None: ...

    def restored(self, event: RestoreEvent) -> None: ...


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a `Run`; the same on all ranks.

    Attributes:
        due: When `Run.due` says so; by default at the interval that loses least, from what saves are measured to cost and a
            mean time between failures of 6 hours, corrected by the failures seen.
        saving: How saves beside training go.
        durability: As `save` takes it.
        replicas: As `save` takes it.
        placement: As `save` takes it.
        take_over: Whether `restore` also takes the run from a job that lives.
        orphans_s: How many seconds `restore` waits for what writers of an earlier job of this run have staged.
        wait_limit_s: For how many seconds ranks that come later to `restore`, to a rollback or to the making of the run are
            waited for while their processes live; by default as long as a collective of the process group waits.
        signals: Those that announce the end of the process, and how many seconds later it comes.
        watchers: Who is told of saves and restores, on rank 0.
        trace: A folder for traces of all ranks, "" for none.

    Raises:
        Refused: A value means nothing.

    Examples:
        >>> options = ek.RunOptions(due=ek.Every(seconds=600), saving=ek.AsyncOptions(arenas=2), trace="traces")
    """

    due: Every | YoungDaly = _LEAST_LOSS
    saving: AsyncOptions = DEFAULT
    durability: Durability = "power"
    replicas: Replicas = "owner"
    placement: PlacementChoice = "auto"
    take_over: bool = False
    orphans_s: float = 60.0
    wait_limit_s: float | None = None
    signals: Mapping[signal.Signals, float] = field(default_factory=lambda: dict(SIGNALS))
    watchers: tuple[Watcher, ...] = ()
    trace: str = ""

    def __post_init__(self) -> None:
        if not (isfinite(self.orphans_s) and self.orphans_s >= 0):
            raise Refused(f"RunOptions orphans_s={self.orphans_s!r}: expected seconds from 0 on")
        require_limit("RunOptions wait_limit_s", self.wait_limit_s)

    def request(self, place: str, step: int | None) -> Request:
        """What a run asks of a save at `place`."""
        return Request(place, step, self.placement, self.durability, self.replicas)
