"""A trainer is killed at each operation of its own on the run's store; its writer lives on; the next job goes on.

And a writer that is stopped while another job claims the run, and goes on afterwards.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import elastickpt as ek
from elastickpt.commit.draft import marked
from elastickpt.ledger.branch import history
from elastickpt.runs import run as run_module
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import open_store
from elastickpt.testing.faults import CHANGING, CallAt, FaultyStore, Operation
from tools.gloo_ranks import spawn_ranks

OPTIONS = ek.RunOptions(signals={}, orphans_s=30.0)
BOUND_S = 60.0
STEPS = 3


def state_of(step: int) -> dict[str, object]:
    return {"t": {"w": torch.full((100,), float(step)), "v": torch.full((7,), step)}}


def fill(state: dict[str, object], step: int) -> None:
    for tensor in state["t"].values():  # type: ignore[attr-defined]
        tensor.fill_(step)


def demand(state: dict[str, object], step: int) -> None:
    assert all((tensor == step).all() for tensor in state["t"].values()), state  # type: ignore[attr-defined]


def saves(rank: int, world_size: int, root: str, at: int, mode: str) -> None:
    """Saves some steps, and is killed at its `at`-th change of the store, if it comes to that."""

    def kill(_: Operation) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty(url: str) -> FaultyStore:
        return FaultyStore(open_store(url), CallAt(at, kill, mode=mode), counted=CHANGING)  # type: ignore[arg-type]

    run_module.open_store = faulty  # type: ignore[attr-defined]
    state = state_of(0)
    run = ek.Run(root, state, keep=ek.Keep(last=2), options=OPTIONS)
    start = run.restore().step
    for step in range(start + 1, start + STEPS + 1):
        fill(state, step)
        run.save(step).result(BOUND_S)
        with open(f"{root}.acknowledged", "a") as file:
            file.write(f"{step}\n")
    run.close()


def goes_on(root: Path) -> None:
    """The next job: nothing acknowledged is lost, everything that counts is sound, and it saves."""
    acknowledged = [int(line) for line in Path(f"{root}.acknowledged").read_text().split()] if has_acknowledged(root) else []
    state = state_of(-1)
    run = ek.Run(root, state, options=OPTIONS)
    start = run.restore()
    assert start.skipped == ()
    assert start.step >= max(acknowledged, default=0)
    demand(state, start.step if start.step else -1)
    fill(state, start.step + 1)
    run.save(start.step + 1).result(BOUND_S)
    run.close()
    entries = history(root)
    assert entries[0].step == start.step + 1
    for entry in entries:
        assert ek.open(root, step=entry.step, epoch=entry.epoch).verify().problems == ()
    folders = {path.name for path in root.glob("step-*")}
    assert folders == {entry.folder for entry in entries}


def has_acknowledged(root: Path) -> bool:
    return Path(f"{root}.acknowledged").exists()


def killed_at(root: Path, at: int, mode: str) -> bool:
    """Whether the job was killed, and had not ended before."""
    with spawn_ranks(saves, 1, str(root), at, mode) as ranks:
        (outcome,) = ranks.wait()
    return bool(outcome.status == -signal.SIGKILL)


@pytest.mark.parametrize("mode", ["before", "torn", "after"])
@pytest.mark.long
def test_a_trainer_killed_at_any_of_its_changes_of_the_run(tmp_path: Path, mode: str) -> None:
    at = 1
    while killed_at(tmp_path / f"{at}", at, mode):
        goes_on(tmp_path / f"{at}")
        at += 1
    assert at > 20


@pytest.mark.parametrize("at", [3, 9, 14, 19, 24])
def test_a_trainer_killed_at_some_of_them(tmp_path: Path, at: int) -> None:
    """In the claim, before the first attempt, in one, in the second, in retention."""
    assert killed_at(tmp_path / "run", at, "before")
    goes_on(tmp_path / "run")


def saves_to_a_stopped_writer(rank: int, world_size: int, root: str) -> None:
    state = state_of(1)
    run = ek.Run(root, state, options=OPTIONS)
    run.restore()
    run.save(1).result(BOUND_S)
    (writer,) = psutil.Process().children()
    writer.suspend()
    Path(f"{root}.writer").write_text(str(writer.pid))
    fill(state, 2)
    run.save(2)
    time.sleep(BOUND_S)


def test_a_writer_that_was_stopped_across_a_claim_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with spawn_ranks(saves_to_a_stopped_writer, 1, str(root)) as ranks:
        until(lambda: list(root.glob("step-0000000002.1.1/draft.json")), "the second attempt was begun")
        until(lambda: len(marked(LocalStore(root).url)) == 1, "it was handed to the writer")
        time.sleep(0.2)
        ranks.kill(0)
    writer = psutil.Process(int(Path(f"{root}.writer").read_text()))
    try:
        state = state_of(0)
        run = ek.Run(root, state, options=ek.RunOptions(signals={}, orphans_s=0.3))
        start = run.restore()
        assert start.step == 1
        assert "1 writers of an earlier job" in start.notes[0]
        fill(state, 20)
        run.save(2).result(BOUND_S)
    finally:
        writer.resume()
    until(lambda: not gone_wrong(writer), "the old writer ended")
    fill(state, 30)
    run.save(3).result(BOUND_S)
    run.close()
    assert [(entry.step, entry.epoch) for entry in history(root)] == [(3, 2), (2, 2), (1, 1)]
    for step, held in ((1, 1), (2, 20), (3, 30)):
        path = ek.open(root, step=step).path
        ek.load(state, path)
        demand(state, held)
        assert ek.open(root, step=step).verify().problems == ()


def gone_wrong(writer: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(writer.is_running() and writer.status() != psutil.STATUS_ZOMBIE)
    return False


def until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)
