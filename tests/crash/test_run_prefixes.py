"""A power cut after every prefix of what a run does: claims, commits by register, retention behind them, a second job.

What is not synced is lost, kept, torn or drawn. What was acknowledged and is not being removed counts, and loads; whatever is
listed loads.
[RUN-20..24, RUN-40..42, RUN-70..72, SAVE-90]
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from journal_store import FATES, KEPT, LOST, TORN, Change, Fate, JournalStore, after_power_cut, drawn
from run_actors import Without, by
from simulated import files
from simulated_members import Job

import elastickpt as ek
from elastickpt.commit.attest import decode_contents
from elastickpt.commit.outcome import Patience, commit
from elastickpt.errors import Damaged, MissingFile, NotACheckpoint
from elastickpt.ledger.branch import CommitEntry, entries_of
from elastickpt.ledger.epochs import Holding, claim, open_attempt, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.removal import remove_commits, sweep
from elastickpt.ledger.retention import Keep, removable
from elastickpt.ledger.retention import judge as judged
from elastickpt.ledger.stored import read_view
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store

KEEP = Keep(last=2)
PATIENCE = Patience(poll_s=0.01, limit_s=0.05)
NAMES = itertools.count()


@pytest.fixture
def top() -> Iterator[str]:
    name = f"run-prefixes-{uuid.uuid4().hex}"
    yield name
    MemoryStore("").remove_tree(name)


class Trainer:
    """Two members that hold one state, whose content follows from the step."""

    def __init__(self) -> None:
        self.state = {"t": {"a": torch.zeros(9), "b": torch.zeros(4, dtype=torch.int64)}, "note": "always the same"}
        self.job = Job(self.state, 2)

    def commit(self, store: Store, holding: Holding, *, step: int) -> AttemptId:
        """As writers do it: all shares, attested and durable, then the register."""
        fill(self.state, step)
        attempt = self.job.attempt_in_run(store, complete(open_attempt(store, holding, step=step)))
        power = replace(attempt, attempt=replace(attempt.attempt, durability="power"))
        commit(store, power.attempt, decode_contents(power.contents), self.job.write(power), patience=PATIENCE)
        assert attempt.attempt.register is not None
        return attempt.attempt.register


def fill(state: dict[str, object], step: int) -> None:
    tensors = state["t"]
    assert isinstance(tensors, dict)
    for tensor in tensors.values():
        tensor.copy_(torch.arange(tensor.numel()) + step)


@dataclass
class Promise:
    """From which length of the journal on what holds: a step's attempt is begun, acknowledged, or being removed."""

    begun: dict[int, int] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    removing: dict[int, int] = field(default_factory=dict)

    def allowed(self, length: int) -> set[int]:
        return {step for step, at in self.begun.items() if at <= length}

    def demanded(self, length: int) -> set[int]:
        removing = {step for step, at in self.removing.items() if at < length}
        return {step for step, at in self.acknowledged.items() if at <= length} - removing


def as_local(store: Store) -> Without:
    """A store that has no conditional put, as file systems have none."""
    return Without(store, conditional_put=False)


def two_jobs(top: str, *, tree_sync: bool = False) -> tuple[tuple[Change, ...], Promise]:
    """The journal of a run of two jobs, each commit followed by retention, and what it promises when."""
    journal = JournalStore(f"{top}/journal", tree_sync=tree_sync)
    store, trainer, promise = as_local(journal), Trainer(), Promise()
    for number, steps in enumerate(((10, 20, 30), (40, 50)), start=1):
        holding = begun(store, number)
        for step in steps:
            promise.begun[step] = len(journal.journal)
            trainer.commit(store, holding, step=step)
            promise.acknowledged[step] = len(journal.journal)
            going = removable(judged(KEEP, listed(store), now=2000.0, verified={}))
            promise.removing |= {one.step: len(journal.journal) for one in going}
            complete(remove_commits(store, holding, commits=going))
    assert sorted(promise.removing) == [10, 20, 30]
    return journal.journal, promise


def begun(store: Store, number: int) -> Holding:
    """A job that claimed, started from the newest commit, and swept."""
    holding = complete(claim(store, by(number)))
    newest = next((one.id for one in listed(store) if one.state == "live"), None)
    complete(start(store, holding, continued=newest))
    complete(sweep(store, holding))
    return holding


def listed(store: Store) -> tuple[CommitEntry, ...]:
    return entries_of(complete(read_view(store)))


class Reader:
    """Loads what is listed, each content of a folder once."""

    def __init__(self) -> None:
        self._whole: dict[frozenset[tuple[str, bytes]], bool] = {}

    def require_whole(self, store: MemoryStore, entry: CommitEntry) -> None:
        content = frozenset(files(store, entry.folder).items())
        if content not in self._whole:
            place = f"{store.url}/{entry.folder}"
            assert ek.open(place).verify().problems == ()
            saved, into = Trainer().state, Trainer().state
            fill(saved, entry.step)
            ek.load(into, place)
            assert str(into) == str(saved)
            self._whole[content] = True

    def require_as_promised(self, store: MemoryStore, promise: Promise, length: int) -> set[int]:
        try:
            entries = listed(store)
        except MissingFile:  # not even its folder of registers is durable yet
            entries = ()
        assert [one for one in entries if one.commit is None] == [], "what is listed is whole"
        for entry in entries:
            self.require_whole(store, entry)
        steps = {one.step for one in entries}
        assert steps <= promise.allowed(length), "listed, and nobody began it"
        assert promise.demanded(length) <= steps, "acknowledged, and not listed"
        assert all(one.state == "live" for one in entries)
        return steps


def judge_all(
    journal: Sequence[Change], promise: Promise, fates: Sequence[Fate], top: str, *, lengths: Sequence[int] = ()
) -> int:
    """Of all lengths, or of these; how many states those were."""
    reader, states = Reader(), 0
    for length in lengths or range(len(journal) + 1):
        for fate in fates:
            name = f"{top}/{next(NAMES)}"
            left = after_power_cut(journal[:length], fate, name=name)
            try:
                reader.require_as_promised(left, promise, length)
            except BaseException as error:
                error.add_note(
                    f"after {length} of {len(journal)} changes, the last {journal[length - 1 : length]}; {fate.name}"
                )
                raise
            MemoryStore("").remove_tree(name)
            states += 1
    return states


def test_a_power_cut_after_every_change_of_a_run_leaves_what_was_acknowledged(top: str) -> None:
    journal, promise = two_jobs(top)
    assert judge_all(journal, promise, [*FATES, drawn(0)], top) > 2000


@pytest.mark.long
@pytest.mark.parametrize("tree_sync", [False, True])
def test_many_drawn_states_of_every_prefix_of_a_run(top: str, tree_sync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tree_sync:
        monkeypatch.setattr("elastickpt.writer.write_files.SYNC_TREE_FILES", 0)
        monkeypatch.setattr("elastickpt.commit.record.SYNC_TREE_FILES", 0)
    journal, promise = two_jobs(top, tree_sync=tree_sync)
    assert judge_all(journal, promise, [*FATES, *map(drawn, range(40))], top) > 8000


def go_on(journal: Sequence[Change], promise: Promise, lengths: Sequence[int], fates: Sequence[Fate], top: str) -> None:
    """A job that comes after the power cut commits, removes and sweeps; nothing but what it keeps is left."""
    reader, trainer = Reader(), Trainer()
    for length in lengths:
        for fate in fates:
            name = f"{top}/{next(NAMES)}"
            left = after_power_cut(journal[:length], fate, name=name)
            try:
                store = as_local(JournalStore(name))
                before = reader.require_as_promised(left, promise, length)
                holding = begun(store, 9)
                assert {one.step for one in listed(store)} == before
                attempt = trainer.commit(store, holding, step=60)
                going = removable(judged(KEEP, listed(store), now=2000.0, verified={}))
                complete(remove_commits(store, holding, commits=going))
                assert complete(sweep(store, holding)).left == ()
                kept = [attempt, *(one.id for one in listed(store) if one.step != 60)]
                assert len(kept) == min(2, len(before) + 1)
                for entry in listed(store):
                    reader.require_whole(left, entry)
                require_nothing_else(left, kept)
            except BaseException as error:
                error.add_note(f"after {length} of {len(journal)} changes, {fate.name}")
                raise
            MemoryStore("").remove_tree(name)


def require_nothing_else(store: Store, kept: Sequence[AttemptId]) -> None:
    assert {entry.name for entry in store.entries("")} == {"commits", *(one.folder for one in kept)}
    names = {entry.name for entry in store.entries("commits")}
    assert {name for name in names if "epoch-" not in name} == {one.register for one in kept}


def test_the_next_job_works_after_a_power_cut_at_any_place(top: str) -> None:
    journal, promise = two_jobs(top)
    go_on(journal, promise, range(0, len(journal) + 1, 12), (LOST, TORN), top)


@pytest.mark.long
def test_the_next_job_works_after_every_power_cut(top: str) -> None:
    journal, promise = two_jobs(top)
    go_on(journal, promise, range(len(journal) + 1), (LOST, KEPT, TORN, drawn(1)), top)


# -- the model itself ------------------------------------------------------------------------------------------------------


def test_a_sync_left_out_is_seen(top: str) -> None:
    """Of the root before a register says commit, of the registers behind that, and behind a removal before the folder goes."""
    journal, promise = two_jobs(top)
    root = max(n for n, change in enumerate(journal) if change == Change("sync", "") and n < promise.acknowledged[50])
    syncs = [n for n, change in enumerate(journal) if change == Change("sync", "commits")]
    registers = max(n for n in syncs if n < promise.acknowledged[50])
    removal = min(n for n in syncs if n >= promise.removing[30])
    for place in (root, registers, removal):
        without = [change for number, change in enumerate(journal) if number != place]
        with pytest.raises((AssertionError, Damaged, NotACheckpoint)):
            judge_all(
                without,
                earlier(promise, place),
                [*FATES, *map(drawn, range(8))],
                top,
                lengths=range(registers, len(without) + 1),
            )


def earlier(promise: Promise, place: int) -> Promise:
    """The same of a journal without the change at that place."""
    moved = [
        {step: at - (at > place) for step, at in one.items()} for one in (promise.begun, promise.acknowledged, promise.removing)
    ]
    return Promise(*moved)
