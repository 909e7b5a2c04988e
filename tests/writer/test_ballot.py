"""Writers that commit by themselves: threads of this process, and real writer processes that are killed and stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_members import PATIENT, Job, seats, threads
from staged import big_state
from trainer import BOUND_S
from writer_faults import hook

import elastickpt as ek
from elastickpt.commit.attempt import Committed
from elastickpt.commit.draft import is_draft
from elastickpt.commit.links import CommitLimits
from elastickpt.errors import CheckpointError, NoSpace, NotACheckpoint, RankLost, StorageFailed, Superseded, WriterLost
from elastickpt.ledger.epochs import claim, start
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Claimer
from elastickpt.saving.writer_pool import SeatedWriter
from elastickpt.storage.local import LocalStore
from elastickpt.writer.child import WriterOptions
from elastickpt.writer.submissions import Submission
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter

Start = Callable[..., list[Supervisor]]


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(big_state(1), 3)


SUCCESSION = replace(PATIENT, succession_s=2.0, silence_s=2.0)
MISSING = replace(PATIENT, succession_s=2.0, silence_s=2.0, missing_s=2.0)


@pytest.fixture
def processes() -> Iterator[Start]:
    """A writer process for each member, with the hooks given for some of them."""
    started: list[Supervisor] = []

    def begin(
        world: int, *, limits: CommitLimits = PATIENT, silence_s: float = 30.0, **hooks: tuple[str, ...]
    ) -> list[Supervisor]:
        for seat, listener in seats(world, limits):
            told = hooks.get(f"member{seat.member}", ())
            options = WriterOptions(beat_s=0.1, silence_s=silence_s, reap_s=5.0, hooks=told)
            started.append(Supervisor(options, seat=seat, listener=listener))  # type: ignore[arg-type]
        return started[-world:]

    yield begin
    for writer in started:
        writer.close(limit_s=5.0)


def outcome(submission: Submission) -> Committed:
    """What became of the attempt, once its arena is free."""
    submission.future.exception(BOUND_S)
    return submission.decided.result(BOUND_S)


def demand_sound(path: Path, *, seed: int = 0) -> None:
    assert ek.open(path).verify().problems == ()
    state = big_state(1, seed=seed + 1)
    ek.load(state, path)
    expected = big_state(1, seed=seed)
    for name, value in expected["m"].state_dict().items():  # type: ignore[attr-defined]
        assert (state["m"].state_dict()[name] == value).all()  # type: ignore[attr-defined]


def drafts(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if is_draft(entry.name)]


def test_three_writers_commit_without_their_trainers(tmp_path: Path, job: Job) -> None:
    attempt = job.attempt(tmp_path / "c")
    submissions = job.submit(attempt, threads(LocalStore(tmp_path), 3))
    found = [outcome(one) for one in submissions]
    assert len(set(found)) == 1
    assert found[0].arrays == len(job.merged.outline.arrays)
    demand_sound(tmp_path / "c")
    assert drafts(tmp_path) == []


def test_two_attempts_under_way_are_decided_in_order(tmp_path: Path, job: Job, processes: Start) -> None:
    """The second has attested everywhere long before the first, one member of which comes last. [SAVE-88]"""
    writers = processes(3)
    other = Job(big_state(1), 3)
    order: list[str] = []
    first = job.attempt(tmp_path / "first")
    submissions = [writers[m].submit(job.members[m].staged(first), job.members[m].arena) for m in (0, 1)]
    second = other.submit(other.attempt(tmp_path / "second"), writers)
    submissions[0].decided.add_done_callback(lambda _: order.append("first"))
    second[0].decided.add_done_callback(lambda _: order.append("second"))
    for one in second:
        one.result(BOUND_S)
    submissions.append(writers[2].submit(job.members[2].staged(first), job.members[2].arena))
    for one in (*submissions, *second):
        outcome(one)
    assert order == ["first", "second"]


def test_a_committer_that_is_revived_decides_in_the_order_of_its_trainer(tmp_path: Path, job: Job, processes: Start) -> None:
    """Killed when it has attested the first attempt and writes the second one. [SAVE-88]"""
    writers = processes(3, silence_s=1.0)
    other = Job(big_state(1), 3)
    order: list[str] = []
    first = job.attempt(tmp_path / "first")
    submissions = [writers[m].submit(job.members[m].staged(first), job.members[m].arena) for m in (0, 1)]
    for one in submissions:
        one.result(BOUND_S)
    pid = writers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that the second one is not written when it is found silent, and killed
    second = other.submit(other.attempt(tmp_path / "second"), writers)
    submissions[0].decided.add_done_callback(lambda _: order.append("first"))
    second[0].decided.add_done_callback(lambda _: order.append("second"))
    for one in second:
        one.result(BOUND_S)
    submissions.append(writers[2].submit(job.members[2].staged(first), job.members[2].arena))
    for one in (*submissions, *second):
        one.decided.exception(BOUND_S)
    assert order == ["first", "second"]


def test_processes_commit_one_attempt_after_the_other(tmp_path: Path, job: Job, processes: Start) -> None:
    writers = processes(3)
    for step in range(3):
        submissions = job.submit(job.attempt(tmp_path / f"c{step}", step=step), writers)
        for one in submissions:
            outcome(one)
        assert ek.open(tmp_path / f"c{step}").step == step
    demand_sound(tmp_path / "c2")


def test_a_process_takes_another_seat_and_stays(tmp_path: Path, job: Job, processes: Start) -> None:
    """What it has under way by the first seat is decided there. [SAVE-80]"""
    writers, other = processes(3), Job(big_state(1), 3)
    first = job.attempt(tmp_path / "first")
    begun = [writers[m].submit(job.members[m].staged(first), job.members[m].arena) for m in (0, 1)]
    begun[0].result(BOUND_S)
    pids = [writer.pid for writer in writers]
    team = []
    for writer, (seat, listener) in zip(writers, seats(3, PATIENT), strict=True):
        writer.sit(seat, listener)
        team.append(SeatedWriter(writer, seat))
    second = other.submit(other.attempt(tmp_path / "second"), team)  # type: ignore[arg-type]
    for one in second:
        outcome(one)
    begun.append(writers[2].submit(job.members[2].staged(first), job.members[2].arena))  # by its first seat
    for one in begun:
        outcome(one)
    assert [writer.pid for writer in writers] == pids
    assert [writer.deaths for writer in writers] == [0, 0, 0]
    for name in ("first", "second"):
        demand_sound(tmp_path / name)
    seats_left = [list(writer._listeners) for writer in writers]
    assert seats_left == [[one.seat.secret] for one in team]


@pytest.mark.parametrize("killed", [False, True])
def test_a_team_that_is_gone_waits_for_nobody(tmp_path: Path, job: Job, processes: Start, *, killed: bool) -> None:
    """Of an attempt that one member never had: it is aborted on those that are told, and one that stands committed is found so,
    by a writer process too that was killed meanwhile. [SAVE-80, SAVE-83]"""
    writers = processes(3)
    whole = job.submit(job.attempt(tmp_path / "whole"), writers)
    for one in whole:
        outcome(one)
    open = job.attempt(tmp_path / "open")
    begun = [writers[m].submit(job.members[m].staged(open), job.members[m].arena) for m in (0, 1)]
    for one in begun:
        one.result(BOUND_S)
    for one, writer in zip(begun, writers, strict=False):
        writer.settle(one.attempt, RankLost("its view is over"))
        if killed:
            os.kill(writer.pid or 0, signal.SIGKILL)
    reasons = (RankLost, WriterLost) if killed else RankLost  # the next process may find that it was aborted, and not why
    for one in begun:
        assert isinstance(one.decided.exception(BOUND_S), reasons)
    assert not (tmp_path / "open").exists()
    for one, writer in zip(whole, writers, strict=True):
        writer.settle(one.attempt, RankLost("its view is over"))
        assert one.decided.exception(0) is None
    demand_sound(tmp_path / "whole")


def test_threads_that_write_wait_for_nobody_either(tmp_path: Path, job: Job) -> None:
    writers = threads(LocalStore(tmp_path), 2)
    open = job.attempt(tmp_path / "open")
    one = writers[0].submit(job.members[0].staged(open), job.members[0].arena)
    one.result(BOUND_S)
    writers[0].settle(one.attempt, RankLost("its view is over"))
    assert isinstance(one.decided.exception(BOUND_S), RankLost)


def test_a_failure_of_one_is_the_same_report_for_all(tmp_path: Path, job: Job) -> None:
    """[SAVE-81, SAVE-94]"""
    writers = threads(LocalStore(tmp_path), 3)
    attempt = job.attempt(tmp_path / "c")
    submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (0, 1)]
    submissions.append(writers[2].withdraw(attempt.attempt, NoSpace("no room here")))
    errors = [one.decided.exception(BOUND_S) for one in submissions]
    assert {type(error) for error in errors} == {NoSpace}
    assert {str(error) for error in errors} == {"rank 2: no room here"}
    assert not (tmp_path / "c").exists()
    assert drafts(tmp_path) == []
    again = job.submit(job.attempt(tmp_path / "c"), writers)  # the next one works
    assert len({outcome(one) for one in again}) == 1
    demand_sound(tmp_path / "c")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_at_work_is_revived_and_the_attempt_commits(
    tmp_path: Path, job: Job, processes: Start, victim: int
) -> None:
    writers = processes(3, **{f"member{victim}": (hook("kill", 5),)})
    submissions = job.submit(job.attempt(tmp_path / "c"), writers)
    assert len({outcome(one) for one in submissions}) == 1
    demand_sound(tmp_path / "c")


@pytest.mark.parametrize(
    ("mode", "every"),
    [
        pytest.param("/", 4, id="in some"),
        pytest.param("", 1, id="before", marks=pytest.mark.long),
        pytest.param("/", 1, id="in", marks=pytest.mark.long),
        pytest.param("+", 1, id="after", marks=pytest.mark.long),
    ],
)
def test_a_committer_that_is_killed_at_each_change_in_turn_is_revived_until_the_attempt_commits(
    tmp_path: Path, processes: Start, mode: str, every: int
) -> None:
    """Its first process is killed at its first change, the next one at its second, and so on. [SAVE-89, SAVE-95]"""
    small = Job({"t": {"a": torch.arange(9.0), "b": torch.arange(4)}, "n": 1}, 3)
    writers = processes(3, member0=tuple(hook("kill", f"{at}{mode}") for at in range(1, 41, every)))
    submissions = small.submit(small.attempt(tmp_path / "c"), writers)
    assert len({outcome(one) for one in submissions}) == 1
    assert writers[0].deaths > 15 // every
    state = {"t": {"a": torch.zeros(9), "b": torch.zeros(4, dtype=torch.int64)}, "n": 0}
    ek.load(state, tmp_path / "c")
    assert state["t"]["a"].tolist() == list(range(9))  # type: ignore[index]
    assert ek.open(tmp_path / "c").verify().problems == ()


def test_another_writer_commits_when_the_committer_is_stopped(tmp_path: Path, job: Job, processes: Start) -> None:
    """[SAVE-83]"""
    writers = processes(3, limits=SUCCESSION, silence_s=600.0)  # its trainer does not mind either
    attempt = job.attempt(tmp_path / "c")
    first = writers[0].submit(job.members[0].staged(attempt), job.members[0].arena)
    first.result(BOUND_S)  # it has attested
    pid = writers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # neither revived nor heard
    try:
        others = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (1, 2)]
        found = {outcome(one) for one in others}
        assert len(found) == 1
        demand_sound(tmp_path / "c")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert first.decided.result(BOUND_S) in found  # the old committer obeys what it finds
    demand_sound(tmp_path / "c")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c"]


def test_a_member_that_never_comes_is_lost_and_the_others_are_told(tmp_path: Path, job: Job, processes: Start) -> None:
    writers = processes(3, limits=MISSING)
    attempt = job.attempt(tmp_path / "c")
    submissions = [writers[2].submit(job.members[2].staged(attempt), job.members[2].arena)]
    submissions[0].result(BOUND_S)  # the committer is up, and has heard of it
    submissions.append(writers[0].submit(job.members[0].staged(attempt), job.members[0].arena))
    for one in submissions:
        error = one.decided.exception(BOUND_S)
        assert isinstance(error, RankLost)
        assert [failure.rank for failure in error.report] == [1]
    with pytest.raises(NotACheckpoint):
        ek.open(tmp_path / "c")


def test_nobody_commits_what_the_only_candidates_took_along(tmp_path: Path, job: Job) -> None:
    """Member 0 gone before it attested: the next candidate aborts at once, and says who is lost. [SAVE-82, SAVE-83]"""
    writers = threads(LocalStore(tmp_path), 3)
    writers[0].close(limit_s=0)
    attempt = job.attempt(tmp_path / "c")
    submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (1, 2)]
    for one in submissions:
        error = one.decided.exception(BOUND_S)
        assert isinstance(error, RankLost)
        assert [failure.rank for failure in error.report] == [0]
    assert drafts(tmp_path) == []


def test_what_a_committer_attested_that_is_gone_by_now_is_committed_at_once(tmp_path: Path, job: Job) -> None:
    """[SAVE-82, SAVE-83]"""
    writers = threads(LocalStore(tmp_path), 3)
    attempt = job.attempt(tmp_path / "c")
    writers[0].submit(job.members[0].staged(attempt), job.members[0].arena).result(BOUND_S)
    writers[0].close(limit_s=0)
    submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (1, 2)]
    assert len({outcome(one) for one in submissions}) == 1
    demand_sound(tmp_path / "c")


def test_whom_no_candidate_is_left_for_gives_up_at_once_and_obeys_what_it_finds(tmp_path: Path) -> None:
    """Of one attempt it is the last that is left; another one was aborted before it spoke of it. [SAVE-80, SAVE-83]"""
    four = Job({"t": torch.arange(9.0)}, 4)
    writers = threads(LocalStore(tmp_path), 4)
    for name, others in (("aborted", (0, 1, 2)), ("open", ())):
        attempt = four.attempt(tmp_path / name)
        for member in others:
            one = writers[member].withdraw(attempt.attempt, NoSpace("no room here"))
            assert isinstance(one.decided.exception(BOUND_S), NoSpace)
        for writer in writers[:3]:
            writer.close(limit_s=0)
        error = writers[3].withdraw(attempt.attempt, NoSpace("none here either")).decided.exception(BOUND_S)
        assert isinstance(error, RankLost)
        assert "no writer that could commit was reached" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("executor", ["process", "thread"])
def test_whoever_leaves_its_seat_keeps_nobody_and_finishes_what_it_has(tmp_path: Path, processes: Start, executor: str) -> None:
    """The team breaks while member 0 tells the others of a second attempt, of which 2 alone hears. [SAVE-100, SAVE-105]"""
    four = Job({"t": {"a": torch.arange(9.0)}, "n": 1}, 4)
    writers = processes(4) if executor == "process" else threads(LocalStore(tmp_path), 4)
    first, second = four.attempt(tmp_path / "first"), four.attempt(tmp_path / "second")
    begun = [writers[m].submit(four.members[m].staged(first), four.members[m].arena) for m in (0, 1, 3)]
    for one in begun:
        one.result(BOUND_S)
    for member in (0, 1, 3):
        leave_seat(writers[member])
    begun.append(writers[2].submit(four.members[2].staged(first), four.members[2].arena))
    assert len({outcome(one) for one in begun}) == 1
    assert ek.open(tmp_path / "first").verify().problems == ()
    error = writers[2].withdraw(second.attempt, NoSpace("no room")).decided.exception(BOUND_S)
    assert isinstance(error, NoSpace)
    third = four.attempt(tmp_path / "third")
    alone = writers[2].submit(four.members[2].staged(third), four.members[2].arena)
    error = alone.decided.exception(BOUND_S)
    assert isinstance(error, RankLost)
    assert [failure.rank for failure in error.report] == [0, 1, 3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first"]


def leave_seat(writer: Supervisor | ThreadWriter) -> None:
    writer.leave_seat(writer._seat) if isinstance(writer, Supervisor) else writer.leave_seat()


class TestInARun:
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path)

    def begun(self, store: LocalStore, token: str = "t") -> int:
        holding = complete(claim(store, Claimer("unix:nobody", token, "host", 1, 1, 1.0)))
        complete(start(store, holding, continued=None))
        return holding.epoch

    def test_an_attempt_is_committed_by_its_register(
        self, store: LocalStore, tmp_path: Path, job: Job, processes: Start
    ) -> None:
        register = AttemptId(10, self.begun(store), 1)
        submissions = job.submit(job.attempt_in_run(store, register), processes(3))
        assert len({outcome(one) for one in submissions}) == 1
        demand_sound(tmp_path / register.folder)
        assert (tmp_path / "commits" / register.register).exists()

    def test_what_a_superseded_job_commits_is_not_acknowledged(
        self, store: LocalStore, tmp_path: Path, job: Job, processes: Start
    ) -> None:
        register = AttemptId(10, self.begun(store), 1)
        attempt = job.attempt_in_run(store, register)
        self.begun(store, "another")
        errors = [one.decided.exception(BOUND_S) for one in job.submit(attempt, processes(3))]
        assert {type(error) for error in errors} == {Superseded}

    def test_a_failed_attempt_is_aborted_by_its_register(self, store: LocalStore, tmp_path: Path, job: Job) -> None:
        register = AttemptId(10, self.begun(store), 1)
        attempt = job.attempt_in_run(store, register)
        writers = threads(store, 3)
        submissions = [writers[m].submit(job.members[m].staged(attempt), job.members[m].arena) for m in (0, 1)]
        submissions.append(writers[2].withdraw(attempt.attempt, StorageFailed("no")))
        for one in submissions:
            assert isinstance(one.decided.exception(BOUND_S), CheckpointError)
        assert b'"abort"' in (tmp_path / "commits" / register.register).read_bytes()
        end = time.monotonic() + BOUND_S
        while (tmp_path / register.folder).exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert not (tmp_path / register.folder).exists()
