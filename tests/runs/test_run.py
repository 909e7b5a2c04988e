"""`ek.Run` in one process: history, fallback, rollback, retention, metrics, who holds a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.commit import outcome as outcome_module
from elastickpt.commit.attempt import leave_path, require_idle, take_path
from elastickpt.errors import Damaged, NotACheckpoint, Refused, RunBusy, StateMismatch, StorageFailed, Superseded
from elastickpt.ledger.branch import history
from elastickpt.ledger.names import parse_id
from elastickpt.runs import restoring as restoring_module
from elastickpt.runs.events import RestoreEvent, SaveEvent

OPTIONS = ek.RunOptions(signals={})
BOUND_S = 60.0


class Training:
    """A state whose contents follow from the step alone."""

    def __init__(self) -> None:
        self.weight = torch.zeros(300)
        self.state: dict[str, object] = {"t": {"w": self.weight}, "n": ek.PerRank({"step": 0})}

    def at(self, step: int) -> None:
        self.weight.copy_(torch.arange(300.0) * step)

    def demand(self, step: int) -> None:
        assert torch.equal(self.weight, torch.arange(300.0) * step)


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def open_run(tmp_path: Path, training: Training) -> Iterator[object]:
    runs: list[ek.Run] = []

    def make(root: str = "run", **changes: object) -> ek.Run:
        keep = changes.pop("keep", None)
        options = replace(OPTIONS, **changes)  # type: ignore[arg-type]
        runs.append(ek.Run(tmp_path / root, training.state, keep=keep, options=options))  # type: ignore[arg-type]
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def saved(run: ek.Run, training: Training, *steps: int, **about: object) -> None:
    for step in steps:
        training.at(step)
        run.save(step, **about).result(BOUND_S)  # type: ignore[arg-type]


def steps_of(root: Path, state: str = "live") -> list[int]:
    return [entry.step for entry in history(root) if entry.state == state]


def until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    first = run.restore()
    assert (first.step, first.path, first.skipped, first.epoch) == (0, None, (), 1)
    saved(run, training, 1, 2, 3)
    run.close()
    training.at(0)
    again = open_run().restore()
    assert (again.step, again.epoch) == (3, 2)
    training.demand(3)
    assert ek.open(tmp_path / "run", step=2).step == 2
    assert (tmp_path / "run" / "latest").resolve().name == Path(again.path).name


def test_the_newest_that_verifies_is_taken_and_what_was_bad_is_named(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """[SAVE-7]"""
    run = open_run()
    run.restore()
    saved(run, training, 1, 2)
    run.close()
    (chunk,) = (tmp_path / "run").glob("step-0000000002.*/extra/t/w/c.0")
    data = bytearray(chunk.read_bytes())
    data[700] ^= 1
    chunk.write_bytes(data)
    found = open_run().restore()
    assert found.step == 1
    training.demand(1)
    (one,) = found.skipped
    assert one.step == 2
    assert all(word in one.reason for word in ("extra/t/w/c.0", "block 0", "t/w"))


def test_a_run_whose_checkpoints_are_all_bad_is_not_begun_anew(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    saved(run, training, 1)
    run.close()
    (manifest,) = (tmp_path / "run").glob("step-*/checkpoint.json")
    manifest.write_bytes(manifest.read_bytes()[:-3])
    with pytest.raises(Damaged, match="none of 1 checkpoints loads"):
        open_run().restore()


def test_a_run_whose_only_checkpoint_is_gone_is_not_begun_anew(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    saved(run, training, 1, 2)
    run.close()
    (newer,) = (tmp_path / "run").glob("step-0000000002.*")
    shutil.rmtree(newer)
    with pytest.raises(Damaged, match=r"none of 1 checkpoints loads; .*the folder is gone"):
        open_run(take_over=True).restore(step=2)
    found = open_run(take_over=True).restore()
    assert (found.step, [one.step for one in found.skipped]) == (1, [2])
    (older,) = (tmp_path / "run").glob("step-0000000001.*")
    shutil.rmtree(older)
    with pytest.raises(Damaged, match="none of 1 checkpoints loads"):
        open_run(take_over=True).restore()


def test_a_broken_checkpoint_that_is_older_is_not_passed_over(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    saved(run, training, 1, 2)
    run.close()
    (older,) = (tmp_path / "run").glob("step-0000000001.*")
    shutil.rmtree(older)
    found = open_run().restore()
    assert (found.step, found.skipped) == (2, ())


def test_a_restore_that_failed_may_be_called_again(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """It has claimed the run: whoever answers for the newest claim is this job itself."""
    run = open_run()
    run.restore()
    saved(run, training, 1)
    run.close()
    again = open_run()
    with pytest.raises(NotACheckpoint):
        again.restore(step=7)
    with pytest.raises(Refused, match="restore"):
        again.save(2)
    assert again.restore().step == 1
    saved(again, training, 2)
    with pytest.raises(NotACheckpoint):
        again.restore(step=7)
    with pytest.raises(Superseded):
        again.save(3).result(BOUND_S)
    assert again.restore(step=1).step == 1
    saved(again, training, 2)


def test_a_job_that_was_superseded_does_not_take_the_run_back_unasked(training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """[RUN-46]"""
    first = open_run()
    first.restore()
    saved(first, training, 1)
    second = open_run(take_over=True)
    second.restore()
    with pytest.raises(RunBusy):
        first.restore()
    second.close()
    assert first.restore().epoch == 3


def test_a_save_that_a_rollback_gave_up_does_not_stop_the_job(
    training: Training,
    open_run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = open_run(saving=ek.AsyncOptions(executor="thread", exit_limit_s=0.01))
    run.restore()
    saved(run, training, 1)
    committing, let, real = threading.Event(), threading.Event(), outcome_module.decide

    def late(*about: object) -> object:
        committing.set()
        let.wait(BOUND_S)
        return real(*about)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(outcome_module, "decide", late)
        left = run.save(2)
        assert committing.wait(BOUND_S)
        assert run.restore().step == 1
        swept = threading.Event()
        run._upkeep.call(swept.set)  # what it sweeps beside a late writer is said by other tests
        assert swept.wait(BOUND_S)
        let.set()
        assert isinstance(left.exception(BOUND_S), Superseded)
    until(lambda: not run._under_way, "its end is known")
    saved(run, training, 3)


def test_a_first_claim_that_cannot_be_read_ends_no_restore(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """Member 0 alone reads it, when all ranks have restored."""
    for _ in range(2):
        run = open_run()
        run.restore()
        run.close()
    (tmp_path / "run" / "commits" / "epoch-1.json").write_bytes(b"{}")
    assert open_run().restore().epoch == 3


def test_what_the_store_cannot_read_now_is_not_taken_for_damaged(
    tmp_path: Path,
    training: Training,
    open_run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else retention would remove what it is told to keep."""
    run = open_run()
    run.restore()
    saved(run, training, 1, 2)
    run.close()
    real = restoring_module.load

    def load(state: object, path: str, **about: object) -> object:
        if "0002" in path:
            raise StorageFailed("stale handle")
        return real(state, path, **about)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring_module, "load", load)
    again = open_run(keep=ek.Keep(last=1, every=2))
    assert again.restore().step == 1
    saved(again, training, 3)
    again.close()
    assert again._upkeep._verified == {parse_id("0000000001-1-1"): True}


def test_after_a_rollback_saves_by_clock_are_due_again(training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """What was published for a later step before is out of date. [RUN-91]"""
    run = open_run()
    run.restore()
    saved(run, training, 1)
    run.close()
    run = open_run(due=ek.Every(seconds=1e-6))
    run.restore()
    assert [step for step in range(2, 9) if run.due(step)] == [4, 7]
    run.restore(step=1)
    assert [step for step in range(2, 6) if run.due(step)] == [4]


def test_a_run_that_nobody_closes_saves_what_was_staged_last(tmp_path: Path) -> None:
    script = f"""
import time, torch, elastickpt as ek
from elastickpt.saving import beside
real = beside.require_token
beside.require_token = lambda *args: (time.sleep(0.5), real(*args))  # it is handed over behind the end of the program
run = ek.Run({str(tmp_path / "run")!r}, {{"t": torch.ones(1 << 20)}}, options=ek.RunOptions(signals={{}}))
run.restore()
run.save(1)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ek.open(tmp_path / "run").step == 1


def test_after_a_rollback_the_same_steps_commit_again(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    saved(run, training, 1, 2, 3)
    assert run.restore(step=1).step == 1
    training.demand(1)
    training.at(20)
    run.save(2).result(BOUND_S)
    assert steps_of(tmp_path / "run") == [2, 1]
    assert steps_of(tmp_path / "run", "abandoned") == [3, 2]
    run.close()
    assert open_run().restore().step == 2
    training.demand(20)
    with pytest.raises(NotACheckpoint, match="step 3"):
        open_run(take_over=True).restore(step=3)
    run = open_run(take_over=True)
    assert run.restore(step=3, epoch=1).step == 3
    training.demand(3)


def test_what_is_not_kept_goes_after_the_commit(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run(keep=ek.Keep(last=2, every=4, best=ek.Best("loss", 1, mode="min")))
    run.restore()
    for step in range(1, 8):
        saved(run, training, step, metrics={"loss": abs(step - 3)})
    until(lambda: sorted(steps_of(tmp_path / "run")) == [3, 4, 6, 7], "steps 3, 4, 6 and 7 alone are left")
    run.add_metrics(4, {"loss": -1.0})
    until(lambda: sorted(steps_of(tmp_path / "run")) == [4, 6, 7], "step 4 is the best now")
    folders = sorted(entry.name for entry in (tmp_path / "run").glob("step-*"))
    until(lambda: len(list((tmp_path / "run").glob("step-*"))) == 3, f"folders go with their registers: {folders}")


def test_a_second_job_is_refused_while_the_first_one_lives(  # type: ignore[no-untyped-def]
    tmp_path: Path, training: Training, open_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_run()
    first.restore()
    saved(first, training, 1)
    waited: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(restoring_module, "_wait_for_orphans", lambda store, limit_s: waited.append(limit_s) or 0)
        with pytest.raises(RunBusy, match=f"process {os.getpid()} on host"):
            open_run(orphans_s=60.0).restore()
    assert waited == []  # for writers of a job that lives
    second = open_run(take_over=True)
    assert second.restore().step == 1
    with pytest.raises(Superseded):
        first.save(2).result(BOUND_S)
    until(lambda: first._superseded is not None, "the first job knows")
    with pytest.raises(Superseded, match=f"epoch 2.*process {os.getpid()}"):
        first.save(3)
    saved(second, training, 2)
    assert steps_of(tmp_path / "run") == [2, 1]


def test_nothing_is_written_before_restore(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    with pytest.raises(Refused, match="restore"):
        run.save(1)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_state_that_does_not_fit_is_an_error_and_no_reason_to_go_further_back(
    tmp_path: Path,
    training: Training,
    open_run,  # type: ignore[no-untyped-def]
) -> None:
    run = open_run()
    run.restore()
    saved(run, training, 1, 2)
    run.close()
    other = ek.Run(tmp_path / "run", {"t": {"w": torch.zeros(7)}}, options=OPTIONS)
    with pytest.raises(StateMismatch):
        other.restore()
    other.close()


def test_watchers_are_told_and_a_trace_is_written(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    told: list[SaveEvent | RestoreEvent] = []

    class Watching:
        def saved(self, event: SaveEvent) -> None:
            told.append(event)

        def restored(self, event: RestoreEvent) -> None:
            told.append(event)

    run = open_run(watchers=(Watching(),), trace=str(tmp_path / "trace"))
    run.restore()
    saved(run, training, 1)
    run.close()
    assert [type(one) for one in told] == [RestoreEvent, SaveEvent]
    assert told[1].outcome == "committed"  # type: ignore[union-attr]
    (file,) = (tmp_path / "trace").iterdir()
    names = {event["name"] for event in json.loads(file.read_text())}
    assert {"restore", "stage", "agree", "write", "commit"} <= names


def test_due_by_steps_and_by_a_notice(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run(due=ek.Every(steps=3), signals={signal.SIGUSR1: 30.0})
    run.restore()
    assert [step for step in range(1, 8) if run.due(step)] == [3, 6]
    assert not run.ending
    os.kill(os.getpid(), signal.SIGUSR1)
    due = {step: run.due(step) for step in (8, 9, 10)}
    assert run.ending
    assert due[10]  # two steps after the one at which rank 0 saw it
    saved(run, training, 10)


def test_a_job_ends_by_what_a_poller_of_notices_says(training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run(due=ek.Every(steps=100))
    run.restore()
    assert not run.due(1)
    run.notify("spot", left_s=60.0)
    assert [run.due(step) for step in (2, 3, 4)] == [False, False, True]
    assert run.ending
    saved(run, training, 4)


def test_a_job_that_was_killed_leaves_what_it_staged_to_its_writer(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    """Killed when its save is written: its writer commits alone, and the next job, which waits, adopts it. [SAVE-97]"""
    script = f"""
import os, signal, torch, elastickpt as ek
from elastickpt.saving.beside import SavesBeside
state = {{"t": {{"w": torch.arange(300.0) * 5}}, "n": ek.PerRank({{"step": 0}})}}
run = ek.Run({str(tmp_path / "run")!r}, state, options=ek.RunOptions(signals={{}}))
run.restore()
def killed(beside, task, submission):
    submission.future.result(60)  # its writer has written and attested, and commits
    os.kill(os.getpid(), signal.SIGKILL)
SavesBeside.follow = killed
run.save(5).result(60)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = open_run().restore()
    assert found.step == 5
    training.demand(5)


def test_a_run_made_beside_the_main_thread_says_that_it_hears_no_signals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """[RUN-94]"""

    def make(name: str, options: ek.RunOptions) -> None:
        made = threading.Thread(target=lambda: ek.Run(tmp_path / name, {}, options=options).close(), name="trainer")
        made.start()
        made.join(60.0)

    with caplog.at_level(logging.WARNING, logger="elastickpt"):
        make("deaf", ek.RunOptions())
        (said,) = [record.getMessage() for record in caplog.records if "deaf" in record.getMessage()]
        assert all(part in said for part in ("deaf", "thread 'trainer'", "SIGTERM", "SIGUSR1", "run.notify()"))
        caplog.clear()
        make("told so", ek.RunOptions(signals={}))
        ek.Run(tmp_path / "in the main thread", {}).close()
        assert [one for one in caplog.records if "run.notify()" in one.getMessage()] == []


STEPS_ALIKE = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])]


@pytest.mark.parametrize("step", STEPS_ALIKE, ids=lambda one: f"{type(one).__name__}-{one.dtype}-{one.ndim}")
def test_a_step_may_be_whatever_counts_as_an_int(tmp_path: Path, training: Training, open_run, step: object) -> None:  # type: ignore[no-untyped-def]
    run = open_run(due=ek.Every(steps=3))
    run.restore()
    assert run.due(step)
    training.at(3)
    run.save(step, metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)}).result(BOUND_S)
    run.add_metrics(step, {"later": np.int64(1)})
    run.close()
    (entry,) = history(tmp_path / "run")
    assert (entry.step, dict(entry.metrics)) == (3, {"loss": 0.5, "accuracy": 0.25, "later": 1.0})
    assert ek.open(tmp_path / "run", step=step).step == 3  # type: ignore[arg-type]
    assert open_run().restore(step=step).step == 3
    ek.save(training.state, tmp_path / "alone", step=step)  # type: ignore[arg-type]
    ek.async_save(training.state, tmp_path / "beside", step=step).result(BOUND_S)  # type: ignore[arg-type]
    assert [ek.open(tmp_path / name).step for name in ("alone", "beside")] == [3, 3]


@pytest.mark.parametrize("step", [True, 2.0, np.float64(2), "2", None, -1, 10**18, torch.tensor(2.0), torch.ones(2)], ids=str)
def test_what_is_no_step_is_refused(training: Training, open_run, step: object) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    for call in (run.save, run.due):
        with pytest.raises(Refused, match="expected the number of completed steps"):
            call(step)
    saved(run, training, 1)


def test_a_run_is_loaded_as_it_is_opened_and_never_claimed(tmp_path: Path, training: Training, open_run) -> None:  # type: ignore[no-untyped-def]
    run = open_run()
    run.restore()
    saved(run, training, 1, 2, 3)
    run.restore(step=1)
    saved(run, training, 5)
    root = tmp_path / "run"
    before = sorted(one.name for one in (root / "commits").iterdir())
    for path, about, step in (
        (root, {}, 5),
        (f"{root}@latest", {}, 5),
        (root / "latest", {}, 5),
        (f"{root}@1", {}, 1),
        (f"{root}@3.1", {}, 3),
        (root, {"step": 1}, 1),
        (root, {"step": 3, "epoch": 1}, 3),
        (root / "step-0000000002.1.1", {}, 2),
    ):
        training.at(0)
        report = ek.load(training.state, path, **about)
        assert report.step == step
        training.demand(step)
    with pytest.raises(NotACheckpoint, match=r"step 3: no commit on the live branch; .*name the epoch"):
        ek.load(training.state, f"{root}@3")
    shutil.rmtree(root / "step-0000000005.2.1")
    with pytest.raises(Damaged, match="the folder is gone"):
        ek.load(training.state, root)
    assert sorted(one.name for one in (root / "commits").iterdir()) == before
    with pytest.raises(NotACheckpoint):
        ek.load(training.state, tmp_path / "nothing@2")


def test_a_path_from_home_leads_there(
    tmp_path: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    training.at(1)
    ek.save(training.state, "~/out/a", step=1)
    assert ek.async_save(training.state, "~/out/b", step=1).result(BOUND_S).path == str(home / "out" / "b")
    with ek.Run("~/run", training.state, options=replace(OPTIONS, trace="~/traces")) as run:
        run.restore()
        saved(run, training, 1)
        assert run.root == str(home / "run")
    for path in ("~/out/a", "~/out/b", Path("~/run"), "~/run@1", "~/run@latest"):
        assert ek.load(training.state, path).step == 1
        assert ek.open(path).step == 1
    assert [one.step for one in history("~/run")] == [1]
    assert main(["inspect", "~/run@1"]) == 0
    assert ek.adopt("~/run").epoch == 0
    assert list((home / "traces").iterdir()) != []
    assert list(work.iterdir()) == []
    (work / "~").mkdir()
    ek.save(training.state, "./~/kept", step=1)
    assert (work / "~" / "kept" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("step", "metrics", "place"),
    [("two", {}, "a step that is no number of epoch 1"), (2, {"loss": torch.ones(2)}, "step 2 of epoch 1")],
)
def test_a_save_that_is_refused_says_why_whatever_else_goes_to_its_place(
    tmp_path: Path, training: Training, caplog: pytest.LogCaptureFixture, step: object, metrics: dict[str, object], place: str
) -> None:
    """Saves follow each other at once: one to the same step is still under way."""
    taken = f"{tmp_path.as_uri()}/run, {place}"
    with ek.Run(tmp_path / "run", training.state, options=OPTIONS) as run:
        run.restore()
        take_path(taken)
        try:
            with pytest.raises(Refused) as refused:
                run.save(step, metrics=metrics)  # type: ignore[arg-type]
            run.close()
            with pytest.raises(Refused, match="under way"):
                require_idle(taken)
        finally:
            leave_path(taken)
    (said,) = [line for record in caplog.records if "not saved" in (line := record.getMessage())]
    assert f"{place}: not saved" in said
    assert str(refused.value) in said
