"""What a run leaves behind: one `Report`, and its JSON form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tools.bench.records import Machine

from .entrants import Entrant
from .judge import BAD, OUTCOMES, Outcome

SCHEMA_VERSION = 1
Kind = Literal["power", "save", "flips"]
BAD_SHOWN = 3  # of each bad outcome of a contestant


@dataclass(frozen=True, slots=True)
class Case:
    """One state of a disk, one kill or one flip. `number` repeats it; `group`: the row it is counted in; `how`: what was
    done, in words.

    `next_save`: why the next save, by a new job, did not work, "" if it did or was not asked for; `same_job`: why none did in
    the same job behind a dead helper process, "" if one did, None if it was not asked for.
    """

    number: int
    group: str
    how: str
    outcome: Outcome
    detail: str = ""
    next_save: str = ""
    same_job: str | None = None

    @property
    def is_bad(self) -> bool:
        return self.outcome in BAD or bool(self.next_save) or bool(self.same_job)


@dataclass(frozen=True, slots=True)
class Tally:
    """All cases of one contestant. `groups`: group → outcome → count; `bad`: the first few of each bad outcome.

    `helpers_dead`: in so many a helper process was killed, and behind it saves were tried in the same job; `saved_on`: in so
    many of these one worked.
    """

    contestant: str
    version: str
    settings: str
    notes: str
    groups: Mapping[str, Mapping[str, int]]
    next_save_failed: int
    bad: tuple[Case, ...]
    helpers_dead: int = 0
    saved_on: int = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """Over all groups."""
        return sum((Counter(counts) for counts in self.groups.values()), Counter())

    @property
    def is_clean(self) -> bool:
        """Whether no outcome is bad, and every next save worked."""
        failed = self.next_save_failed or self.saved_on < self.helpers_dead
        return not failed and not any(self.counts.get(outcome, 0) for outcome in BAD)


@dataclass(frozen=True, slots=True)
class Report:
    """`kind`: what was done. `options`: the options that repeat it. `absent`: contestant → why it took no part."""

    kind: Kind
    date: str
    options: str
    machine: Machine
    tallies: tuple[Tally, ...]
    absent: Mapping[str, str]


def tally(entrant: Entrant, cases: Sequence[Case], notes: str) -> Tally:
    """The cases counted."""
    groups: dict[str, dict[str, int]] = {
        group: {outcome: count for outcome in OUTCOMES if (count := _count(cases, group, outcome))}
        for group in sorted({case.group for case in cases})
    }
    failed = sum(bool(case.next_save) for case in cases)
    bad = tuple(case for outcome in (*OUTCOMES, None) for case in _first(cases, outcome))
    tried = [case.same_job for case in cases if case.same_job is not None]
    return Tally(entrant.name, entrant.version, entrant.settings, notes, groups, failed, bad, len(tried), tried.count(""))


def to_json(report: Report) -> str:
    """The report as indented JSON text with its schema version first."""
    return json.dumps({"schema": SCHEMA_VERSION, **asdict(report)}, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote. ValueError: another schema; KeyError, TypeError: other members."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"expected schema {SCHEMA_VERSION} in the file")
    machine = dict(tree["machine"])
    machine["places"] = tuple((place, kind) for place, kind in machine["places"])
    tallies = tuple(Tally(**{**one, "bad": tuple(Case(**case) for case in one["bad"])}) for one in tree["tallies"])
    return Report(tree["kind"], tree["date"], tree["options"], Machine(**machine), tallies, tree["absent"])


def _count(cases: Iterable[Case], group: str, outcome: Outcome) -> int:
    return sum(case.group == group and case.outcome == outcome for case in cases)


def _first(cases: Iterable[Case], outcome: Outcome | None) -> list[Case]:
    """Of one bad outcome; for None of those whose only fault is a later save."""
    if outcome is None:
        found = [case for case in cases if case.is_bad and case.outcome not in BAD]
    else:
        found = [case for case in cases if case.outcome == outcome and outcome in BAD]
    return found[:BAD_SHOWN]
