"""Carries out a run, contestant by contestant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .blocklog import CrashState, requests
from .entrants import Entrant, entrant
from .flips import FlipSetting as FlipSetting
from .flips import flip_each
from .kills import Setting as Setting
from .kills import draw, kill_once
from .power import Recording, drawn_states, keep, kept, record, replay
from .records import Case, Tally, tally

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Which power cuts. `only`: the state of that number alone; `recordings`: where recordings are kept, None: nowhere."""

    states: int
    seed: int
    ranks: int
    saves: int
    pause_s: float = 0.0
    only: int | None = None
    recordings: Path | None = None

    def __str__(self) -> str:
        pause = f", {self.pause_s:g} s between them" if self.pause_s else ", one right after the other"
        return f"{self.states} states, seed {self.seed}, {self.ranks} ranks, 1 + {self.saves} saves of 1.1 MB{pause}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found. `absent`: contestant → why it took no part."""

    tallies: tuple[Tally, ...]
    absent: Mapping[str, str]


def power_cuts(names: Sequence[str], cuts: Cuts, advance: Advance) -> Found:
    """Each contestant's saves recorded, and its states replayed. Raises OSError without root."""

    def one(found: Entrant) -> Tally:
        recording = _recorded(found, cuts)
        states = drawn_states(recording, cuts.states, cuts.seed)
        cases = replay(found, recording, states, _numbers(states, cuts.only), lambda n: advance(found.name, n, len(states)))
        log = [request for request in requests(recording.log) if request.end > recording.start]
        writes = sum(request.kind == "write" for request in log)
        return tally(found, cases, f"{writes} writes and {len(log) - writes} flushes behind the first checkpoint")

    return _each(names, one)


def kill_matrix(names: Sequence[str], setting: Setting, numbers: Sequence[int], advance: Advance) -> Found:
    """Each contestant's kills of these numbers. Blocks: 1 to 30 s a kill."""

    def one(found: Entrant) -> Tally:
        cases: list[Case] = []
        missed = 0
        for done, number in enumerate(numbers):
            advance(found.name, done, len(numbers))
            case = kill_once(found, setting, draw(found, setting, number))
            missed += case is None
            cases += [case] if case else []
        return tally(found, cases, f"{missed} kills came too late" if missed else "")

    return _each(names, one)


def flip_matrix(names: Sequence[str], setting: FlipSetting, numbers: Sequence[int], advance: Advance) -> Found:
    """Each contestant's flips of these numbers. Blocks: 0.2 s a flip."""

    def one(found: Entrant) -> Tally:
        cases, files = flip_each(found, setting, numbers, lambda done: advance(found.name, done, len(numbers)))
        return tally(found, cases, f"{len(files)} files, {sum(file.nbytes for file in files)} bytes")

    return _each(names, one)


def _each(names: Sequence[str], one: Callable[[Entrant], Tally]) -> Found:
    tallies, absent = [], {}
    for name in names:
        try:
            tallies.append(one(entrant(name)))
        except (ImportError, RuntimeError) as problem:
            absent[name] = str(problem)[:400]
    return Found(tuple(tallies), absent)


def _recorded(found: Entrant, cuts: Cuts) -> Recording:
    folder = cuts.recordings / found.name if cuts.recordings else None
    if folder and folder.exists():
        return kept(folder)
    recording = record(found, ranks=cuts.ranks, saves=cuts.saves, pause_s=cuts.pause_s)
    if folder:
        keep(recording, folder)
    return recording


def _numbers(states: Sequence[CrashState], only: int | None) -> Sequence[int]:
    return range(len(states)) if only is None else (only,)
