"""Names in a run: what stands in its root and under `commits/`. Built and parsed here only. [RUN-1..5]

step-0000000100.3.1/                     the folder of an attempt: step, epoch, attempt
commits/0000000100-3-1.json              its register: commit or abort
commits/0000000100-3-1.metrics-1.json    metrics that came after its commit
commits/epoch-3.json                     a claim
commits/epoch-3.adopted.json             void, or which commits of older epochs count
commits/epoch-3.start.json               the commit that the epoch continued from
commits/epoch-3.found.json               what its restore found, if nothing loaded
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import Refused
from elastickpt.format.values import as_integer, described
from elastickpt.storage.store import Entry

COMMITS = "commits"
LATEST = "latest"  # in the root, a link for people: nothing is found by it [RUN-58]
SWEPT = ".swept"  # behind a folder's name: nothing of it counts, nobody opens it, it is being removed
MAX_NUMBER = 10**18 - 1  # of steps, epochs and attempts

NameKind = Literal["claim", "adopted", "start", "found", "register", "metrics"]

_NUMBER = r"[1-9][0-9]{0,17}"
_STEP = r"[0-9]{10}|[1-9][0-9]{10,17}"
_EPOCH_NAME = re.compile(rf"epoch-(?P<epoch>{_NUMBER})(?:\.(?P<what>adopted|start|found))?\.json")
_KIND_OF_EPOCH: dict[str | None, NameKind] = {None: "claim", "adopted": "adopted", "start": "start", "found": "found"}
_ATTEMPT_NAME = re.compile(
    rf"(?P<step>{_STEP})-(?P<epoch>{_NUMBER})-(?P<attempt>{_NUMBER})(?:\.metrics-(?P<number>{_NUMBER}))?\.json"
)
_TEXT = re.compile(rf"(?P<step>{_STEP})-(?P<epoch>{_NUMBER})-(?P<attempt>{_NUMBER})")
_FOLDER = re.compile(rf"step-(?P<step>{_STEP})\.(?P<epoch>{_NUMBER})\.(?P<attempt>{_NUMBER})(?P<swept>\.swept)?")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One try to write one step, in one epoch. Step from 0; epoch and attempt from 1. Raises Refused otherwise."""

    step: int
    epoch: int
    attempt: int

    def __post_init__(self) -> None:
        for name, value, low in (("step", self.step, 0), ("epoch", self.epoch, 1), ("attempt", self.attempt, 1)):
            if type(value) is not int or not low <= value <= MAX_NUMBER:
                raise Refused(f"{name} {value!r}: expected an integer in [{low}, {MAX_NUMBER}]")

    def __str__(self) -> str:
        return f"{self.step:010d}-{self.epoch}-{self.attempt}"

    @property
    def folder(self) -> str:
        """In the run's root. [RUN-1]"""
        return f"step-{self.step:010d}.{self.epoch}.{self.attempt}"

    @property
    def register(self) -> str:
        """Below `commits/`. [RUN-2]"""
        return f"{self}.json"

    def metrics(self, number: int) -> str:
        """Below `commits/`; numbers from 1."""
        return f"{self}.metrics-{number}.json"


def step_number(value: object) -> int:
    """A step as programs count it: an int, numpy's integers, a tensor of one. Raises Refused for what is none."""
    step = as_integer(value)
    if type(step) is not int or not 0 <= step <= MAX_NUMBER:
        raise Refused(f"step {described(value)}: expected the number of completed steps, an integer in [0, {MAX_NUMBER}]")
    return step


@dataclass(frozen=True, slots=True)
class Name:
    """What a name under `commits/` means. `id` is None for those of epochs; `number` is 0 except for metrics."""

    kind: NameKind
    epoch: int
    id: AttemptId | None = None
    number: int = 0


def claim_name(epoch: int) -> str:
    return f"epoch-{epoch}.json"


def adopted_name(epoch: int) -> str:
    return f"epoch-{epoch}.adopted.json"


def start_name(epoch: int) -> str:
    return f"epoch-{epoch}.start.json"


def found_name(epoch: int) -> str:
    return f"epoch-{epoch}.found.json"


def commits_path(name: str) -> str:
    """From the run's root."""
    return f"{COMMITS}/{name}"


def temporary_name(name: str) -> str:
    """A name that nobody else uses, for what is going to be `name`. [RUN-5]"""
    return f".{name}.{secrets.token_hex(8)}.tmp"


def parse_temporary(name: str) -> str | None:
    """What a temporary file is going to be; None for any other file."""
    found = _TEMPORARY.fullmatch(name)
    return found["name"] if found else None


def parse_id(text: str) -> AttemptId | None:
    """The id that `str(id)` spells; None for any other text."""
    found = _TEXT.fullmatch(text)
    return _id(found) if found else None


def parse_folder(name: str) -> tuple[AttemptId, Literal["attempt", "swept"]] | None:
    """Whose folder it is; None for what is no attempt's."""
    found = _FOLDER.fullmatch(name)
    return (_id(found), "swept" if found["swept"] else "attempt") if found else None


def parse_name(name: str) -> Name | None:
    """What a name under `commits/` means; None for those that mean nothing. [RUN-3]"""
    if found := _EPOCH_NAME.fullmatch(name):
        return Name(_KIND_OF_EPOCH[found["what"]], int(found["epoch"]))
    if found := _ATTEMPT_NAME.fullmatch(name):
        attempt = _id(found)
        if found["number"]:
            return Name("metrics", attempt.epoch, attempt, int(found["number"]))
        return Name("register", attempt.epoch, attempt)
    return None


def _id(found: re.Match[str]) -> AttemptId:
    return AttemptId(int(found["step"]), int(found["epoch"]), int(found["attempt"]))


@dataclass(frozen=True, slots=True)
class RunObjects:
    """The names under `commits/` at one moment."""

    claims: frozenset[int]
    adopted: frozenset[int]
    starts: frozenset[int]
    founds: frozenset[int]
    registers: frozenset[AttemptId]
    metrics: frozenset[tuple[AttemptId, int]]
    temporaries: tuple[str, ...]

    @property
    def newest(self) -> int:
        """The highest epoch that was claimed, 0 for none."""
        return max(self.claims | self.adopted | self.starts, default=0)

    def metrics_of(self, attempt: AttemptId) -> tuple[int, ...]:
        """The numbers of its metrics objects, rising."""
        return tuple(sorted(number for whose, number in self.metrics if whose == attempt))


def listing_of(entries: Iterable[Entry]) -> RunObjects:
    """What stands under `commits/`; other names, and what is no file, are passed over. [RUN-3]"""
    epochs: dict[str, set[int]] = {"claim": set(), "adopted": set(), "start": set(), "found": set()}
    registers: set[AttemptId] = set()
    metrics: set[tuple[AttemptId, int]] = set()
    temporaries: list[str] = []
    for entry in entries:
        if entry.kind != "file":
            continue
        name = parse_name(entry.name)
        if name is None:
            temporaries += [entry.name] if parse_temporary(entry.name) else []
        elif name.id is None:
            epochs[name.kind].add(name.epoch)
        elif name.kind == "register":
            registers.add(name.id)
        else:
            metrics.add((name.id, name.number))
    return RunObjects(
        frozenset(epochs["claim"]),
        frozenset(epochs["adopted"]),
        frozenset(epochs["start"]),
        frozenset(epochs["found"]),
        frozenset(registers),
        frozenset(metrics),
        tuple(temporaries),
    )
