"""What a save does to its store, in order, and what stands after a crash at every operation: spec/save-protocol.md."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.commit import attempt, outcome
from elastickpt.commit import draft as drafting
from elastickpt.commit.outcome import STEPS, CommitState
from elastickpt.errors import CheckpointError, CoverageGap, PathOccupied, ValueNotCarried
from elastickpt.format.piece_columns import FragmentColumns, columns_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import CHANGING, CallAt, Crash, CrashAt, FailAt, Fault, FaultyStore, Operation, RecordingStore
from elastickpt.writer import share as sharing

PACKAGE = Path(__file__).parent.parent.parent / "elastickpt"
SaveTo = Callable[..., ek.CheckpointInfo]


def state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(6, 4, generator=generator), "y": torch.randn(3, generator=generator), "note": seed}


@pytest.fixture
def save_to(monkeypatch: pytest.MonkeyPatch) -> SaveTo:
    """Saves through a given store, as `name` in it."""

    def save(store: Store, name: str, held: dict[str, Any] | None = None) -> ek.CheckpointInfo:
        monkeypatch.setattr(attempt, "locate_for_saving", lambda path: (store, path))
        return ek.save(state(2) if held is None else held, name, step=1)

    return save


@pytest.fixture
def recorded(tmp_path: Path, save_to: SaveTo) -> list[Operation]:
    """The operations of one save that change the store, each as (name, path below the draft)."""
    store = RecordingStore(LocalStore(tmp_path))
    save_to(store, "new")
    return [operation for operation in store.operations if operation.name in CHANGING]


def _draft(operations: list[Operation]) -> str:
    return operations[0].path


def _places(operations: list[Operation], name: str, path: str = "") -> list[int]:
    """Where operations of this name, on paths that hold `path`, stand in the order."""
    return [k for k, one in enumerate(operations) if one.name == name and path in one.path]


def test_everything_is_written_below_the_draft(recorded: list[Operation]) -> None:
    """[SAVE-20]"""
    draft = _draft(recorded)
    assert draft.startswith(".new.draft-")
    outside = [one for one in recorded if one.path != draft and not one.path.startswith(f"{draft}/")]
    assert [(one.name, one.path) for one in outside] == [("sync_directory", "")]


def test_the_token_is_first_and_gone_before_the_commit(recorded: list[Operation]) -> None:
    """[SAVE-21, SAVE-22]"""
    (created,), (removed,), (renamed,) = (
        _places(recorded, "create", "/draft.json"),
        _places(recorded, "remove", "/draft.json"),
        _places(recorded, "rename"),
    )
    assert created == 1
    assert _places(recorded, "create", "checkpoint.json")[0] < removed < renamed


def test_a_chunk_file_has_its_length_first_and_is_synced_through_what_wrote_it(recorded: list[Operation]) -> None:
    """[SAVE-40, SAVE-41]"""
    written = {one.path for one in recorded if one.name == "writer.write"}
    assert len(written) == 2
    for path in written:
        opened = _places(recorded, "open_writer", path)
        writes = _places(recorded, "writer.write", path)
        synced = _places(recorded, "writer.sync", path)
        assert len(opened) == len(synced) == 1
        assert opened[0] < min(writes) <= max(writes) < synced[0] < _places(recorded, "writer.close", path)[0]


def test_a_fragment_file_is_created_once_when_all_that_it_names_is_durable(recorded: list[Operation]) -> None:
    """[SAVE-45]"""
    (attested,) = _places(recorded, "create", "/fragments/00000.msgpack")
    assert max(_places(recorded, "writer.sync")) < attested
    for path in {one.path.rpartition("/")[0] for one in recorded if one.name == "writer.write"}:
        assert any(place < attested for place in _places(recorded, "sync_directory", path))
    assert attested < _places(recorded, "sync_file", "/fragments/00000.msgpack")[0] < _places(recorded, "create", "index")[0]


def test_the_manifest_is_the_last_file_and_all_is_durable_before_the_rename(recorded: list[Operation]) -> None:
    """[SAVE-51, SAVE-53]"""
    creations = [one.path for one in recorded if one.name == "create"]
    assert creations[-1].endswith("/checkpoint.json")
    assert len(set(creations)) == len(creations)
    (renamed,) = _places(recorded, "rename")
    synced = {one.path for one in recorded[:renamed] if one.name == "sync_file"}
    assert synced | {creations[0]} == set(creations)  # all but the token
    folders = {one.path for one in recorded[:renamed] if one.name == "sync_directory"}
    assert {one.path for one in recorded if one.name == "make_directories"} <= folders | {f"{_draft(recorded)}/extra"}
    assert [(one.name, one.path) for one in recorded[renamed + 1 :]] == [("sync_directory", "")]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _crash(folder: Path, save_to: SaveTo, fault: Fault) -> Operation | None:
    store = FaultyStore(LocalStore(folder), fault, counted=CHANGING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "process_start", lambda pid: 1)  # so that the draft's process counts as gone afterwards
        with suppress(Crash, CheckpointError):
            save_to(store, "new")
    return store.struck


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """In memory if the machine has such a folder: hundreds of syncs."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=root, prefix="elastickpt-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("mode", ["before", "after", "torn"])
def test_the_table_of_crash_points(fast_path: Path, save_to: SaveTo, mode: Any) -> None:
    """[SAVE-3, SAVE-4, SAVE-24, SAVE-60]"""
    seen = set()
    for n in range(1, 200):
        folder = fast_path / str(n)
        folder.mkdir()
        save_to(LocalStore(folder), "old", state(1))
        before = _files(folder)
        struck = _crash(folder, save_to, CrashAt(n, mode))
        whole = (folder / "new").exists()
        beside = [path for path in folder.iterdir() if path.name not in ("old", "new")]
        if struck is None:
            assert (whole, beside) == (True, [])
            break
        seen.add(_point(struck, whole=whole, beside=beside))
        assert {path: data for path, data in _files(folder).items() if path.startswith("old/")} == before
        if whole:
            assert ek.open(folder / "new").verify().sound
            assert beside == []
            continue
        info = save_to(LocalStore(folder), "new")
        assert len(info.notes) == len(beside)
        assert sorted(path.name for path in folder.iterdir()) == ["new", "old"]
        assert ek.open(folder / "new").verify().sound
    assert seen >= {"token", "token and manifest", "whole draft", "committed"}


def _point(struck: Operation, *, whole: bool, beside: list[Path]) -> str:
    """The row of the table."""
    if whole:
        return "committed"
    if not beside:
        return "nothing"
    (draft,) = beside
    held = {path.name for path in draft.iterdir()}
    if "draft.json" in held:
        return "token and manifest" if "checkpoint.json" in held else "token"
    return "whole draft" if "checkpoint.json" in held else "empty draft"


def test_a_failure_gives_up_the_draft_under_another_name_first(tmp_path: Path, save_to: SaveTo) -> None:
    """[SAVE-55, SAVE-57]"""
    save_to(LocalStore(tmp_path), "old", state(1))
    before = _files(tmp_path)
    faulty = FaultyStore(LocalStore(tmp_path), FailAt(1), counted=frozenset({"writer.sync"}))
    store = RecordingStore(faulty)
    with pytest.raises(CheckpointError):
        save_to(store, "new")
    last = [one for one in store.operations if one.name in CHANGING][-2:]
    assert [one.name for one in last] == ["rename", "remove_tree"]
    assert last[1].path == f"{last[0].path}.aborted"
    assert _files(tmp_path) == before
    save_to(LocalStore(tmp_path), "new")
    assert ek.open(tmp_path / "new").verify().sound


@pytest.mark.parametrize("what", ["file", "folder", "checkpoint"])
def test_an_occupied_path_is_refused_before_a_byte_is_written(tmp_path: Path, save_to: SaveTo, what: str) -> None:
    """[SAVE-31]"""
    if what == "file":
        (tmp_path / "new").write_text("x")
    elif what == "folder":
        (tmp_path / "new" / "deeper").mkdir(parents=True)
    else:
        save_to(LocalStore(tmp_path), "new")
    before = _files(tmp_path)
    store = RecordingStore(LocalStore(tmp_path))
    with pytest.raises(PathOccupied):
        save_to(store, "new")
    assert [one for one in store.operations if one.name in CHANGING] == []
    assert _files(tmp_path) == before


def test_a_path_that_is_taken_meanwhile_stays_as_it_is(tmp_path: Path, save_to: SaveTo) -> None:
    """[SAVE-52]"""
    other = tmp_path / "new"

    def take(operation: Operation) -> None:
        other.mkdir()
        (other / "mine").write_text("x")

    store = FaultyStore(LocalStore(tmp_path), CallAt(1, take), counted=frozenset({"rename"}))
    with pytest.raises(PathOccupied):
        save_to(store, "new")
    assert _files(tmp_path) == {"new/mine": b"x"}


def test_a_value_that_cannot_be_carried_is_refused_before_a_byte_is_written(tmp_path: Path, save_to: SaveTo) -> None:
    """[SAVE-32]"""
    store = RecordingStore(LocalStore(tmp_path))
    with pytest.raises(ValueNotCarried, match="/what"):
        save_to(store, "new", {"x": torch.ones(2), "what": lambda: None})
    assert [one for one in store.operations if one.name in CHANGING] == []


def test_a_gap_is_never_committed(tmp_path: Path, save_to: SaveTo, monkeypatch: pytest.MonkeyPatch) -> None:
    """[SAVE-50]"""
    whole = sharing.fragments_of

    def without_the_first(*given: Any, **options: Any) -> FragmentColumns:
        found = whole(*given, **options)
        return replace(found, pieces=columns_of(found.pieces.objects()[1:]))

    monkeypatch.setattr(sharing, "fragments_of", without_the_first)
    with pytest.raises(CoverageGap):
        save_to(LocalStore(tmp_path), "new")
    assert list(tmp_path.iterdir()) == []


def test_no_step_of_a_commit_leads_back() -> None:
    """From each state straight to the end; nothing that is committed is undone."""
    for state in CommitState:
        way = [state]
        while way[-1] is not CommitState.SETTLED:
            way.append(STEPS[way[-1]].then)
        assert len(set(way)) == len(way)
        assert state is CommitState.SETTLED or CommitState.COMMITTED in way


@pytest.mark.parametrize("missing", [CommitState.ATTESTED, CommitState.PROVEN, CommitState.RECORDED, CommitState.COMMITTED])
def test_a_state_without_a_step_fails_the_save(
    tmp_path: Path, save_to: SaveTo, monkeypatch: pytest.MonkeyPatch, missing: CommitState
) -> None:
    """The table drives the commit: without a row it does not go on."""
    monkeypatch.setattr(outcome, "STEPS", {state: step for state, step in STEPS.items() if state is not missing})
    with pytest.raises(CheckpointError, match=f"no step leads on from {missing}"):
        save_to(LocalStore(tmp_path), "new")
    assert os.listdir(tmp_path) == (["new"] if missing is CommitState.COMMITTED else [])


COLLECTIVES = {"all_reduce", "all_gather", "all_gather_object", "all_to_all", "barrier", "broadcast", "broadcast_object_list"}
COLLECTIVES |= {"gather", "gather_object", "reduce", "reduce_scatter", "scatter", "scatter_object_list", "send", "recv"}


def test_saving_and_loading_call_no_collective() -> None:
    """[SAVE-66]"""
    called = set()
    for layer in ("ranks", "commit", "saving", "loading", "training"):
        for path in (PACKAGE / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id in ("dist", "distributed_c10d")
                ):
                    called.add(node.attr)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                    called |= {name.name for name in node.names}
    assert "get_rank" in called
    assert not called & COLLECTIVES
