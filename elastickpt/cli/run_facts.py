"""What `inspect` tells of a run, as values: its checkpoints and its epochs, before it is known how they will be shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastickpt.cli.exitcodes import code_of, gravest
from elastickpt.errors import CheckpointError, Damaged, NotACheckpoint, Refused
from elastickpt.format.arrays import Mesh
from elastickpt.format.records import Manifest
from elastickpt.ledger.branch import CommitEntry
from elastickpt.ledger.history import EpochEntry, Finding, KeepRules, epoch_history, read_told
from elastickpt.ledger.objects import complete
from elastickpt.ledger.retention import Judgement, Keep, judge, keep_of, words_of
from elastickpt.runs.opening import RunAt


@dataclass(frozen=True, slots=True)
class CheckpointFact:
    """One checkpoint of a run. `manifest` is None where `problem` kept it from being read; `found` where no restore that is
    remembered looked at it; `verdict` where no rules are known."""

    entry: CommitEntry
    manifest: Manifest | None
    problem: CheckpointError | None
    found: Finding | None
    verdict: Judgement | None

    @property
    def damaged(self) -> bool:
        return self.problem is not None or (self.found is not None and self.found.outcome == "damaged")


@dataclass(frozen=True, slots=True)
class KeepFact:
    """The rules that verdicts go by, in words: those of the job of `epoch`, None for those that were asked about. `keep` is
    None where this release does not understand the words."""

    words: str
    epoch: int | None
    keep: Keep | None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run at one moment. `epochs` is empty where nobody asked, `keep` None where no rules are known; `now` in seconds since
    1970."""

    path: str
    now: float
    checkpoints: tuple[CheckpointFact, ...]
    keep: KeepFact | None
    epochs: tuple[EpochEntry, ...]

    @property
    def live(self) -> int:
        return sum(fact.entry.state == "live" for fact in self.checkpoints)

    @property
    def damaged(self) -> int:
        return sum(fact.damaged for fact in self.checkpoints)

    @property
    def nbytes(self) -> int:
        """Of the arrays of all checkpoints."""
        return sum(fact.entry.nbytes or 0 for fact in self.checkpoints)

    @property
    def code(self) -> int:
        """The gravest of what is wrong now with the checkpoints and epochs, whatever restores found. [CLI-11, CLI-29]"""
        problems = [code_of(type(fact.problem)) for fact in self.checkpoints if fact.problem is not None]
        return gravest([*problems, *(code_of(Damaged) for epoch in self.epochs if epoch.problems)])


def run_facts(run: RunAt, *, now: float, keep: Keep | None, epochs: bool) -> RunFacts:
    """Reads every checkpoint's manifest, every start object, and all of every epoch where it is asked for; `keep` None means
    the rules of the newest job. Raises StorageFailed kinds."""
    read = [(entry, *_manifest(run, entry)) for entry in run.entries]
    read = [one for one in read if not isinstance(one[2], NotACheckpoint)]  # removed since the run was read
    told = complete(read_told(run.store))
    rules = _rules(keep, told.rules)
    verdicts: tuple[Judgement, ...] = ()
    if rules is not None and rules.keep is not None:
        verified = told.verified() | {entry.id: False for entry, _, problem in read if problem is not None}
        verdicts = judge(rules.keep, [one[0] for one in read], now=now, verified=verified)
    by_id = {verdict.id: verdict for verdict in verdicts}
    checkpoints = tuple(CheckpointFact(*one, told.findings.get(one[0].id), by_id.get(one[0].id)) for one in read)
    return RunFacts(run.path, now, checkpoints, rules, complete(epoch_history(run.store)) if epochs else ())


def _rules(asked: Keep | None, own: KeepRules | None) -> KeepFact | None:
    """What was asked about goes before what the run's newest job said. [CLI-34]"""
    if asked is not None:
        return KeepFact(words_of(asked), None, asked)
    if own is None:
        return None
    try:
        return KeepFact(own.words, own.epoch, keep_of(own.words))
    except Refused:
        return KeepFact(own.words, own.epoch, None)


def _manifest(run: RunAt, entry: CommitEntry) -> tuple[Manifest | None, CheckpointError | None]:
    try:
        return run.open(entry).manifest, None
    except CheckpointError as problem:
        return None, problem


def layout_text(meshes: Sequence[Mesh]) -> str:
    """Meshes in short: "dp2×tp2"; those that are a part of another are left out, equal ones counted: "2 of dp2"."""
    shapes = Counter(tuple(zip(mesh.axes, mesh.sizes, strict=True)) for mesh in meshes)
    largest = [shape for shape in shapes if not any(set(shape) < set(other) for other in shapes)]
    words = []
    for shape in largest:
        text = "×".join(f"{axis}{size}" for axis, size in shape)
        words.append(text if shapes[shape] == 1 else f"{shapes[shape]} of {text}")
    return ", ".join(words)
