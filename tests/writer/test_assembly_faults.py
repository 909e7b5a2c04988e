"""Faults between writers that decide: of the storage, of connections, of the order in which things are said."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from trainer import BOUND_S

from elastickpt.commit.cases import Case, Verdict
from elastickpt.commit.contents import decode_outline, decode_rest
from elastickpt.commit.marks import marked
from elastickpt.commit.settle import Patience, Standing, look, settle
from elastickpt.errors import RankLost, StorageFailed, WriterLost
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.testing.members import QUICK, Attempt, Job, Writer, seats
from elastickpt.writer.parts import Part
from elastickpt.writer.seats import Limits
from elastickpt.writer.submissions import Submission
from elastickpt.writer.thread import ThreadWriter
from elastickpt.writer.way import say_farewell


@pytest.fixture(scope="module")
def job() -> Job:
    return Job({"t": {"a": torch.arange(9.0), "b": torch.arange(4)}, "n": 1}, 5)


def threads(store: Store, world: int, limits: Limits = QUICK) -> list[Writer]:
    return [ThreadWriter(store, seat=seat, listener=listener) for seat, listener in seats(world, limits)]


def case_of(attempt: Attempt) -> Case:
    return Case(attempt.store.url, attempt.draft, "process", attempt.register, ())


class Unreadable:
    """A store on which attestations cannot be looked for."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def read(self, path: str, limit: int) -> bytes:
        if path.endswith(".msgpack"):
            raise StorageFailed(f"read {path}: input/output error")
        return self._inner.read(path, limit)


def test_a_committer_that_cannot_look_for_an_attestation_gives_the_attempt_up(tmp_path: Path, job: Job) -> None:
    """[SAVE-80] Else it would be said to have failed, and stand there for the next committer to commit."""
    attempt = job.attempt(tmp_path / "c")
    (first, *_) = threads(Unreadable(LocalStore(tmp_path)), 5)  # type: ignore[arg-type]
    submission = first.submit(job.members[0].staged(attempt), job.members[0].arena)
    assert isinstance(submission.decided.exception(BOUND_S), StorageFailed)
    assert look(attempt.store, case_of(attempt)) is Standing.ABORTED


def test_members_that_are_no_candidates_give_up_when_no_candidate_is_reached(tmp_path: Path, job: Job) -> None:
    """[SAVE-83]"""
    attempt = job.attempt(tmp_path / "c")
    writers = threads(LocalStore(tmp_path), 5, Limits(succession_s=0.1, silence_s=1.0))
    for writer in writers[:3]:
        writer.close(limit_s=0)
    submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (3, 4)]
    kinds = {type(one.decided.exception(BOUND_S)).__name__ for one in submissions}
    assert kinds <= {"RankLost"}
    assert look(attempt.store, case_of(attempt)) is Standing.ABORTED


def test_members_that_are_no_candidates_hear_the_verdict(tmp_path: Path, job: Job) -> None:
    submissions = job.submit(job.attempt(tmp_path / "c"), threads(LocalStore(tmp_path), 5))
    assert len({one.decided.result(BOUND_S) for one in submissions}) == 1


def test_closing_a_thread_that_writes_leaves_nobody_waiting(tmp_path: Path, job: Job) -> None:
    attempt = job.attempt(tmp_path / "c")
    writer, *others = threads(LocalStore(tmp_path), 5)
    submission = writer.submit(job.members[0].staged(attempt), job.members[0].arena)
    submission.result(BOUND_S)
    writer.close(limit_s=0)  # no other member has come
    assert isinstance(submission.decided.exception(BOUND_S), WriterLost)
    assert attempt.draft.attempt not in marked(attempt.store.url)
    for one in others:
        one.close()


def test_who_said_farewell_is_not_waited_for(tmp_path: Path, job: Job) -> None:
    """Its trainer died before it handed anything over. [SAVE-100]"""
    small = Job({"t": {"a": torch.arange(9.0)}}, 3)
    patient = Limits(succession_s=600.0, silence_s=600.0, missing_s=600.0)
    sat = seats(3, patient)
    store = LocalStore(tmp_path)
    writers = [ThreadWriter(store, seat=seat, listener=listener) for seat, listener in sat]
    attempt = small.attempt(tmp_path / "c")
    submissions = [writers[m].submit(small.members[m].staged(attempt), small.members[m].arena) for m in (0, 1)]
    say_farewell(sat[2][0])
    for one in submissions:
        error = one.decided.exception(BOUND_S)
        assert isinstance(error, RankLost)
        assert [failure.rank for failure in error.report] == [2]


def test_a_committer_that_is_revived_behind_its_commit_finds_it(tmp_path: Path) -> None:
    """The others have heard the verdict, and say nothing any more. [SAVE-89]"""
    small = Job({"t": {"a": torch.arange(9.0)}}, 2)
    attempt = small.attempt(tmp_path / "c")
    case = case_of(attempt)
    contents = decode_rest(attempt.contents[1], decode_outline(attempt.contents[0]))
    files = small.write(attempt)
    committed = settle(attempt.store, case, contents, files, patience=Patience())
    (seat, listener), _ = seats(2, Limits(succession_s=600.0, silence_s=600.0, missing_s=600.0))
    told: SimpleQueue[Verdict] = SimpleQueue()
    part = Part(seat, listener, lambda _: attempt.store, lambda _, verdict: told.put(verdict))
    submission = Submission(1, small.members[0].staged(attempt), None)
    submission.said = files[0]
    part.begin(submission.say(), attempt.contents[0])
    part.repeat(submission.say())
    assert told.get(timeout=BOUND_S) == committed
    part.close()
