"""Real ranks that are killed, stopped or fail at a storage operation of a save: survivors say so, nothing is half there."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from killed import SHAPES, Ended, Plan, save_and_tell, whole
from simulated import State, drafts, files, save_on, state

import elastickpt as ek
from elastickpt.saving.save import CheckpointInfo
from elastickpt.storage.local import LocalStore
from elastickpt.testing.faults import Mode
from tools.gloo_ranks import Outcome, Ranks, run_ranks, spawn_ranks

pytestmark = pytest.mark.ranks

DEADLINE_S = 60.0  # by which every survivor must have returned; the harness kills and reports later ones
AT_ONCE = 4  # jobs that run side by side


class Job:
    """Ranks that save at `folder/new`, `folder/old` standing beside."""

    def __init__(self, folder: Path, world: int, plan: Plan) -> None:
        self.folder, self.world, self.plan = folder, world, plan
        self.store = LocalStore(folder)
        self.before = files(self.store, "old")
        self.ranks: Ranks = spawn_ranks(save_and_tell, world, plan, timeout_s=DEADLINE_S)

    def there(self) -> bool:
        """Whether the new checkpoint exists, in which case it is whole; the old one is as it was in any case."""
        assert files(self.store, "old") == self.before
        require_whole(self.folder / "old")
        if not (self.folder / "new").exists():
            return False
        require_whole(self.folder / "new")
        return True

    def survivors(self, outcomes: Sequence[Outcome]) -> list[Ended]:
        ended = [outcome for outcome in outcomes if outcome.rank != self.plan.victim]
        assert [outcome.error for outcome in ended] == [None] * len(ended), self.plan
        return [outcome.value for outcome in ended]


def require_whole(path: Path) -> None:
    checkpoint = ek.open(path)
    assert checkpoint.verify().problems == ()
    for name in SHAPES:
        (identity,) = [found for found in checkpoint.records if name in found.name.split("/") or found.name == name]
        assert (checkpoint.read(identity) == whole(name, str(path)).numpy()).all()


def operations_of(folder: Path, world: int) -> list[tuple[str, ...]]:
    """Each rank's storage operations in a save that nothing disturbs, at `old`."""
    ended = run_ranks(save_and_tell, world, Plan(str(folder / "old")))
    assert [one.kind for one in ended] == [None] * world
    return [one.operations for one in ended]


def moments(operations: Sequence[str], count: int) -> list[int]:
    """`count` operations, spread over all, first and last among them."""
    last = len(operations)
    return sorted({1 + round(number * (last - 1) / (count - 1)) for number in range(count)})


def jobs(memory_path: Path, world: int, plans: Sequence[Plan]) -> Iterator[Job]:
    """A job for each plan, each in a folder of its own, a few of them at once, in the order of plans."""
    running: list[Job] = []
    template = files(LocalStore(memory_path), "old")
    for number, plan in enumerate(plans):
        folder = memory_path / f"job-{number}-{plan.mode}"
        for path, data in template.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        running.append(Job(folder, world, replace(plan, path=str(folder / "new"))))
        if len(running) == AT_ONCE:
            yield running.pop(0)
    yield from running


def judge_killed(job: Job) -> None:
    """Survivors that lost the committer do not say that there is nothing. [SAVE-58]"""
    with job.ranks:
        outcomes = job.ranks.wait()
    assert outcomes[job.plan.victim].status == -signal.SIGKILL, job.plan
    there = job.there()
    survivors = job.survivors(outcomes)
    for ended in survivors:
        if ended.kind is None:
            assert there, job.plan
        else:
            assert ended.kind == "rank-lost", (job.plan, ended)
            assert {failure.rank for failure in ended.report} == {job.plan.victim}
            assert not there or "whether new was committed is not known" in ended.message
    if job.plan.victim != 0 and not there:
        assert drafts(job.store) == []  # the committer lives, and cleaned up
        assert len({(ended.kind, ended.message, ended.report) for ended in survivors}) == 1
    if there:
        job.store.remove_tree("new")
    (saved,) = save_on([job.store], "new", [state(1)])
    assert isinstance(saved, CheckpointInfo)
    assert drafts(job.store) == []


@pytest.mark.parametrize(("world", "victim", "count"), [(2, 0, 12), (2, 1, 12), (4, 0, 6), (4, 2, 6)])
def test_a_rank_killed_at_a_sample_of_moments(memory_path: Path, world: int, victim: int, count: int) -> None:
    operations = operations_of(memory_path, world)[victim]
    plans = [Plan("", victim, "kill", n, "before" if n % 2 else "after") for n in moments(operations, count)]
    for job in jobs(memory_path, world, plans):
        judge_killed(job)


@pytest.mark.long
@pytest.mark.parametrize(("world", "victim"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_rank_killed_at_every_moment(memory_path: Path, world: int, victim: int) -> None:
    operations = operations_of(memory_path, world)[victim]
    for mode in get_args(Mode):
        plans = [Plan("", victim, "kill", n + 1, mode) for n in range(len(operations))]
        for job in jobs(memory_path, world, plans):
            judge_killed(job)


@pytest.mark.parametrize(("world", "victim"), [(2, 1), (4, 0)])
def test_no_space_on_one_rank_is_the_same_report_on_all(memory_path: Path, world: int, victim: int) -> None:
    operations = operations_of(memory_path, world)[victim]
    place = 1 + operations.index("writer.write")
    (job,) = jobs(memory_path, world, [Plan("", victim, "no space", place)])
    with job.ranks:
        outcomes = job.ranks.wait()
    ended = [outcome.value for outcome in outcomes]
    assert {(one.kind, one.message, one.report) for one in ended} == {("no-space", ended[0].message, ended[0].report)}
    assert [failure.rank for failure in ended[0].report] == [victim]
    assert not job.there()
    assert drafts(job.store) == []


# -- stopped ranks -----------------------------------------------------------------------------------------------------


def await_marks(job: Job) -> None:
    """Until the victim is stopped and all others have returned."""
    wanted = {"hit", *(f"ended-{rank}" for rank in range(job.world) if rank != job.plan.victim)}
    limit = time.monotonic() + DEADLINE_S / 2
    while not wanted <= {path.name for path in job.plan.marks.glob("*")}:
        assert time.monotonic() < limit, f"{job.plan}: {wanted} not all there"
        time.sleep(0.05)


def judge_stopped(job: Job, value: State) -> None:
    """While the victim is stopped another process saves at the same path; what the victim does later changes none of it."""
    with job.ranks:
        await_marks(job)
        assert job.there() == (job.plan.mode == "after")
        if job.plan.mode == "before":
            (saved,) = save_on([job.store], "new", [value])
            assert isinstance(saved, CheckpointInfo)
        committed = files(job.store, "new")
        job.ranks.send_signal(job.plan.victim, signal.SIGCONT)
        outcomes = job.ranks.wait()
    assert files(job.store, "new") == committed
    assert files(job.store, "old") == job.before
    for ended in job.survivors(outcomes):
        assert ended.kind == "deadline-exceeded"
        assert {failure.rank for failure in ended.report} == {job.plan.victim}
    late = outcomes[job.plan.victim]
    assert late.error is None, late
    if job.plan.mode == "after":
        assert late.value.kind is None  # it had committed, and the others said that they do not know
    elif job.plan.victim == 0:
        assert late.value.kind == "path-occupied"  # all had attested when it was stopped, so it went on to commit
    else:
        assert (late.value.kind, late.value.report[0].rank) == ("deadline-exceeded", job.plan.victim)
    assert {path.name for path in job.folder.iterdir()} >= {"old", "new"}
    (again,) = save_on([job.store], "other", [value])
    assert isinstance(again, CheckpointInfo)


def test_a_rank_stopped_and_continued_changes_nothing_that_is_committed(memory_path: Path) -> None:
    """Before it writes, while it does, before it attests; the committer also just before its rename, and just after."""
    operations = operations_of(memory_path, 2)
    moments_of = {1: ("read", "open_writer", "writer.write", "sync_directory"), 0: ("writer.sync", "remove", "rename")}
    plans = [
        Plan("", victim, "stop", 1 + operations[victim].index(name), silence_s=3.0)
        for victim, names in moments_of.items()
        for name in names
    ]
    after_rename = Plan("", 0, "stop", 1 + operations[0].index("rename"), "after", silence_s=3.0)
    for job in jobs(memory_path, 2, [*plans, after_rename]):
        judge_stopped(job, state(1))
