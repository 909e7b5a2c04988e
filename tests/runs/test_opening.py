"""What people write for a checkpoint of a run, and what it opens. [RUN-55..62]"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_actors import begun, by, commit_of, memory_store

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch, Damaged, MissingFile, NotACheckpoint, Refused, Uncommitted
from elastickpt.format.digest import file_digest
from elastickpt.ledger.branch import nearest_text
from elastickpt.ledger.epochs import Holding, claim, decide, open_attempt
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import AbortRegister
from elastickpt.loading.opened import open_records
from elastickpt.runs.opening import Choice, choose, run_at
from elastickpt.storage.local import LocalStore

GOLDEN = Path(__file__).parents[1] / "golden" / "v1-by-0.1.0" / "checkpoint.json"


def written(store: LocalStore, root: Path, holding: Holding, *, step: int) -> AttemptId:
    """An attempt with nothing but a manifest, which is all that opening reads; its register is another matter."""
    attempt = complete(open_attempt(store, holding, step=step))
    (root / attempt.folder).mkdir()
    shutil.copy(GOLDEN, root / attempt.folder)
    return attempt


def committed(store: LocalStore, root: Path, holding: Holding, *, step: int) -> AttemptId:
    attempt = written(store, root, holding, step=step)
    complete(decide(store, commit_of(attempt, digest=file_digest(GOLDEN.read_bytes()))))
    return attempt


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Epoch 1 commits 10, 20, 30; epoch 2 goes on from 20 and commits 30, 40; 50 and 60 are under way and aborted."""
    path = tmp_path / "llama"
    path.mkdir()
    store = LocalStore(path)
    first = begun(store, job=1)
    ids = [committed(store, path, first, step=step) for step in (10, 20, 30)]
    second = begun(store, job=2, continued=ids[1])
    for step in (30, 40):
        committed(store, path, second, step=step)
    written(store, path, second, step=50)
    complete(decide(store, AbortRegister(written(store, path, second, step=60), "no space")))
    return path


def folder(path: object, **about: int) -> str:
    return Path(ek.open(str(path), **about).path).name


def test_a_step_is_of_the_live_branch_unless_an_epoch_is_named(root: Path) -> None:
    """[RUN-60, RUN-62]"""
    assert folder(root, step=30) == folder(f"{root}@30") == "step-0000000030.2.1"
    assert folder(root, step=30, epoch=1) == folder(f"{root}@30.1") == "step-0000000030.1.1"
    assert folder(f"{root}@10") == folder(f"{root}@0010") == "step-0000000010.1.1"
    assert folder(root) == folder(f"{root}@latest") == folder(f"{root}/") == "step-0000000040.2.1"
    assert folder(root / "step-0000000030.1.1") == "step-0000000030.1.1"


def test_other_stores_are_asked_alike() -> None:
    store = memory_store()
    holding = begun(store, job=1)
    attempt = complete(open_attempt(store, holding, step=10))
    store.make_directories(attempt.folder)
    store.create(f"{attempt.folder}/checkpoint.json", GOLDEN.read_bytes())
    complete(decide(store, commit_of(attempt, digest=file_digest(GOLDEN.read_bytes()))))
    for path in (store.url, f"{store.url}@10", f"{store.url}@latest", f"{store.url}/{attempt.folder}"):
        assert ek.open(path).path == f"{store.url}/{attempt.folder}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runs/a@900", Choice("runs/a", 900)),
        ("runs/a@900.3", Choice("runs/a", 900, 3)),
        ("runs/a@latest", Choice("runs/a")),
        ("s3://who@bucket/a@7", Choice("s3://who@bucket/a", 7)),
        ("a@b@0", Choice("a@b", 0)),
        *((path, None) for path in ("runs/a", "runs/a@", "@9", "runs/a@9/x", "a@9.0", "a@9.x", "a@-1", "a@newest", "a@9.1.1")),
    ],
)
def test_what_is_written_behind_a_run(path: str, expected: Choice | None) -> None:
    assert choose(path) == expected


def test_an_epoch_without_a_step_is_refused(root: Path) -> None:
    with pytest.raises(Refused, match="expected both"):
        ek.open(root, epoch=1)


def test_a_step_that_is_not_there_names_the_nearest(root: Path) -> None:
    """[RUN-59]"""
    with pytest.raises(NotACheckpoint, match=r"llama: step 25: no commit on the live branch.* has 40, 30, 20, 10"):
        ek.open(f"{root}@25")
    with pytest.raises(NotACheckpoint, match=r"step 40: no commit in epoch 1; it has 30, 20, 10; epoch 2 has it"):
        ek.open(f"{root}@40.1")
    assert nearest_text(range(0, 1000, 10), 503) == "100 steps, the nearest 530, 520, 510, 500, 490, 480"


def test_the_newest_is_never_an_older_one_in_silence(root: Path) -> None:
    """[RUN-51, RUN-57]"""
    shutil.rmtree(root / "step-0000000040.2.1")
    for path in (root, f"{root}@latest", f"{root}@40"):
        with pytest.raises(Damaged, match=r"step-0000000040\.2\.1.*the folder is gone"):
            ek.open(path)
    assert folder(f"{root}@30") == "step-0000000030.2.1"


def test_an_attempt_that_does_not_count_is_not_opened_by_its_path(root: Path) -> None:
    """[RUN-55, RUN-63]"""
    for name, why in (
        ("step-0000000050.2.1", "without a register"),
        ("step-0000000060.2.1", "calls aborted: no space"),
    ):
        with pytest.raises(Uncommitted, match=why):
            ek.open(root / name)
        with pytest.raises(Uncommitted, match=why):
            open_records(root / name)  # as `ek.load` does
    begun(LocalStore(root), job=3)
    (root / "commits" / "0000000050-2-1.json").write_bytes((root / "commits" / "0000000060-2-1.json").read_bytes())
    with pytest.raises(Uncommitted, match="does not count in its run: epoch 3 is the newest one"):
        ek.open(root / "step-0000000050.2.1")
    (root / "step-0000000010.1.1").rename(root / "step-0000000010.1.1.swept")
    with pytest.raises(Uncommitted, match="being removed"):
        ek.open(root / "step-0000000010.1.1.swept")


def test_a_copy_outside_of_its_run_is_a_checkpoint_of_its_own(root: Path, tmp_path: Path) -> None:
    """[RUN-55]"""
    shutil.copytree(root / "step-0000000060.2.1", tmp_path / "step-0000000060.2.1")
    assert folder(tmp_path / "step-0000000060.2.1") == "step-0000000060.2.1"


def test_a_manifest_that_is_not_the_one_committed_is_refused(root: Path) -> None:
    """Whole, and of another checkpoint: a folder that was exchanged. [RUN-13, RUN-56]"""
    (root / "commits" / "0000000040-2-1.json").unlink()
    complete(decide(LocalStore(root), commit_of(AttemptId(40, 2, 1))))
    for path in (root, root / "step-0000000040.2.1", f"{root}@40"):
        with pytest.raises(ChecksumMismatch, match="in its register"):
            ek.open(path)
    (root / "step-0000000030.2.1" / "checkpoint.json").unlink()
    with pytest.raises(MissingFile, match=r"checkpoint\.json is not there; the register"):
        ek.open(f"{root}@30")


def test_what_is_removed_meanwhile_is_no_damage(root: Path) -> None:
    run = run_at(str(root))
    assert run is not None
    (root / "commits" / "0000000040-2-1.json").unlink()
    shutil.rmtree(root / "step-0000000040.2.1")
    with pytest.raises(NotACheckpoint, match="removed since the run was read"):
        run.open(run.entries[0])


def test_a_folder_that_nobody_claimed_is_no_run(tmp_path: Path) -> None:
    """[RUN-4]"""
    (tmp_path / "x" / "commits").mkdir(parents=True)
    (tmp_path / "x" / "step-0000000010.1.1").mkdir()
    with pytest.raises(NotACheckpoint, match="is no run"):
        ek.open(tmp_path / "x", step=10)
    for path in ("x", "x@10", "nothing@10", "nothing"):
        with pytest.raises(NotACheckpoint):
            ek.open(tmp_path / path)
    complete(claim(LocalStore(tmp_path / "x"), by(1)))
    with pytest.raises(NotACheckpoint, match="a run without a checkpoint on its live branch"):
        ek.open(tmp_path / "x")


def test_where_all_is_abandoned_there_is_no_newest(root: Path) -> None:
    begun(LocalStore(root), job=3)
    with pytest.raises(NotACheckpoint, match="5 abandoned ones can be named by step and epoch"):
        ek.open(root)
    assert folder(f"{root}@40.2") == "step-0000000040.2.1"
