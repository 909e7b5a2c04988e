"""What the coordinator knows of each worker: whether it lives, what it is at, and who stands still. No I/O. [REC-30..33]"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from elastickpt.elastic.limits import PhaseTimes
from elastickpt.elastic.messages import Beat, Join, Quit
from elastickpt.elastic.recovery import Why


@dataclass
class Worker:
    """One process, from its start until it was reaped. `pid` is 0 until it is known; `who` is None until it has joined.

    `managed`: a launcher reaps it. `heard_at` is its last sign of life, `moved_at` its last progress. `ending` is why it is
    being ended, and `ends_at` when it is killed, if it has not ended by then.
    """

    uid: str
    managed: bool
    started_at: float
    pid: int = 0
    who: Join | None = None
    heard_at: float = 0.0
    beat: Beat = field(default_factory=lambda: Beat("", 0))
    moved_at: float = 0.0
    quit: Quit | None = None
    ending: Why | None = None
    ends_at: float | None = None
    killed: bool = False
    connected: bool = True

    def heard(self, now: float) -> None:
        if self.ending is None:
            self.heard_at = now

    def beats(self, beat: Beat, now: float, history: PhaseTimes) -> None:
        """Takes in what it is at, and for the history how long its phases took to move."""
        for phase, seconds in beat.longest:
            history.note(phase, seconds, now=now)
        if beat.count != self.beat.count:
            self.moved_at = now
        self.beat = beat

    def ends(self, why: Why, at: float) -> None:
        """It is being ended, if it is not already."""
        if self.ending is None:
            self.ending, self.ends_at = why, at

    def in_words(self, why: Why, signal: int | None) -> str:
        by = f", signal {signal}" if signal is not None else ""
        return f"worker {self.uid}, process {self.pid}: {why}{by}"


def silent_at(workers: Iterable[Worker], limit_s: float) -> Iterator[tuple[float, Worker]]:
    """When each that has joined will have sent nothing for as long as the limit, if nothing comes."""
    for worker in workers:
        if worker.who is not None and worker.connected and worker.ending is None:
            yield worker.heard_at + limit_s, worker


def due_at(workers: Iterable[Worker], limit_s: float) -> list[float]:
    """When something is to be done about a worker: who is being ended is killed, who is silent is ended."""
    known = list(workers)
    return [one.ends_at for one in known if one.ends_at] + [at for at, _ in silent_at(known, limit_s)]


def stalled(members: Iterable[Worker], now: float, history: PhaseTimes) -> tuple[list[Worker], bool]:
    """Who stands still in its own code for longer than its phase's limit, and whether anybody at all stands still for so long.

    Who waits for others is not to blame. Nobody is, where all wait for each other.
    """
    late = [
        worker
        for worker in members
        if worker.beat.phase and now - worker.moved_at > (worker.beat.limit_s or history.limit_s(worker.beat.phase))
    ]
    return [worker for worker in late if worker.beat.own or worker.beat.limit_s is not None], bool(late)
