"""The live branch: what a rollback or a start left aside is abandoned, and taken only by name. [RUN-52, RUN-53, RUN-60..63]"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_actors import begun, by, commit_of, committed, memory_store, write_folder

from elastickpt.errors import NotACheckpoint
from elastickpt.ledger.branch import at_step, entries_of, history, live_branch
from elastickpt.ledger.epochs import claim, decide
from elastickpt.ledger.metrics import add_metrics
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import AbortRegister, Adopted
from elastickpt.ledger.stored import RunView, read_view
from elastickpt.storage.memory import MemoryStore


def shown(store: MemoryStore) -> list[tuple[int, int, str]]:
    return [(one.step, one.epoch, one.state) for one in history(store.url)]


def rolled_back() -> tuple[MemoryStore, AttemptId]:
    """Epoch 1 commits 10, 20, 30; a rollback goes on from 20 and commits 30 and 40."""
    store = memory_store()
    first = begun(store, job=1)
    ids = [committed(store, first, step=step) for step in (10, 20, 30)]
    second = begun(store, job=1, continued=ids[1])
    for step in (30, 40):
        committed(store, second, step=step)
    return store, ids[2]


def test_after_a_rollback_the_same_steps_commit_again_and_the_branch_follows() -> None:
    """[RUN-45, RUN-60]"""
    store, _ = rolled_back()
    live = [(40, 2, "live"), (30, 2, "live"), (20, 1, "live"), (10, 1, "live")]
    assert shown(store) == [*live, (30, 1, "abandoned")]


def test_a_rollback_behind_a_rollback_leaves_both_aside() -> None:
    """[RUN-60]"""
    store, _ = rolled_back()
    third = begun(store, job=1, continued=AttemptId(10, 1, 1))
    committed(store, third, step=20)
    aside = [(40, 2, "abandoned"), (30, 2, "abandoned"), (30, 1, "abandoned"), (20, 1, "abandoned")]
    assert shown(store) == [(20, 3, "live"), (10, 1, "live"), *aside]


def test_a_start_from_nothing_begins_a_new_branch() -> None:
    store, _ = rolled_back()
    begun(store, job=2, continued=None)
    assert {state for _, _, state in shown(store)} == {"abandoned"}


def test_an_abandoned_commit_can_be_continued_from() -> None:
    """[RUN-62]"""
    store, aside = rolled_back()
    third = begun(store, job=2, continued=aside)
    committed(store, third, step=50)
    live = [(50, 3, "live"), (30, 1, "live"), (20, 1, "live"), (10, 1, "live")]
    assert shown(store) == [*live, (40, 2, "abandoned"), (30, 2, "abandoned")]


def test_the_branch_turns_at_the_start_and_not_at_the_claim() -> None:
    """A job that stopped before it chose leaves the branch as it was. [RUN-52]"""
    store, _ = rolled_back()
    before = shown(store)
    holding = complete(claim(store, by(5)))
    assert shown(store) == before
    assert AttemptId(40, 2, 1) in holding.adopted.commits


def test_the_branch_goes_on_behind_a_removed_start() -> None:
    """Retention may remove the commit that an epoch started from; what is below it stays on the branch. [RUN-50, RUN-61]"""
    store, _ = rolled_back()
    store.remove("commits/0000000020-1-1.json")
    assert shown(store)[:3] == [(40, 2, "live"), (30, 2, "live"), (10, 1, "live")]


def test_what_has_no_register_that_says_commit_is_no_entry() -> None:
    """[RUN-4]"""
    store = memory_store()
    holding = begun(store, job=1)
    complete(decide(store, AbortRegister(AttemptId(10, 1, 1), "full")))
    committed(store, holding, step=10)
    complete(write_folder(store, AttemptId(20, 1, 1)))
    assert [(one.step, one.attempt) for one in history(store.url)] == [(10, 2)]


def test_a_run_that_nobody_claimed_is_empty() -> None:
    assert history(memory_store().url) == ()


def test_a_root_that_is_not_there_is_no_empty_run(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotACheckpoint, match="expected the folder of a run"):
        history(tmp_path / "nothing")


def test_metrics_of_the_commit_and_later_ones_are_shown_the_last_one_holds() -> None:
    """[RUN-18]"""
    store = memory_store()
    holding = begun(store, job=1)
    attempt = committed(store, holding, step=10, metrics=(("loss", 2.5), ("lr", 0.1)))
    complete(add_metrics(store, holding, attempt=attempt, metrics={"val_loss": math.nan}))
    complete(add_metrics(store, holding, attempt=attempt, metrics={"loss": 2, "val_loss": 2.1}))
    assert history(store.url)[0].metrics == (("loss", 2.0), ("lr", 0.1), ("val_loss", 2.1))


def test_metrics_of_what_is_no_commit_are_refused() -> None:
    store = memory_store()
    holding = begun(store, job=1)
    with pytest.raises(NotACheckpoint, match="0000000010-1-1"):
        complete(add_metrics(store, holding, attempt=AttemptId(10, 1, 1), metrics={"loss": 1.0}))


def test_a_step_means_the_live_branch_unless_an_epoch_is_named() -> None:
    """[RUN-62]"""
    entries = history(rolled_back()[0].url)
    assert at_step(entries, step=30).epoch == 2
    assert at_step(entries, step=30, epoch=1).state == "abandoned"
    with pytest.raises(NotACheckpoint, match="step 25: no commit on the live branch; the live branch has 40, 30, 20, 10"):
        at_step(entries, step=25)


def test_a_step_that_is_only_abandoned_says_where_it_is() -> None:
    store, _ = rolled_back()
    begun(store, job=2, continued=AttemptId(10, 1, 1))
    with pytest.raises(NotACheckpoint, match="epoch 2 has it: name the epoch"):
        at_step(history(store.url), step=40)


@given(st.data())
def test_the_branch_is_the_path_of_parents(data: st.DataObject) -> None:
    """Against a tree in which each commit knows its parent. [RUN-60]"""
    parent: dict[AttemptId, AttemptId | None] = {}
    starts: dict[int, AttemptId | None] = {}
    head: AttemptId | None = None
    for epoch in range(1, data.draw(st.integers(1, 6)) + 1):
        head = data.draw(st.sampled_from([None, *parent])) if parent else None
        starts[epoch] = head
        for _ in range(data.draw(st.integers(0, 4))):
            step = (head.step if head else 0) + data.draw(st.integers(1, 3))
            commit = AttemptId(step, epoch, 1)
            parent[commit] = head
            head = commit
    expected = []
    while head is not None:
        expected.append(head)
        head = parent[head]
    newest = max(starts)
    commits = tuple(commit_of(one) for one in sorted(parent))
    view = RunView(Adopted(newest, "t", newest - 1, ()), commits, {}, starts)
    assert list(live_branch(view)) == expected
    entries = entries_of(view)
    assert {one.id for one in entries} == set(parent)
    assert [one.id for one in entries if one.state == "live"] == expected


def test_reading_a_run_stops_where_no_commit_is_left() -> None:
    """A thousand starts of a run that keeps three checkpoints are not read. [RUN-53]"""
    store = memory_store()
    last = committed(store, begun(store, job=1), step=1)
    for step in range(2, 30):
        last = committed(store, begun(store, job=1, continued=last), step=step)
    for step in range(1, 27):
        store.remove(f"commits/{AttemptId(step, step, 1).register}")
    view = complete(read_view(store))
    assert sorted(view.starts) == [27, 28, 29]
