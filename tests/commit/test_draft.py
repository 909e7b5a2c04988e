"""Drafts: whose they are, which are swept, and what a writer meets whose draft was given up. [SAVE-24]"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastickpt.commit import draft as module
from elastickpt.commit.attest import attest
from elastickpt.commit.draft import (
    ABORTED,
    Draft,
    abort,
    begin,
    commit,
    is_draft,
    new_draft,
    process_start,
    require_free,
    require_token,
    sweep,
)
from elastickpt.errors import CheckpointError, MissingFile, PathOccupied, PlacementUnsupported, Refused, StorageFailed
from elastickpt.format.encode_manifest import encode_manifest
from elastickpt.format.records import FileDigest, FragmentMap, IndexEntry, Manifest
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import CallAt, FailAt, FaultyStore, Operation


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield LocalStore(tmp_path)
        return
    name = f"draft-{uuid.uuid4().hex}"
    yield MemoryStore(name)
    MemoryStore("").remove_tree(name)


def names(store: Store) -> set[str]:
    return {entry.name for entry in store.entries("")}


def owned(name: str, *, host: str | None = None, pid: int, start: int, aborted: bool = False) -> str:
    host = module._host_word() if host is None else host
    return f".{name}.draft-{host}-{pid}-{start}-{secrets.token_hex(8)}{ABORTED if aborted else ''}"


@pytest.fixture
def ended() -> tuple[int, int]:
    """(process id, start) of a process that is gone and reaped."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = process_start(process.pid)
    assert start is not None
    process.kill()
    process.communicate()
    return process.pid, start


# -- sweeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aborted", [False, True])
def test_drafts_of_a_process_that_is_gone_are_swept(store: Store, ended: tuple[int, int], aborted: bool) -> None:
    pid, start = ended
    folder = owned("a", pid=pid, start=start, aborted=aborted)
    store.make_directories(folder)
    store.make_directories(f"{folder}/params")
    store.create(f"{folder}/params/c", b"x")
    assert sweep(store, "a").removed == (folder,)
    assert names(store) == set()


def test_a_process_id_that_was_used_again_is_another_process(store: Store) -> None:
    mine = process_start(os.getpid())
    parent = process_start(os.getppid())
    assert mine is not None
    assert parent is not None
    again = owned("a", pid=os.getppid(), start=parent - 1)
    alive = owned("a", pid=os.getppid(), start=parent)
    for folder in (again, alive):
        store.make_directories(folder)
    report = sweep(store, "a")
    assert report.removed == (again,)
    assert [folder for folder, _ in report.left] == [alive]
    assert "still runs" in report.left[0][1]


def test_a_zombie_writes_no_more_though_its_process_id_is_taken(store: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = process_start(process.pid)
    assert start is not None
    folder = owned("a", pid=process.pid, start=start)
    store.make_directories(folder)
    assert sweep(store, "a").removed == ()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert sweep(store, "a").removed == (folder,)
    process.communicate()


def test_a_process_that_may_not_be_looked_at_is_taken_to_live(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `hidepid`, where /proc shows only one's own."""
    folder = owned("a", pid=os.getppid(), start=1)
    store.make_directories(folder)
    monkeypatch.setattr(module, "process_fields", lambda pid: None)
    monkeypatch.setattr(module.os, "kill", lambda pid, number: (_ for _ in ()).throw(PermissionError()))
    ((left, why),) = sweep(store, "a").left
    assert left == folder
    assert "does not show since when" in why


@pytest.mark.parametrize("host", ["other.0a1b2c3d.4026531836", "x", ""])
def test_drafts_of_other_hosts_are_left_and_named(store: Store, host: str) -> None:
    folder = owned("a", host=host, pid=1, start=1)
    store.make_directories(folder)
    report = sweep(store, "a")
    assert report.removed == ()
    assert [name for name, _ in report.left] == [folder]
    assert repr(host) in report.left[0][1]


def test_a_host_of_the_same_name_that_is_another_boot_is_another_host(store: Store, ended: tuple[int, int]) -> None:
    """Two machines with one name on one file system must not sweep each other's drafts."""
    pid, start = ended
    name, boot, namespace = module._host_word().rsplit(".", 2)
    other = f"{name}.{'0' * len(boot)}.{namespace}"
    store.make_directories(owned("a", host=other, pid=pid, start=start))
    assert len(sweep(store, "a").left) == 1


def test_drafts_of_other_names_are_not_touched(store: Store, ended: tuple[int, int]) -> None:
    pid, start = ended
    others = [owned(name, pid=pid, start=start) for name in ("b", "a.b", "a.draft-x", "aa", ".a", "a.aborted")]
    for folder in others:
        store.make_directories(folder)
    assert sweep(store, "a") == module.SweptDrafts((), ())
    assert names(store) == set(others)


@pytest.mark.parametrize(
    "name", ["a.draft-h-1-2-0123456789abcdef", "a b", "é" * 40, "x" * 200, ".hidden", "a.draft-", "step-7.aborted"]
)
def test_drafts_of_odd_names_are_found_again(store: Store, name: str, ended: tuple[int, int]) -> None:
    pid, start = ended
    mine = new_draft(name, pid=os.getpid())
    assert len(mine.folder.encode()) + len(ABORTED) <= 255
    assert is_draft(mine.folder)
    assert is_draft(mine.folder + ABORTED)
    folder = mine.folder.replace(f"-{os.getpid()}-{process_start(os.getpid())}-", f"-{pid}-{start}-")
    store.make_directories(folder)
    assert sweep(store, name).removed == (folder,)


@pytest.mark.parametrize(
    "folder",
    [
        ".a.draft-h-1-2-0123456789abcde",
        ".a.draft-h-1-2-0123456789ABCDEF",
        ".a.draft-h-0-2-0123456789abcdef",
        ".a.draft-h--1-2-0123456789abcdef",
        ".a.draft-h-1-0123456789abcdef",
        ".a.draft-h-1-2-0123456789abcdef.aborted.aborted",
        ".a.draft-h-1-2-0123456789abcdef.old",
        "a.draft-h-1-2-0123456789abcdef",
        "..draft-h-1-2-0123456789abcdef",
        ".a.draft-h-١-2-0123456789abcdef",
    ],
)
def test_names_that_are_no_drafts_are_not_touched(store: Store, folder: str) -> None:
    store.make_directories(folder)
    assert not is_draft(folder)
    assert sweep(store, "a") == module.SweptDrafts((), ())
    assert names(store) == {folder}


def test_a_process_id_beyond_any_is_gone(store: Store) -> None:
    folder = owned("a", pid=10**30, start=1)
    store.make_directories(folder)
    assert sweep(store, "a").removed == (folder,)


def test_only_folders_are_swept(tmp_path: Path, ended: tuple[int, int]) -> None:
    pid, start = ended
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    root = tmp_path / "root"
    root.mkdir()
    link, file = owned("a", pid=pid, start=start), owned("a", pid=pid, start=start)
    (root / link).symlink_to(elsewhere)
    (root / file).write_text("x")
    assert sweep(LocalStore(root), "a") == module.SweptDrafts((), ())
    assert (elsewhere / "kept").is_dir()
    assert sorted(path.name for path in root.iterdir()) == sorted([link, file])


def test_a_draft_that_cannot_be_removed_is_named_and_hinders_nobody(store: Store, ended: tuple[int, int]) -> None:
    pid, start = ended
    folder = owned("a", pid=pid, start=start)
    store.make_directories(folder)
    faulty = FaultyStore(store, FailAt(1, lasting="from then on"), counted=frozenset({"rename", "remove_tree"}))
    ((left, why),) = sweep(faulty, "a").left
    assert left == folder
    assert "cannot be removed" in why


def test_a_draft_under_way_in_this_process_is_left_and_one_that_ended_is_swept(store: Store) -> None:
    current, ended = new_draft("a", pid=os.getpid()), new_draft("a", pid=os.getpid())
    begin(store, current)
    begin(store, ended)
    abort(FaultyStore(store, FailAt(1, lasting="from then on")), ended)  # the store failed when it was given up
    report = sweep(store, "a")
    assert report.removed == (ended.folder,)
    assert report.left == ((current.folder, "this process is writing it"),)
    abort(store, current)
    assert names(store) == set()


# -- beginning, committing, giving up ------------------------------------------------------------------------------------


def test_the_name_of_a_draft_is_no_name_for_a_checkpoint(store: Store) -> None:
    with pytest.raises(Refused, match="one that drafts have"):
        require_free(store, ".a.draft-h-1-2-0123456789abcdef")


def test_a_store_that_fails_is_not_taken_for_an_occupied_path(store: Store) -> None:
    store.make_directories("a")
    with pytest.raises(StorageFailed):
        require_free(FaultyStore(store, FailAt(2)), "a")


def test_a_writer_that_sees_another_folder_refuses(store: Store) -> None:
    """[SAVE-21]"""
    mine = new_draft("a", pid=os.getpid())
    with pytest.raises(PlacementUnsupported):
        require_token(store, mine)
    begin(store, mine)
    require_token(store, mine)
    token = json.loads(store.read(mine.path("draft.json"), 1000))
    assert (token["format"], token["version"], token["attempt"], token["pid"]) == (
        "elastickpt-draft",
        1,
        mine.attempt,
        os.getpid(),
    )
    with pytest.raises(PlacementUnsupported):
        require_token(store, Draft("a", mine.folder, "0" * 16))
    abort(store, mine)


def recorded(store: Store, name: str) -> Draft:
    """A draft with the manifest of its attempt, as far as committing looks."""
    draft = new_draft(name, pid=os.getpid())
    begin(store, draft)
    manifest = Manifest(
        attempt=draft.attempt,
        step=1,
        time=0.0,
        world_size=1,
        placement="plain",
        versions=(),
        items=(),
        meshes=(),
        layouts=(),
        index=(IndexEntry(FileDigest("index.msgpack", 1, "0" * 32), "", ""),),
        fragments=(FileDigest("fragments/00000.msgpack", 1, "0" * 32),),
        values={},
        tied=(),
    )
    store.create(draft.path("checkpoint.json"), encode_manifest(manifest))
    return draft


def test_a_rename_whose_answer_was_lost_is_a_commit(store: Store) -> None:
    """[SAVE-56]"""
    draft = recorded(store, "a")
    commit(FaultyStore(store, FailAt(1, mode="after")), draft)
    assert names(store) == {"a"}


def test_a_rename_that_failed_is_none(store: Store) -> None:
    draft = recorded(store, "a")
    with pytest.raises(StorageFailed) as caught:
        commit(FaultyStore(store, FailAt(1)), draft)
    assert "not known" not in caught.value.message
    abort(store, draft)
    assert names(store) == set()


@pytest.mark.parametrize("mode", ["before", "after"])
def test_where_nobody_can_look_the_error_says_so(store: Store, mode: str) -> None:
    draft = recorded(store, "a")
    with pytest.raises(StorageFailed, match="whether it was committed is not known"):
        commit(FaultyStore(store, FailAt(1, mode=mode, lasting="from then on")), draft)  # type: ignore[arg-type]
    abort(store, draft)
    assert names(store) == ({"a"} if mode == "after" else set())


@pytest.mark.parametrize("other", ["checkpoint", "rubbish"])
def test_of_two_attempts_at_one_path_the_first_wins(store: Store, other: str) -> None:
    """[SAVE-52]"""
    late = recorded(store, "a")
    if other == "checkpoint":
        commit(store, recorded(store, "a"))
    else:
        store.make_directories("a")
        store.create("a/checkpoint.json", b"rubbish")
    before = store.read("a/checkpoint.json", 10000)
    with pytest.raises(PathOccupied):
        commit(store, late)
    abort(store, late)
    assert names(store) == {"a"}
    assert store.read("a/checkpoint.json", 10000) == before


def test_a_late_committer_finds_nothing_to_rename(store: Store) -> None:
    """[SAVE-55]"""
    draft = recorded(store, "a")
    abort(store, draft)
    with pytest.raises(MissingFile):
        commit(store, draft)
    assert names(store) == set()


def test_giving_up_hides_no_other_error(store: Store) -> None:
    draft = new_draft("a", pid=os.getpid())
    abort(store, draft)  # never begun
    begin(store, draft)
    occupied = FaultyStore(store, FailAt(2, errno=39))  # ENOTEMPTY, as when a writer adds a file while the tree is removed
    abort(occupied, draft)
    assert names(store) == {draft.folder + ABORTED}
    assert sweep(store, "a").removed == (draft.folder + ABORTED,)


# -- a writer whose draft is given up while it writes ----------------------------------------------------------------------


def write_all(store: Store, draft: Draft) -> None:
    """What a member does, in the order in which it does it."""
    require_token(store, draft)
    for name in ("w", "v"):
        store.make_directories(draft.path(f"params/m/{name}/value"))
        store.create(draft.path(f"params/m/{name}/value/zarr.json"), b"{}")
        writer = store.open_writer(draft.path(f"params/m/{name}/value/c.0"), 8)
        try:
            writer.write(0, memoryview(b"abcdefgh"))
            writer.sync()
        finally:
            writer.close()
    attest(store, draft, FragmentMap(0, draft.attempt, 1 << 18, (), (), (), {}), durability="process")


def test_a_writer_meets_an_error_and_never_brings_the_draft_back(store: Store) -> None:
    """Given up at every single operation of the writer."""
    for n in range(1, 100):
        draft = new_draft("a", pid=os.getpid())
        begin(store, draft)

        def give_up(operation: Operation, draft: Draft = draft) -> None:
            abort(store, draft)

        faulty = FaultyStore(store, CallAt(n, give_up))
        try:
            write_all(faulty, draft)
        except CheckpointError:
            assert faulty.struck is not None
        else:
            assert faulty.struck is None
            break
        assert names(store) == set(), faulty.struck
    assert n > 12
    abort(store, draft)


def write_much(store: Store, draft: Draft, member: int) -> CheckpointError | None:
    try:
        for number in range(1000):
            store.make_directories(draft.path(f"params/{member}/{number}"))
            store.create(draft.path(f"params/{member}/{number}/c"), b"x")
    except CheckpointError as error:
        return error
    return None


def test_writers_that_race_with_giving_up_never_bring_the_draft_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        for attempt in range(12):
            draft = new_draft("a", pid=os.getpid())
            begin(store, draft)
            writers = [pool.submit(write_much, store, draft, member) for member in range(2)]
            while attempt % 3 and not (tmp_path / draft.folder / "params").exists():
                pass
            abort(store, draft)
            assert [type(writer.result()) for writer in writers] == [MissingFile] * 2
            assert names(store) <= {draft.folder + ABORTED}  # where a file came in between
            sweep(store, "a")
            assert names(store) == set()


def test_a_stopped_writer_cannot_change_a_committed_checkpoint(tmp_path: Path) -> None:
    """Its open file is that of the aborted draft, whatever stands at the path by then."""
    store = LocalStore(tmp_path)
    first, second = recorded(store, "a"), recorded(store, "a")
    store.make_directories(first.path("params"))
    store.make_directories(second.path("params"))
    late = store.open_writer(first.path("params/c"), 4)
    abort(store, first)
    right = store.open_writer(second.path("params/c"), 4)
    right.write(0, memoryview(b"good"))
    right.close()
    commit(store, second)
    late.write(0, memoryview(b"late"))
    late.close()
    assert store.read("a/params/c", 4) == b"good"
    assert names(store) == {"a"}


def test_a_draft_is_swept_only_after_its_process_ended(tmp_path: Path) -> None:
    """With a real process: stopped is not gone."""
    store = LocalStore(tmp_path)
    code = (
        "import os, sys; from elastickpt.commit.draft import begin, new_draft; "
        "from elastickpt.storage.local import LocalStore; "
        "begin(LocalStore(sys.argv[1]), new_draft('a', pid=os.getpid())); print('begun', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    assert len(sweep(store, "a").left) == 1
    process.kill()
    process.communicate()
    assert len(sweep(store, "a").removed) == 1
    assert names(store) == set()
