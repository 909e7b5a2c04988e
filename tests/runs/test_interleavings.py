"""Every schedule of an old writer and new jobs, each of which may stop between any two store operations: the real code, over a
store. What must hold is said here once more, from the bytes of the objects alone. [RUN-30, RUN-32..36, RUN-42, RUN-72..77]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
from run_actors import (
    MANIFEST,
    Notes,
    X,
    aborting_writer,
    begun,
    committed,
    memory_store,
    new_job,
    old_writer,
    remover,
    run_with_one_commit,
    starting_job,
    write_folder,
)
from schedules import Actor, Explored, Explorer, Seen, is_local, is_local_if_nothing_goes, temporary_name

from elastickpt.ledger.branch import entries_of
from elastickpt.ledger.epochs import Acknowledgement
from elastickpt.ledger.objects import Operations, complete
from elastickpt.ledger.stored import read_view
from elastickpt.storage.memory import MemoryStore

Objects = Mapping[str, bytes | None]


class Truth:
    """What the objects say, by the rule of two lines, read without the code under test."""

    def __init__(self, tree: Objects) -> None:
        found = {path: json.loads(data) for path, data in tree.items() if data and re.fullmatch(r"commits/[^.].*\.json", path)}
        self.adopted = {
            one["epoch"]: set(one["commits"])
            for path, one in found.items()
            if path.endswith(".adopted.json") and not one["void"]
        }
        self.commits = {one["id"] for one in found.values() if one.get("says") == "commit"}
        self.newest = max(self.adopted, default=0)
        self.counting = {one for one in self.commits if self._counts(one)}
        self.folders = {path for path in tree if f"{path}/{MANIFEST}" in tree}

    def _counts(self, attempt: str) -> bool:
        return epoch_of(attempt) == self.newest or attempt in self.adopted.get(self.newest, ())

    def excluded(self, attempt: str) -> bool:
        """Whether an epoch after its own has adopted and left it out."""
        return any(epoch > epoch_of(attempt) and attempt not in listed for epoch, listed in self.adopted.items())


def epoch_of(attempt: str) -> int:
    return int(attempt.split("-")[1])


def folder_of(attempt: str) -> str:
    return "step-" + attempt.replace("-", ".")


class Invariants:
    """Checked at every node; what depends on the store alone, once for each content."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.truths: dict[int, Truth] = {}
        self.explored = Explored(0, 0)
        self.acknowledged = 0
        self.superseded = 0
        self.removed = 0

    def __call__(self, tree: Objects, notes: tuple[Notes, ...]) -> None:
        key = hash(frozenset(tree.items()))
        truth = self.truths.get(key)
        if truth is None:
            truth = self.truths[key] = Truth(tree)
            self.content(truth)
        # what a late writer links again behind a removal is broken until it looks; nothing else is
        broken = {one for one in truth.counting if folder_of(one) not in truth.folders}
        removing = {str(one) for note in notes for one in note.removing}
        assert broken <= removing, f"{broken} count, their folders are not whole"
        for note in notes:
            for acknowledged in map(str, note.acknowledged):
                assert acknowledged in truth.counting | removing, f"{acknowledged} was acknowledged and does not count"
            for chosen in map(str, note.chosen):
                assert chosen in truth.counting | removing, f"{chosen} was continued from and does not count"
            for inert in map(str, note.inert):
                assert inert not in truth.counting, f"{inert} was reported as superseded and counts"
        self.acknowledged += any(note.acknowledged for note in notes)
        self.superseded += any(note.superseded for note in notes)
        self.removed += bool(removing)

    def content(self, truth: Truth) -> None:
        for one in truth.counting:
            assert not truth.excluded(one), f"{one} did not count, and counts again"
        entries = entries_of(complete(read_view(self.store)))
        assert {str(one.id) for one in entries} == truth.counting, "history shows other commits than those that count"
        good = [one for one in entries if one.commit is not None]
        assert {one.folder for one in good} <= truth.folders, "a commit is shown as good, and its folder is not whole"
        assert [one for one in good if one.state == "live"], "no good checkpoint is left on the live branch"


@pytest.fixture(autouse=True)
def _temporary_names_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastickpt.ledger.objects.temporary_name", temporary_name)


def explore(actors: Mapping[str, Actor], *, linking: bool = False, local: Callable[[Seen], bool] = is_local) -> Invariants:
    """All schedules; on a store that links temporary files, or one with conditional puts."""
    store = memory_store()
    run_with_one_commit(store)
    return explore_from(store, actors, linking=linking, local=local)


def explore_from(
    store: MemoryStore, actors: Mapping[str, Actor], *, linking: bool, local: Callable[[Seen], bool]
) -> Invariants:
    invariants = Invariants(store)
    able = replace(store.capabilities, conditional_put=False, directory_sync=True) if linking else store.capabilities
    invariants.explored = Explorer(store, actors, invariants, local=local, capabilities=able).explore()
    return invariants


def nothing(seen: Seen) -> bool:
    return False


def starting(*jobs: int) -> dict[str, Actor]:
    return {f"job {n}": partial(starting_job, job=n) for n in jobs}


def whole(*jobs: int, saves: tuple[int, ...] = ()) -> dict[str, Actor]:
    return {f"job {n}": partial(new_job, job=n, saves=saves) for n in jobs}


WRITER: dict[str, Actor] = {"writer": old_writer}


def test_a_writer_and_two_jobs_that_start() -> None:
    found = explore({**WRITER, **starting(2, 3)}, local=is_local_if_nothing_goes)
    assert found.explored.nodes > 2000
    assert found.acknowledged


def test_a_writer_and_a_job_that_sweeps_and_removes_each_operation_by_itself() -> None:
    found = explore({**WRITER, **whole(2)}, linking=True, local=nothing)
    assert found.acknowledged
    assert found.removed


def test_a_writer_that_commits_and_one_that_aborts_beside_a_job() -> None:
    assert explore({**WRITER, "aborting": aborting_writer, **whole(2)}).acknowledged


def test_a_job_that_saves_and_removes_beside_one_that_starts() -> None:
    found = explore({**whole(2, saves=(30,)), **starting(3)})
    assert found.acknowledged
    assert found.superseded
    assert found.removed


def test_two_writers_of_one_commit_that_is_removed_between_them() -> None:
    """The second one comes so late that the register is free again. [RUN-44, RUN-51, RUN-73]"""
    store = memory_store()
    holding = begun(store, job=1)
    complete(write_folder(store, X))
    committed(store, holding, step=30)
    actors: dict[str, Actor] = {**WRITER, "late": old_writer, "removing": partial(remover, holding=holding)}
    found = explore_from(store, actors, linking=False, local=is_local)
    assert found.removed


@pytest.mark.long
def test_a_writer_and_two_jobs_that_sweep_and_remove() -> None:
    found = explore({**WRITER, **whole(2, 3)})
    assert found.explored.nodes > 50_000
    assert found.acknowledged
    assert found.superseded
    assert found.removed


@pytest.mark.long
@pytest.mark.parametrize(
    "actors",
    [
        {**WRITER, **whole(2, saves=(30,)), **starting(3)},
        {**WRITER, "late": old_writer, **whole(2, saves=(30,))},
        {**WRITER, **whole(2, saves=(30,)), **whole(3, saves=(40,))},
    ],
    ids=["a job that saves, one that starts", "a late writer of the same commit, a job that saves", "two jobs that save"],
)
def test_longer_schedules(actors: dict[str, Actor]) -> None:
    found = explore(actors)
    assert found.acknowledged
    assert found.removed


@pytest.mark.long
def test_a_writer_and_three_jobs_that_start() -> None:
    assert explore({**WRITER, **starting(2, 3, 4)}, local=is_local_if_nothing_goes).acknowledged


@pytest.mark.long
def test_a_writer_and_two_jobs_that_start_each_operation_by_itself() -> None:
    assert explore({**WRITER, **starting(2, 3)}, linking=True, local=nothing).acknowledged


def _nothing(store: object, *args: object) -> Operations[None]:
    yield 0.0


def test_without_closing_older_epochs_a_commit_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules are rich enough to tell: the protocol less one of its steps is found wanting."""
    monkeypatch.setattr("elastickpt.ledger.epochs._close_older", _nothing)
    with pytest.raises(AssertionError, match=r"counts again|does not count"):
        explore({**WRITER, **starting(2, 3)})


def test_without_looking_for_a_claim_a_commit_is_acknowledged_and_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def acknowledge(store: object, attempt: object, **limits: float) -> Operations[Acknowledgement]:
        yield 0.0
        return Acknowledgement.ACKNOWLEDGED

    monkeypatch.setattr("run_actors.acknowledge", acknowledge)
    with pytest.raises(AssertionError, match="was acknowledged and does not count"):
        explore({**WRITER, **starting(2)})
