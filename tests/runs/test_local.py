"""The main scenarios on a file system, with threads where there may be a race. [RUN-20, RUN-32, RUN-36, RUN-40, RUN-60]"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_actors import (
    MANIFEST,
    Notes,
    W,
    begun,
    by,
    commit_of,
    committed,
    new_job,
    old_writer,
    run_with_one_commit,
    write_folder,
)

from elastickpt.errors import NotACheckpoint, Superseded
from elastickpt.ledger.branch import at_step, history
from elastickpt.ledger.epochs import Acknowledgement, Holding, acknowledge, claim, decide, open_attempt
from elastickpt.ledger.metrics import add_metrics
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import AbortRegister, CommitRegister
from elastickpt.ledger.removal import remove_commits, sweep
from elastickpt.ledger.retention import Best, Keep, judge, removable
from elastickpt.storage.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def test_a_run_from_its_first_commit_over_a_restart_and_a_rollback(store: LocalStore, tmp_path: Path) -> None:
    """[SAVE-5, SAVE-8]"""
    keep = Keep(last=2, best=Best("loss"))
    first = begun(store, job=1)
    for step, loss in ((10, 0.5), (20, 2.0), (30, 3.0)):
        committed(store, first, step=step, metrics=(("loss", loss),))
    complete(add_metrics(store, first, attempt=AttemptId(20, 1, 1), metrics={"loss": 0.25}))
    second = begun(store, job=2, continued=AttemptId(30, 1, 1))
    rolled = begun(store, job=2, continued=AttemptId(20, 1, 1))
    committed(store, rolled, step=30, metrics=(("loss", 1.0),))
    verdicts = judge(keep, history(tmp_path), now=2000.0, verified={})
    assert [(str(one.id), one.reasons) for one in verdicts] == [
        ("0000000030-3-1", ("newest", "last 2")),
        ("0000000020-1-1", ("last 2", "best 1 by loss (min)")),
        ("0000000010-1-1", ("no rule keeps it",)),
        ("0000000030-1-1", ("no rule keeps it",)),
    ]
    complete(remove_commits(store, rolled, commits=removable(verdicts)))
    assert names(tmp_path) == ["commits", "step-0000000020.1.1", "step-0000000030.3.1"]
    assert [(one.step, one.epoch, one.state) for one in history(tmp_path)] == [(30, 3, "live"), (20, 1, "live")]
    assert (tmp_path / at_step(history(tmp_path), step=30).folder / MANIFEST).read_bytes() == b"whole"
    with pytest.raises(NotACheckpoint):
        at_step(history(tmp_path), step=10)
    with pytest.raises(Superseded):
        complete(open_attempt(store, second, step=40))


def test_an_orphaned_writer_commits_until_the_next_job_claims(store: LocalStore, tmp_path: Path) -> None:
    run_with_one_commit(store)  # type: ignore[arg-type]
    notes = Notes()
    complete(old_writer(store, notes))
    complete(new_job(store, notes, job=2, saves=(30,)))
    assert notes.acknowledged == {AttemptId(20, 1, 1), AttemptId(30, 2, 1)}
    assert names(tmp_path) == ["commits", "step-0000000030.2.1"]
    late = Notes()
    complete(write_folder(store, AttemptId(40, 1, 1)))
    complete(old_writer(store, late, attempt=AttemptId(40, 1, 1)))
    assert (late.acknowledged, late.inert) == (set(), {AttemptId(40, 1, 1)})
    assert [one.step for one in history(tmp_path)] == [30]


def test_of_many_jobs_at_once_one_holds_the_run_and_nothing_is_lost(store: LocalStore, tmp_path: Path) -> None:
    """[RUN-32, RUN-36]"""
    run_with_one_commit(store)  # type: ignore[arg-type]

    def one(job: int) -> int | None:
        try:
            return complete(claim(LocalStore(tmp_path), by(job))).epoch
        except Superseded:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(2, 26)))
    held = [epoch for epoch in found if epoch is not None]
    assert len(set(held)) == len(held)
    assert max(held) == 25  # the last claim is never closed
    assert [entry.id for entry in history(tmp_path)] == [W]
    assert not [name for name in names(tmp_path / "commits") if name.endswith(".tmp")]


def test_of_committers_and_aborters_at_once_all_obey_one_register(store: LocalStore, tmp_path: Path) -> None:
    """[RUN-40]"""
    holding = begun(store, job=1)
    for step in range(1, 21):
        attempt = complete(open_attempt(store, holding, step=step))
        complete(write_folder(store, attempt))
        said = [commit_of(attempt), AbortRegister(attempt, "a"), commit_of(attempt, nbytes=9), AbortRegister(attempt, "b")]
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lambda register: complete(decide(LocalStore(tmp_path), register)), said))
        assert len(found) == 1
        (register,) = found
        outcome = complete(acknowledge(store, attempt, poll_s=1, limit_s=1)) if isinstance(register, CommitRegister) else None
        assert outcome in (None, Acknowledgement.ACKNOWLEDGED)
        assert (step in {one.step for one in history(tmp_path)}) == (outcome is not None)


def test_removal_survives_folders_that_others_write_into(store: LocalStore, tmp_path: Path) -> None:
    """A stopped writer of a dead attempt goes on below a folder that has gone: it fails, and brings nothing back. [RUN-75]"""
    holding: Holding = begun(store, job=1)
    committed(store, holding, step=10)
    dead = complete(open_attempt(store, holding, step=20))
    complete(write_folder(store, dead))
    writer = store.open_writer(f"{dead.folder}/c.0", 8)
    store.remove(f"{dead.folder}/{MANIFEST}")
    newer = begun(store, job=2, continued=W)
    assert complete(sweep(store, newer)).removed == (dead,)
    writer.write(0, memoryview(b"12345678"))
    writer.close()
    assert names(tmp_path) == ["commits", "step-0000000010.1.1"]
