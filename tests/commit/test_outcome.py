"""The ends of an attempt: one of them, whoever comes to it, wherever another committer stopped. [SAVE-80, SAVE-84, SAVE-85]"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_members import Job, OpenAttempt

import elastickpt as ek
from elastickpt.commit.attempt import Committed, decode_verdict, decode_vote, encode_verdict, encode_vote
from elastickpt.commit.attest import DraftContents, decode_contents, find_attestation, leave_contents, left_contents
from elastickpt.commit.draft import CONTENTS, mark, marked, sweep
from elastickpt.commit.outcome import AttemptStanding, Patience, commit, give_up, look
from elastickpt.errors import (
    CheckpointError,
    NoSpace,
    NotAcknowledged,
    NotDurable,
    RankFailure,
    StorageFailed,
    Superseded,
    Uncommitted,
)
from elastickpt.format.keys import DRAFT_TOKEN
from elastickpt.format.records import FileDigest
from elastickpt.ledger.epochs import claim, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Claimer
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.testing.faults import CHANGING, CallAt, FaultyStore, RecordingStore

PATIENCE = Patience(poll_s=0.01, limit_s=0.05)
REPORT = (RankFailure(1, "no-space", "no room"),)


class Stop(BaseException):
    """Where a committer stopped for good."""


@pytest.fixture(scope="module")
def job() -> Job:
    return Job({"t": {"a": torch.arange(9.0), "b": torch.arange(4)}, "n": 1}, 2)


class Written:
    """An attempt whose members have all attested, and what its committers know."""

    def __init__(self, job: Job, open: OpenAttempt) -> None:
        self.store, self.draft = open.store, open.draft
        self.attempt = replace(open.attempt, durability="power")
        self.encoded = open.contents
        self.contents = decode_contents(self.encoded)
        self.files = job.write(open)

    def commit(self, store: Store | None = None, contents: DraftContents | None = None) -> Committed:
        return commit(store or self.store, self.attempt, contents or self.contents, self.files, patience=PATIENCE)


def by_path(job: Job, folder: Path) -> Written:
    folder.mkdir(exist_ok=True)
    return Written(job, job.attempt(folder / "c", step=7))


def in_a_run(job: Job, folder: Path) -> Written:
    folder.mkdir(exist_ok=True)
    store = LocalStore(folder)
    claimed(store, "one")
    return Written(job, job.attempt_in_run(store, AttemptId(7, 1, 1)))


def claimed(store: Store, token: str) -> None:
    complete(start(store, complete(claim(store, Claimer("nowhere", token, "h", 1, 1, 1.0))), continued=None))


Make = Callable[[Job, Path], Written]
both = pytest.mark.parametrize("make", [by_path, in_a_run])


def place(written: Written) -> Path:
    return Path(written.store._root) / written.draft.name  # type: ignore[attr-defined]


def demand_committed(written: Written) -> None:
    assert look(written.store, written.attempt) is AttemptStanding.COMMITTED
    assert ek.open(place(written)).verify().problems == ()


@both
def test_it_is_committed_once_and_found_so_by_all_others(tmp_path: Path, job: Job, make: Make) -> None:
    written = make(job, tmp_path)
    assert look(written.store, written.attempt) is AttemptStanding.OPEN
    first = written.commit()
    assert first.arrays == 2
    assert first.nbytes == 9 * 4 + 4 * 8
    assert written.commit() == first
    assert give_up(written.store, written.attempt, REPORT, patience=PATIENCE) == first
    demand_committed(written)


@both
def test_what_was_aborted_is_never_committed(tmp_path: Path, job: Job, make: Make) -> None:
    written = make(job, tmp_path)
    assert give_up(written.store, written.attempt, REPORT, patience=PATIENCE) == REPORT
    with pytest.raises(Uncommitted):
        written.commit()
    assert look(written.store, written.attempt) is AttemptStanding.ABORTED
    assert not place(written).exists()


def stopping_points(job: Job, folder: Path, make: Make) -> int:
    written = make(job, folder)
    recording = RecordingStore(written.store)
    written.commit(recording)
    return sum(one.name in CHANGING for one in recording.operations)


@both
@pytest.mark.parametrize("mode", ["before", "torn", "after"])
def test_wherever_a_committer_stops_another_one_commits_the_same_bytes(tmp_path: Path, job: Job, make: Make, mode: str) -> None:
    whole = make(job, tmp_path / "whole")
    whole.commit()
    count = stopping_points(job, tmp_path / "count", make)
    assert count > 8

    def stop(_: object) -> None:
        raise Stop

    for at in range(1, count + 1):
        written = make(job, tmp_path / f"{at}")
        leave_contents(written.store, written.attempt, written.encoded)
        with pytest.raises(Stop):
            written.commit(FaultyStore(written.store, CallAt(at, stop, mode=mode), counted=CHANGING))  # type: ignore[arg-type]
        commit(written.store, written.attempt, None, written.files, patience=PATIENCE)
        demand_committed(written)
        assert not (place(written) / CONTENTS).exists()


@both
@pytest.mark.parametrize("mode", ["before", "torn", "after"])
def test_wherever_a_committer_stops_another_one_may_give_up(tmp_path: Path, job: Job, make: Make, mode: str) -> None:
    """Then nothing is committed, unless the one that stopped had done it; and when it goes on it obeys."""
    count = stopping_points(job, tmp_path / "count", make)
    seen = set()
    for at in range(1, count + 1):
        written = make(job, tmp_path / f"{at}")

        def abort(_: object, written: Written = written) -> None:
            verdict = give_up(written.store, written.attempt, REPORT, patience=PATIENCE)
            seen.add(type(verdict))

        late = FaultyStore(written.store, CallAt(at, abort, mode=mode), counted=CHANGING)  # type: ignore[arg-type]
        with suppress(CheckpointError):
            assert written.commit(late).arrays == 2
            demand_committed(written)
            continue
        assert look(written.store, written.attempt) is AttemptStanding.ABORTED
        assert not place(written).exists()
    assert seen == {tuple, Committed} or mode != "after"


def test_contents_that_were_cut_short_are_none(tmp_path: Path, job: Job) -> None:
    written = by_path(job, tmp_path)
    leave_contents(written.store, written.attempt, written.encoded)
    found = left_contents(written.store, written.attempt)
    assert found == written.contents
    path = tmp_path / written.draft.path(CONTENTS)
    data = path.read_bytes()
    for cut in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert left_contents(written.store, written.attempt) is None


def test_an_attestation_is_found_if_it_is_whole_and_of_this_attempt(tmp_path: Path, job: Job) -> None:
    written = by_path(job, tmp_path)
    assert find_attestation(written.store, written.attempt, 1) == written.files[1]
    other = by_path(job, tmp_path / "other")
    path = tmp_path / written.draft.path(written.files[1].path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert find_attestation(written.store, written.attempt, 1) is None
    path.write_bytes((tmp_path / "other" / other.draft.path(other.files[1].path)).read_bytes())
    assert find_attestation(written.store, written.attempt, 1) is None
    path.unlink()
    assert find_attestation(written.store, written.attempt, 1) is None


def test_a_commit_that_a_newer_claim_left_out_is_superseded(tmp_path: Path, job: Job) -> None:
    """[SAVE-90]"""
    written = in_a_run(job, tmp_path)
    claimed(written.store, "two")
    with pytest.raises(Superseded):
        written.commit()


def test_a_commit_that_no_newer_claim_adopts_in_time_is_not_acknowledged(tmp_path: Path, job: Job) -> None:
    """[SAVE-90]"""
    written = in_a_run(job, tmp_path)
    second = claim(written.store, Claimer("nowhere", "two", "h", 1, 1, 1.0))
    while not (tmp_path / "commits" / "epoch-2.json").exists():
        next(second)  # it stops before it has adopted anything
    with pytest.raises(NotAcknowledged):
        written.commit()


@pytest.mark.parametrize("make", [by_path])
def test_a_commit_whose_last_sync_fails_is_committed_and_said_not_to_be_durable(tmp_path: Path, job: Job, make: Make) -> None:
    """[SAVE-96]"""
    written = make(job, tmp_path)

    def fail(_: object) -> None:
        raise StorageFailed("input/output error")

    count = stopping_points(job, tmp_path / "count", make)
    with pytest.raises(NotDurable, match="committed and whole"):
        written.commit(FaultyStore(written.store, CallAt(count, fail), counted=CHANGING))
    demand_committed(written)


def test_a_draft_is_not_swept_while_its_attempt_is_marked(tmp_path: Path, job: Job) -> None:
    """[SAVE-86, SAVE-87]"""
    written = by_path(job, tmp_path)
    orphaned = written.draft.folder.replace(f"-{os.getpid()}-", "-4194305-")  # of a process that is gone
    (tmp_path / written.draft.folder).rename(tmp_path / orphaned)
    held = mark(written.store.url, written.draft.attempt)
    assert written.draft.attempt in marked(written.store.url)
    assert written.draft.attempt not in marked(written.store.url + "/elsewhere")
    ((left, why),) = sweep(written.store, "c").left
    assert left == orphaned
    assert "writer" in why
    held.close()
    assert marked(written.store.url) == frozenset()
    assert sweep(written.store, "c").removed == (orphaned,)


def test_votes_and_verdicts_are_read_as_they_were_said(tmp_path: Path, job: Job) -> None:
    for written in (by_path(job, tmp_path), in_a_run(job, tmp_path / "run")):
        for said in (None, FileDigest("fragments/00001.msgpack", 3, "0" * 32), RankFailure(4, "no-space", "no room")):
            assert decode_vote(encode_vote(written.attempt, said)) == (written.attempt, said)
    for verdict in (Committed(5, 2, "f" * 32), REPORT):
        assert decode_verdict(encode_verdict("key", verdict)) == ("key", verdict)


@both
@pytest.mark.parametrize(
    "error", [StorageFailed("input/output error"), NoSpace("no space left on device")], ids=["eio", "enospc"]
)
def test_whatever_operation_fails_it_is_committed_and_whole_or_absent(
    tmp_path: Path, job: Job, make: Make, error: CheckpointError
) -> None:
    """As a committer goes on after an error: it gives up, and obeys what it finds."""
    count = stopping_points(job, tmp_path / "count", make)
    seen = set()
    for at in range(1, count + 1):
        written = make(job, tmp_path / f"{at}")

        def fail(_: object) -> None:
            raise error

        faulty = FaultyStore(written.store, CallAt(at, fail), counted=CHANGING)
        try:
            verdict: object = written.commit(faulty)
        except NotDurable:
            seen.add("not durable")
            demand_committed(written)
            continue
        except CheckpointError:
            verdict = give_up(written.store, written.attempt, REPORT, patience=PATIENCE)
        seen.add(type(verdict).__name__)
        if isinstance(verdict, Committed):
            demand_committed(written)
        else:
            assert not place(written).exists()
    assert "tuple" in seen


@both
def test_what_cannot_be_aborted_is_not_said_to_be(tmp_path: Path, job: Job, make: Make) -> None:
    """A committer that was stopped before its last operation would commit it afterwards. [SAVE-80]"""
    written = make(job, tmp_path)

    def fail(_: object) -> None:
        raise StorageFailed("input/output error")

    faulty = FaultyStore(written.store, CallAt(1, fail, lasting="from then on"), counted=CHANGING)
    with pytest.raises(StorageFailed):
        give_up(faulty, written.attempt, REPORT, patience=PATIENCE)
    assert look(written.store, written.attempt) is AttemptStanding.OPEN
    written.commit()
    demand_committed(written)


def test_an_abort_whose_sync_fails_is_one(tmp_path: Path, job: Job) -> None:
    written = in_a_run(job, tmp_path)

    def fail(_: object) -> None:
        raise StorageFailed("input/output error")

    faulty = FaultyStore(written.store, CallAt(1, fail), counted=frozenset({"sync_directory"}))
    assert give_up(faulty, written.attempt, REPORT, patience=PATIENCE) == REPORT
    assert look(written.store, written.attempt) is AttemptStanding.ABORTED


class Full:
    """A disk on which nothing can be created while the draft's token takes the last block."""

    def __init__(self, inner: Store, token: str) -> None:
        self._inner, self._token = inner, token

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create(self, path: str, data: bytes) -> None:
        if self._inner.exists(self._token):
            raise NoSpace(f"create {path}: no space left on device")
        self._inner.create(path, data)


def test_on_a_full_disk_an_attempt_gives_its_room_back(tmp_path: Path, job: Job) -> None:
    """Else the disk stays full: the folder goes only behind a register that says abort."""
    written = in_a_run(job, tmp_path)
    full = Full(written.store, written.draft.path(DRAFT_TOKEN))
    assert give_up(full, written.attempt, REPORT, patience=PATIENCE) == REPORT  # type: ignore[arg-type]
    assert look(written.store, written.attempt) is AttemptStanding.ABORTED
    assert not place(written).exists()
