"""What goes wrong between the steps of a save: paths that do not last, drafts that look whole, one rank that gives up alone."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from journal_store import JournalStore
from simulated import drafts, opened, save_on, state

import elastickpt as ek
from elastickpt.errors import CheckpointError, NoSpace, RankLost, Refused, Uncommitted
from elastickpt.saving import agree as agreeing
from elastickpt.saving.save import CheckpointInfo
from elastickpt.saving.structures import KNOWN
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import locate_for_saving
from elastickpt.testing.faults import CrashAt, FailAt, FaultyStore, Operation, RecordingStore


def test_parents_that_a_save_makes_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of each new folder is in one that was synced after it was made."""
    synced: list[tuple[str, frozenset[str]]] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        folder = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((folder, frozenset(os.listdir(folder))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    locate_for_saving(tmp_path / "a" / "b" / "c" / "step-1")
    assert synced == [
        (str(tmp_path), frozenset({"a"})),
        (str(tmp_path / "a"), frozenset({"b"})),
        (str(tmp_path / "a" / "b"), frozenset({"c"})),
    ]
    locate_for_saving(tmp_path / "a" / "b" / "c" / "step-2")
    assert len(synced) == 3


@pytest.fixture
def whole_draft(tmp_path: Path) -> Path:
    """A draft that has all of a checkpoint, its writer having died just before the commit."""
    store = LocalStore(tmp_path)
    recording = RecordingStore(store)
    assert isinstance(save_on([recording], "first", [state(1)])[0], CheckpointInfo)
    rename = next(operation.index for operation in recording.operations if operation.name == "rename")
    save_on([FaultyStore(store, CrashAt(rename))], "new", [state(1)])
    (name,) = drafts(store)
    return tmp_path / name


def test_a_draft_that_is_whole_is_no_checkpoint(whole_draft: Path) -> None:
    """Its token is gone, so that it could be renamed: its name says what it is. [SAVE-22, SAVE-23]"""
    assert not (whole_draft / "draft.json").exists()
    assert (whole_draft / "checkpoint.json").exists()
    with pytest.raises(Uncommitted):
        ek.open(whole_draft)
    aborted = whole_draft.rename(whole_draft.with_name(whole_draft.name + ".aborted"))
    with pytest.raises(Uncommitted):
        ek.open(aborted)


def test_a_folder_with_a_token_is_no_checkpoint_whatever_it_is_called(whole_draft: Path) -> None:
    named = whole_draft.rename(whole_draft.with_name("named"))
    assert ek.open(named).verify().sound
    (named / "draft.json").write_text("{}")
    with pytest.raises(Uncommitted):
        ek.open(named)


def test_no_checkpoint_can_be_saved_under_the_name_of_a_draft(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one that drafts have"):
        ek.save(state(1), tmp_path / ".a.draft-h-1-2-0123456789abcdef")


def test_a_rank_that_fails_between_rounds_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the silence limit, which would be 20 s here; and all can save again after meeting again."""
    store = LocalStore(tmp_path)
    plan_writes = agreeing.plan_writes

    def fails_on_one(*args: object, rank: int) -> object:
        if rank == 1:
            raise MemoryError("no memory for the plan")
        return plan_writes(*args, rank=rank)  # type: ignore[arg-type]

    monkeypatch.setattr(agreeing, "plan_writes", fails_on_one)
    monkeypatch.setattr(KNOWN, "_known", OrderedDict())
    committer, other = save_on([store, store], "new", [state(1)] * 2)
    assert isinstance(committer, RankLost)
    assert committer.report[0].rank == 1
    assert isinstance(other, MemoryError)
    assert drafts(store) == []
    assert not store.exists("new")


def test_the_first_error_is_reported_and_not_that_of_cleaning_up(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first: list[Operation] = []

    class Full(FaultyStore):
        """No space for the first write, input/output errors for all that follows it."""

        def _do(self, act, whole):  # type: ignore[no-untyped-def]
            try:
                return super()._do(act, whole)
            except CheckpointError as error:
                if first and act.name == "writer.close":
                    raise type(error)("closing failed too") from error
                first.append(Operation(0, act.name, act.path, ""))
                raise

    faulty = Full(store, FailAt(1, errno.ENOSPC, lasting="from then on"), counted=frozenset({"writer.write", "writer.close"}))
    (outcome,) = save_on([faulty], "new", [{"t": torch.ones(3)}])
    assert isinstance(outcome, NoSpace)
    assert "closing failed" not in outcome.message


def test_saving_twice_through_one_store_leaves_nothing_behind() -> None:
    store = JournalStore("seams-twice")
    for name in ("one", "two"):
        (outcome,) = save_on([store], name, [state(1)])
        assert isinstance(outcome, CheckpointInfo)
    assert sorted(entry.name for entry in store.entries("")) == ["one", "two"]
    assert opened(store, "one").verify().sound
    store.remove_tree("one")
    store.remove_tree("two")
