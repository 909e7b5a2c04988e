"""One process of a job that saves over and over is killed at a random moment of a save; what is left is judged by loading it.

A kill is drawn from (seed, number): whom, in which save, at which share of the time that the save before it took. The same
number draws the same kill again, and for all contestants the same one; those that start no process lose the rank instead whose
helper the others lose. Where in the save it strikes is up to the machine.

Behind a helper's death all ranks live, and the job goes on: a save that fails is followed by one more try.
"""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import cast

from elastickpt.errors import CheckpointError
from tools.gloo_ranks import Outcome as Ended
from tools.gloo_ranks import Ranks, run_ranks, spawn_ranks

from .entrants import Entrant, Role
from .events import Event, Watcher
from .events import Kind as EventKind
from .job import Saves, look, train_and_save
from .judge import Judgement, Seen, judge, promised
from .processes import helpers_of, orphans_ended, stack_of
from .records import Case

STEPS = (1, 2, 3, 4, 5)
SPARE = (6,)  # where the job goes on after a failed save
STRUCK = (3, 4)  # the saves in which kills fall: some stand before them, and training goes on behind
HELPERS = 1 / 3  # of the kills; of the others half each are for the committer and for another rank
LATEST = 1.1  # of a save's time: a tenth of the kills comes after it
START_LIMIT_S = 90.0  # for a job to come to the save that it is killed in; some start a process for each rank first
READER_LIMIT_S = 30.0
_FOLDERS = re.compile(
    r"""(?:/[^\s/:,"']+)+/(?=[^\s/:,"']+\.(?:py|cc|cpp|h)\b)"""
)  # of source files: where they are says nothing


@dataclass(frozen=True, slots=True)
class Setting:
    """`folder` on the file system that is saved to; `limit_s`: how long after the kill survivors have to return."""

    folder: Path
    ranks: int
    seed: int
    scale: int = 8
    limit_s: float = 20.0
    settle_s: float = 3.0

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.ranks} ranks, {self.scale * 1.1:.1f} MB, survivors have {self.limit_s:g} s to return"


@dataclass(frozen=True, slots=True)
class Draw:
    """One kill. `share`: of the save's usual time, after it has begun."""

    number: int
    role: Role
    rank: int
    step: int
    share: float

    def __str__(self) -> str:
        whom = f"a helper of rank {self.rank}" if self.role == "helper" else f"rank {self.rank}"
        return f"{whom} killed at {self.share:.0%} of the save of step {self.step}"


def draw(entrant: Entrant, setting: Setting, number: int) -> Draw:
    """The kill of that number; the contestant decides only whether there is a helper to kill."""
    chance = random.Random(f"{setting.seed}/{number}")
    is_helper = chance.random() < HELPERS
    rank = chance.choice((0, chance.randrange(1, setting.ranks))) if setting.ranks > 1 else 0
    step, share = chance.choice(STRUCK), chance.uniform(0, LATEST)
    role: Role = "helper" if is_helper and "helper" in entrant.roles else "trainer" if rank else "committer"
    return Draw(number, role, rank, step, share)


def kill_once(entrant: Entrant, setting: Setting, kill: Draw) -> Case | None:
    """The kill, its judgement, and the next save; None where it came too late to strike. Blocks: 1 s to a minute.

    Raises RuntimeError where the contestant cannot save at all.
    """
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix=f"kill-{kill.number}-") as top:
        place = Place(Path(top), entrant, setting)
        with _Job(place, STEPS) if kill.role != "helper" else _Job(place, STEPS + SPARE, forgiven=1) as job:
            with orphans_ended(setting.settle_s):
                struck_at = _strike(job, kill)
                late = job.await_survivors(kill, setting.limit_s)
                ended = job.ranks.wait()
            begun, acknowledged = job.steps()
        if struck_at is None or (kill.role != "helper" and ended[kill.rank].status != -signal.SIGKILL):
            return None
        found = place.look()
        judgement = judge(found, promised(begun, acknowledged, entrant.keeps))
        if late and judgement.outcome not in ("silently wrong", "lost"):
            stack = stack_of(ended[late[0]].output, "train_and_save")
            judgement = Judgement("hang", f"{_ranks(late)} had not returned {setting.limit_s:g} s after: {stack}")
        newest = max((seen.step or 0 for seen in found or () if seen.verdict == "whole"), default=0)
        same_job = job.next_save(struck_at, late, ended) if kill.role == "helper" else None
        next_save = _next_save(place, newest + 1)
        return Case(kill.number, kill.role, str(kill), judgement.outcome, judgement.detail, next_save, same_job)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one kill takes place: a folder of its own."""

    top: Path
    entrant: Entrant
    setting: Setting

    @property
    def folder(self) -> str:
        """Where the contestant saves."""
        found = self.top / "checkpoints"
        found.mkdir(exist_ok=True)
        return str(found)

    def look(self) -> tuple[Seen, ...] | None:
        """What a fresh process finds; None if it hangs or dies."""
        try:
            (seen,) = run_ranks(look, 1, self.entrant.name, self.folder, self.setting.scale, timeout_s=READER_LIMIT_S)
        except CheckpointError:
            return None
        return cast("tuple[Seen, ...]", seen)


class _Job:
    """Ranks that save, watched. As a context it ends with the ranks.

    `number`: 0, or 1 for those that go on after it; `forgiven`: so many failed saves do not end it.
    """

    def __init__(self, place: Place, steps: tuple[int, ...], number: int = 0, forgiven: int = 0) -> None:
        pipe = place.top / f"pipe-{number}"
        self.watcher = Watcher(pipe)
        setting = place.setting
        plan = Saves(place.entrant.name, place.folder, steps, str(pipe), job=number, scale=setting.scale, forgiven=forgiven)
        if forgiven:  # one rank's save may fail at once and another's only at the limit: the first waits for it
            plan = replace(plan, meeting_s=setting.limit_s)
        timeout_s = START_LIMIT_S + (1 + forgiven) * setting.limit_s
        self.ranks: Ranks = spawn_ranks(train_and_save, setting.ranks, plan, timeout_s=timeout_s)

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ranks.__exit__(kind, error, trace)
        self.watcher.close()

    def at(self, kind: str, step: int) -> float:
        """When rank 0 told of it."""
        self.watcher.take()
        return next(event.at for event in self.watcher.seen if (event.rank, event.kind, event.step) == (0, kind, step))

    def steps(self) -> tuple[list[int], list[int]]:
        """The steps whose saves have begun on any rank, and those that rank 0 was told are saved."""
        self.watcher.take()
        seen: list[Event] = self.watcher.seen
        begun = [event.step for event in seen if event.kind == "begun"]
        return begun, [event.step for event in seen if event.kind == "acknowledged" and event.rank == 0]

    def await_survivors(self, kill: Draw, limit_s: float) -> list[int]:
        """Those that did not return; they have been told to dump their stacks and end.

        Where all live they have the limit for the save that was struck, and then once more.
        """
        everyone = frozenset(range(len(self.ranks.pids)))
        if kill.role != "helper":
            return self._late("ended", everyone - {kill.rank}, None, limit_s)
        return self._late("over", everyone, kill.step, limit_s) or self._late("ended", everyone, None, limit_s)

    def next_save(self, struck_at: float, late: list[int], ended: tuple[Ended, ...]) -> str | None:
        """Why none of the saves that began behind that moment was acknowledged on all ranks, "" if one was.

        None where none was to come any more.
        """
        began = {event.step for event in self.watcher.seen if event.kind == "begun"}
        later = began - {event.step for event in self.watcher.seen if event.kind == "begun" and event.at <= struck_at}
        told = {(event.rank, event.step) for event in self.watcher.seen if event.kind == "acknowledged"}
        if any(all((rank, step) in told for rank in range(len(ended))) for step in later):
            return ""
        if late:
            return f"{_ranks(late)} had not returned"
        return _failure(ended) or None

    def _late(self, kind: EventKind, ranks: frozenset[int], step: int | None, limit_s: float) -> list[int]:
        until = time.monotonic() + limit_s
        late = [rank for rank in sorted(ranks) if not self.watcher.wait(kind, frozenset({rank}), step, until)]
        ended = {event.rank for event in self.watcher.seen if event.kind == "ended"}
        late = [rank for rank in late if rank not in ended]
        for rank in late:
            self.ranks.send_signal(rank, signal.SIGABRT)
        return late


def _strike(job: _Job, kill: Draw) -> float | None:
    """Waits for the moment and kills; when that was, None where there was nobody to kill."""
    if not job.watcher.wait("begun", frozenset({0}), kill.step, time.monotonic() + START_LIMIT_S):
        raise RuntimeError(f"no save of step {kill.step} has begun: {_failure(job.ranks.wait())}")
    usual_s = job.at("acknowledged", kill.step - 1) - job.at("begun", kill.step - 1)
    helpers = helpers_of(job.ranks.pids[kill.rank]) if kill.role == "helper" else []
    time.sleep(max(0.0, job.at("begun", kill.step) + kill.share * usual_s - time.monotonic()))
    if kill.role != "helper":
        job.ranks.kill(kill.rank)
        return time.monotonic()
    for pid in helpers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return time.monotonic() if helpers else None


def _next_save(place: Place, step: int) -> str:
    """Why a new job cannot save this step where the killed one stood, "" if it can and what it saved loads."""
    with _Job(place, (step,), number=1) as job, orphans_ended(place.setting.settle_s):
        job.watcher.wait("ended", frozenset(range(place.setting.ranks)), None, time.monotonic() + START_LIMIT_S)
        if text := _failure(job.ranks.wait()):
            return text
    found = place.look()
    if found is None:
        return f"step {step} was acknowledged; the reader did not return"
    if any((seen.verdict, seen.step, seen.job) == ("whole", step, 1) for seen in found):
        return ""
    return f"step {step} was acknowledged; found: {'; '.join(f'{one.place} {one.verdict} {one.detail}' for one in found)}"[:400]


def _failure(ended: tuple[Ended, ...]) -> str:
    texts = [str(one.error) if one.error else str(one.value) for one in ended if one.error or one.value]
    return _FOLDERS.sub("", texts[0]).strip()[-400:] if texts else ""


def _ranks(late: list[int]) -> str:
    return f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
