"""The link for people. [RUN-58]"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_actors import W, begun, committed, memory_store

from elastickpt.errors import NotACheckpoint
from elastickpt.ledger.branch import history, point_latest
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.removal import remove_commits, sweep
from elastickpt.runs.opening import open_checkpoint
from elastickpt.storage.links import replace_link
from elastickpt.storage.local import LocalStore


def test_it_names_the_newest_of_the_live_branch_whatever_happens(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = begun(store, job=1)
    assert complete(point_latest(store)) is None
    assert not os.path.lexists(tmp_path / "latest")
    ids = [committed(store, first, step=step) for step in (10, 20)]
    assert complete(point_latest(store)) == ids[1]
    assert os.readlink(tmp_path / "latest") == "step-0000000020.1.1"
    assert (tmp_path / "latest" / "checkpoint.json").read_bytes() == b"whole"
    second = begun(store, job=1, continued=W)  # a rollback
    assert complete(point_latest(store)) == W
    complete(remove_commits(store, second, commits=ids))
    assert complete(point_latest(store)) is None
    assert not os.path.lexists(tmp_path / "latest")


def test_nothing_of_ours_finds_or_removes_anything_by_it(tmp_path: Path) -> None:
    """Retention and sweeping go by the names of attempts; a link that dangles, or has one of those names, is passed over."""
    store = LocalStore(tmp_path)
    holding = begun(store, job=1)
    committed(store, holding, step=10)
    committed(store, holding, step=20)
    complete(point_latest(store))
    os.symlink("step-0000000010.1.1", tmp_path / "step-0000000015.1.1")
    before = history(tmp_path)
    assert complete(sweep(store, holding)).removed == ()
    complete(remove_commits(store, holding, commits=[AttemptId(20, 1, 1)]))
    assert os.path.islink(tmp_path / "latest")
    assert not (tmp_path / "latest").exists()
    assert history(tmp_path) == before[1:]
    with pytest.raises(NotACheckpoint):
        open_checkpoint(tmp_path / "latest")
    assert complete(point_latest(store)) == W


def test_what_is_no_link_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    committed(store, begun(store, job=1), step=10)
    (tmp_path / "latest").write_text("mine")
    assert complete(point_latest(store)) is None
    assert (tmp_path / "latest").read_text() == "mine"


def test_a_store_without_links_has_none() -> None:
    store = memory_store()
    committed(store, begun(store, job=1), step=10)
    before = store.entries("")
    assert complete(point_latest(store)) is None
    assert store.entries("") == before


def test_leftovers_of_one_that_was_killed_go_and_other_links_stay(tmp_path: Path) -> None:
    os.symlink("a", tmp_path / f".latest.{'0' * 16}.tmp")
    os.symlink("b", tmp_path / ".latest.tmp")
    assert replace_link(LocalStore(tmp_path), "latest", "c")
    assert sorted(os.listdir(tmp_path)) == [".latest.tmp", "latest"]


def test_it_is_there_at_every_moment_and_of_many_at_once_one_holds(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    replace_link(store, "latest", "step-0")

    def point(n: int) -> str:
        assert replace_link(store, "latest", f"step-{n}")
        return os.readlink(tmp_path / "latest")

    with ThreadPoolExecutor(4) as pool:
        assert {name[:5] for name in pool.map(point, range(200))} == {"step-"}
    replace_link(store, "latest", "step-1")
    assert os.listdir(tmp_path) == ["latest"]
