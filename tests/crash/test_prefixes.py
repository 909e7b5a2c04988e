"""A power cut after every prefix of a save's operations, with what is not synced lost, kept or torn."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence

import pytest
from journal_store import FATES, KEPT, LOST, TORN, Change, Fate, JournalStore, after_power_cut, drawn
from simulated import files, require_absent_or_whole, require_whole, save_on, state

from elastickpt.errors import CheckpointError
from elastickpt.layout import packs, placement
from elastickpt.saving.request import PlacementChoice
from elastickpt.saving.save import CheckpointInfo
from elastickpt.storage.memory import MemoryStore

OLD, NEW = state(1), state(2)
NAMES = itertools.count()


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MIN_SPLIT_NBYTES", 8)
    monkeypatch.setattr(packs, "WHOLE_NBYTES", 8)


@pytest.fixture
def top() -> Iterator[str]:
    name = f"prefixes-{uuid.uuid4().hex}"
    yield name
    MemoryStore("").remove_tree(name)


def two_saves(
    top: str, world: int, *, tree_sync: bool = False, placement: PlacementChoice = "plain"
) -> tuple[tuple[Change, ...], int]:
    """The journal of a save at `old` and one at `new`, and how much of it is the first."""
    store = JournalStore(f"{top}/journal", tree_sync=tree_sync)
    for name, value in (("old", OLD), ("new", NEW)):
        assert all(
            isinstance(outcome, CheckpointInfo)
            for outcome in save_on([store] * world, name, [value] * world, placement=placement)
        )
        if name == "old":
            acknowledged = len(store.journal)
    return store.journal, acknowledged


def judge(journal: Sequence[Change], acknowledged: int, fates: Sequence[Fate], top: str) -> int:
    """After every prefix and every fate, what was acknowledged is whole, and what was not is absent or whole."""
    states = 0
    for length in range(len(journal) + 1):
        for fate in fates:
            left = after_power_cut(journal[:length], fate, name=f"{top}/{next(NAMES)}")
            try:
                old = require_absent_or_whole(left, "old", OLD)
                new = require_absent_or_whole(left, "new", NEW)
                assert old or length < acknowledged
                assert new or length < len(journal)
            except BaseException as error:
                error.add_note(
                    f"after {length} of {len(journal)} changes, the last {journal[length - 1 : length]}; {fate.name}"
                )
                raise
            MemoryStore("").remove_tree(f"{top}/{next(NAMES) - 1}")
            states += 1
    return states


@pytest.mark.parametrize("world", [1, 2])
def test_a_power_cut_after_every_change_leaves_what_was_acknowledged(top: str, world: int) -> None:
    """[SAVE-1, SAVE-53, SAVE-60]"""
    journal, acknowledged = two_saves(top, world)
    assert judge(journal, acknowledged, [*FATES, *map(drawn, range(3))], top) > 400


def test_a_power_cut_after_every_change_of_packs(top: str) -> None:
    """Whole or absent, with references and without. [SAVE-1, SAVE-60, UCF-162]"""
    journal, acknowledged = two_saves(top, 2, placement="packed")
    assert any("/packs/" in change.path for change in journal)
    assert judge(journal, acknowledged, [*FATES, drawn(0)], top) > 200


@pytest.mark.parametrize("beside", [False, True], ids=["one", "another while data is written"])
def test_a_power_cut_with_one_sync_of_the_whole_tree(top: str, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    if beside:
        monkeypatch.setattr("elastickpt.writer.write_files.SIDE_BY_SIDE_NBYTES", 0)
    monkeypatch.setattr("elastickpt.writer.write_files.SYNC_TREE_FILES", 0)
    monkeypatch.setattr("elastickpt.commit.record.SYNC_TREE_FILES", 0)
    journal, acknowledged = two_saves(top, 2, tree_sync=True)
    assert {change.verb for change in journal} >= {"sync tree"}
    assert judge(journal, acknowledged, [*FATES, *map(drawn, range(3))], top) > 300


@pytest.mark.long
@pytest.mark.parametrize(("tree_sync", "placement"), [(False, "plain"), (True, "plain"), (False, "packed")])
def test_many_drawn_states_of_every_prefix(
    top: str, tree_sync: bool, placement: PlacementChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tree_sync:
        monkeypatch.setattr("elastickpt.writer.write_files.SYNC_TREE_FILES", 0)
        monkeypatch.setattr("elastickpt.commit.record.SYNC_TREE_FILES", 0)
    journal, acknowledged = two_saves(top, 2, tree_sync=tree_sync, placement=placement)
    assert judge(journal, acknowledged, [drawn(seed) for seed in range(60)], top) > 3000


def test_the_next_save_works_after_every_power_cut(top: str) -> None:
    journal, acknowledged = two_saves(top, 1)
    for length in range(acknowledged, len(journal)):
        for fate in (KEPT, TORN):
            left = JournalStore(f"{top}/{length}-{fate is KEPT}")
            survived = after_power_cut(journal[:length], fate, name=f"{top}/{length}-{fate is KEPT}")
            name = "other" if survived.exists("new") else "new"
            (outcome,) = save_on([left], name, [NEW])
            assert isinstance(outcome, CheckpointInfo), (length, outcome)
            require_whole(left, name, NEW)
            require_whole(left, "old", OLD)


def creations(journal: Sequence[Change]) -> list[str]:
    return [change.path.partition("/")[2] for change in journal if change.verb == "create"]


def test_a_writer_attests_last_and_what_it_attests_is_durable(top: str) -> None:
    """Chunks and documents survive from the moment on at which the fragment file exists, whatever else is lost. [SAVE-45]"""
    journal, acknowledged = two_saves(top, 1)
    first = journal[:acknowledged]
    attested = next(n for n, change in enumerate(first) if change.path.endswith("fragments/00000.msgpack"))
    written = {change.path for change in first[:attested] if change.verb in ("write", "create") and "/params/" in change.path}
    assert len(written) == 5
    final = files(after_power_cut(first, KEPT, name=f"{top}/final"), "old")
    torn = after_power_cut(first[: attested + 1], TORN, name=f"{top}/torn")
    for path in written:
        assert torn.read(path, 10_000) == final[f"old/{path.partition('/')[2]}"], path
    assert [change for change in first[attested:] if change.path in written and change.verb != "sync"] == []


def test_the_manifest_is_created_after_all_that_it_names_and_nothing_after_it(top: str) -> None:
    """[SAVE-51]"""
    journal, acknowledged = two_saves(top, 2)
    assert creations(journal[:acknowledged])[-1] == "checkpoint.json"
    assert [change.verb for change in journal if change.path.endswith("draft.json")] == ["create", "remove"] * 2


def test_writers_change_nothing_outside_the_draft_but_for_the_commit(top: str) -> None:
    """[SAVE-20]"""
    journal, _ = two_saves(top, 2)
    outside = [change for change in journal if not change.path.startswith((".old.draft-", ".new.draft-"))]
    assert outside == [Change("sync", "")] * 2
    assert [change.target for change in journal if change.verb == "rename"] == ["old", "new"]


# -- the model itself: each sync is missed when it is not done -----------------------------------------------------------


def without(journal: Sequence[Change], place: int) -> list[Change]:
    return [change for number, change in enumerate(journal) if number != place]


def test_a_sync_left_out_is_seen(top: str) -> None:
    """Every single one, but for the folders that the writer and the committer both sync."""
    journal, _ = two_saves(top, 1)
    last = len(journal) - 1
    assert journal[last] == Change("sync", "")
    in_draft = [n for n, change in enumerate(journal) if change.verb == "sync" and ".old.draft-" in change.path]
    unseen = {journal[place].path.partition("/")[2] for place in in_draft if survives(without(journal, place), "old", top)}
    assert unseen == {"fragments", "params", "params/model"}
    assert not survives(without(journal, last), "new", top)


def survives(journal: Sequence[Change], name: str, top: str) -> bool:
    for fate in (LOST, TORN):
        left = after_power_cut(journal, fate, name=f"{top}/{next(NAMES)}")
        try:
            require_whole(left, name, OLD if name == "old" else NEW)
        except (CheckpointError, AssertionError):
            return False
    return True


def test_what_is_synced_survives_and_what_is_not_may_be_lost(top: str) -> None:
    store = JournalStore(f"{top}/small")
    store.make_directories("a")
    store.create("a/named", b"content")
    store.sync_directory("a")
    store.sync_directory("")
    with_content = JournalStore(f"{top}/content")
    with_content.create("file", b"content")
    with_content.sync_file("file")
    assert files(after_power_cut(store.journal, LOST, name=f"{top}/1"), "a") == {"a/named": b""}
    assert after_power_cut(with_content.journal, LOST, name=f"{top}/2").entries("") == ()
    assert files(after_power_cut(store.journal, KEPT, name=f"{top}/3"), "a") == {"a/named": b"content"}
