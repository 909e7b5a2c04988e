"""Faults between writers that decide: of the storage, of connections, of the order in which things are said."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import msgpack
import pytest
import torch
from msgspec.structs import replace
from simulated_members import Job, seats, threads
from trainer import BOUND_S

from elastickpt.commit.attempt import Attempt, Verdict, WriterSaid, decode_verdict, encode_vote
from elastickpt.commit.attest import decode_contents
from elastickpt.commit.ballot import CommitBallot
from elastickpt.commit.draft import CONTENTS, marked
from elastickpt.commit.links import CommitLimits, Seat, say_farewell
from elastickpt.commit.outcome import AttemptStanding, commit, look
from elastickpt.errors import RankFailure, RankLost, StorageFailed, WriterLost
from elastickpt.ranks.addresses import dial
from elastickpt.ranks.messages import Connection, Frame, FrameKind
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.writer.attempt_worker import AttemptWorker
from elastickpt.writer.messages import Write
from elastickpt.writer.submissions import submission_of
from elastickpt.writer.thread import ThreadWriter
from elastickpt.writer.write_files import unwatched


@pytest.fixture(scope="module")
def job() -> Job:
    return Job({"t": {"a": torch.arange(9.0), "b": torch.arange(4)}, "n": 1}, 5)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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
    (first, *_) = threads(Unreadable(LocalStore(tmp_path)), 5, CommitLimits(missing_s=1.0))  # type: ignore[arg-type]
    submission = first.submit(job.members[0].staged(attempt), job.members[0].arena)
    assert isinstance(submission.decided.exception(BOUND_S), StorageFailed)
    assert look(attempt.store, attempt.attempt) is AttemptStanding.ABORTED


def test_members_that_are_no_candidates_give_up_when_no_candidate_is_reached(tmp_path: Path, job: Job) -> None:
    """[SAVE-83]"""
    attempt = job.attempt(tmp_path / "c")
    writers = threads(LocalStore(tmp_path), 5, CommitLimits(succession_s=0.1, silence_s=1.0))
    for writer in writers[:3]:
        writer.close(limit_s=0)
    submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (3, 4)]
    kinds = {type(one.decided.exception(BOUND_S)).__name__ for one in submissions}
    assert kinds <= {"RankLost"}
    assert look(attempt.store, attempt.attempt) is AttemptStanding.ABORTED


class Fake:
    """A member whose writer this test plays."""

    def __init__(self, seat: Seat, attempt: Attempt) -> None:
        self._attempt = attempt
        self._link = Connection(dial(seat.candidates[0], timeout_s=BOUND_S))
        self._send(FrameKind.HELLO, msgpack.packb((seat.secret, seat.member)))

    def _send(self, kind: FrameKind, data: bytes) -> None:
        self._link.send(Frame(kind, 0, data), silence_s=BOUND_S)

    def vote(self, said: WriterSaid) -> None:
        self._send(FrameKind.PAYLOAD, encode_vote(self._attempt, said))

    def verdict(self) -> Verdict:
        while (frame := self._link.take()) is None:
            self._link.pump()
        return decode_verdict(frame.data)[1]

    def close(self) -> None:
        self._link.close()


class TestOneBallot:
    """Member 0 of two."""

    @pytest.fixture
    def played(self, tmp_path: Path, job: Job) -> Iterator[tuple[CommitBallot, Seat, Attempt]]:
        (first, listener), (second, unused) = seats(2)
        attempt = job.attempt(tmp_path / "c")
        ballot = CommitBallot(first, listener, lambda _: attempt.store, lambda key, verdict: None)
        yield ballot, second, attempt.attempt
        ballot.close()
        assert unused is not None
        unused.close()

    def test_a_member_with_a_newer_connection_is_not_missing(self, played: tuple[CommitBallot, Seat, Attempt]) -> None:
        """The older one may be found gone long afterwards. [SAVE-82]"""
        ballot, seat, attempt = played
        older, newer = Fake(seat, attempt), Fake(seat, attempt)
        ballot.enroll(attempt, lambda: None)
        older.vote(None)
        newer.vote(None)
        until(lambda: len([one for one in ballot._member_links._all if one.attempts]) == 2)
        older.close()
        until(lambda: len(ballot._member_links._all) == 1)
        turned = threading.Event()
        ballot._leave(turned.set)
        assert turned.wait(BOUND_S)
        assert 1 not in ballot._tallies[attempt.id]._missing_since
        newer.vote(RankFailure(1, "no-space", "no room"))
        assert newer.verdict() == (RankFailure(1, "no-space", "no room"),)

    def test_one_that_asks_again_is_told_and_forgotten(self, played: tuple[CommitBallot, Seat, Attempt]) -> None:
        """[SAVE-89]"""
        ballot, seat, attempt = played
        member = Fake(seat, attempt)
        ballot.enroll(attempt, lambda: None)
        for _ in range(3):
            member.vote(RankFailure(1, "no-space", "no room"))
            assert member.verdict() == (RankFailure(1, "no-space", "no room"),)
        assert [one.attempts for one in ballot._member_links._all] == [{}]

    def test_who_talks_nonsense_is_hung_up_on(self, played: tuple[CommitBallot, Seat, Attempt]) -> None:
        ballot, seat, _ = played
        stranger = dial(seat.candidates[0], timeout_s=BOUND_S)
        stranger.sendall(struct.pack("<QBI", 0, 200, 0))
        while stranger.recv(64):  # beats
            pass
        stranger.close()
        assert ballot._member_links._all == []

    def test_it_is_not_idle_when_an_attempt_comes_at_the_end_of_a_turn(
        self, played: tuple[CommitBallot, Seat, Attempt]
    ) -> None:
        """Else an orphan would end before its attempt is decided. [SAVE-97]"""
        ballot, _, attempt = played
        real, enrolled = ballot._committer_link.begin_anew, threading.Event()

        def begin_anew() -> None:
            real()
            if not enrolled.is_set():
                ballot.enroll(attempt, lambda: None)  # by another thread
                enrolled.set()

        ballot._committer_link.begin_anew = begin_anew  # type: ignore[method-assign]
        ballot._leave(lambda: None)
        assert enrolled.wait(BOUND_S)
        until(lambda: ballot._open)
        assert not ballot.join(0)


def test_a_revived_writer_completes_what_other_committers_need_before_it_attests_and_not_afterwards(
    tmp_path: Path, job: Job
) -> None:
    """[SAVE-85] Behind the attestation another one may be about to commit, and have removed it."""
    attempt, member = job.attempt(tmp_path / "c"), job.members[0]
    ((seat, listener), *_) = seats(5)
    part = AttemptWorker(seat, listener, lambda _: attempt.store, lambda number, verdict: None)
    submission = submission_of(1, member.staged(attempt), member.arena, seat)
    again, structure = replace(submission.write(), repeated=True), submission.structure
    assert structure is not None
    left = tmp_path / attempt.draft.path(CONTENTS)
    attested = tmp_path / attempt.draft.path("fragments/00000.msgpack")

    def carry_out(write: Write) -> None:
        part.begin(submission.enroll(), submission.structure)
        part.carry_out(write, structure, member.arena, watch=unwatched)

    carry_out(submission.write())
    whole = left.read_bytes()
    left.unlink()
    carry_out(again)
    assert not left.exists()
    attested.unlink()
    left.write_bytes(whole[: len(whole) // 2])
    carry_out(again)
    assert left.read_bytes() == whole
    part.close()


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
    sat = seats(3)
    store = LocalStore(tmp_path)
    writers = [ThreadWriter(store, seat=seat, listener=listener) for seat, listener in sat]
    attempt = small.attempt(tmp_path / "c")
    submissions = [writers[m].submit(small.members[m].staged(attempt), small.members[m].arena) for m in (0, 1)]
    say_farewell(sat[2][0])
    for one in submissions:
        error = one.decided.exception(BOUND_S)
        assert isinstance(error, RankLost)
        assert [failure.rank for failure in error.report] == [2]
    for writer in writers:
        writer.close()


def test_a_committer_that_is_revived_behind_its_commit_finds_it(tmp_path: Path) -> None:
    """The others have heard the verdict, and say nothing any more. [SAVE-89]"""
    small = Job({"t": {"a": torch.arange(9.0)}}, 2)
    attempt = small.attempt(tmp_path / "c")
    files = small.write(attempt)
    committed = commit(attempt.store, attempt.attempt, decode_contents(attempt.contents), files)
    (seat, listener), _ = seats(2)
    told: SimpleQueue[Verdict] = SimpleQueue()
    part = AttemptWorker(seat, listener, lambda _: attempt.store, lambda _, verdict: told.put(verdict))
    submission = submission_of(1, small.members[0].staged(attempt), small.members[0].arena, seat)
    submission.said = files[0]
    part.begin(submission.enroll(), submission.structure)
    part.repeat(submission.say())
    assert told.get(timeout=BOUND_S) == committed
    part.close()
