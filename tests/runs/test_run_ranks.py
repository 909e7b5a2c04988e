"""`ek.Run` on real gloo ranks: one history for all of them, at any layout; kills, preemption, restarts."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from elastickpt.errors import CheckpointError, RankLost, Refused
from elastickpt.ledger.branch import history
from elastickpt.ledger.history import read_told
from elastickpt.ledger.objects import complete
from elastickpt.storage.local import LocalStore
from tools.gloo_ranks import run_ranks, spawn_ranks

OPTIONS = ek.RunOptions(signals={}, orphans_s=20.0)
BOUND_S = 60.0


def model_of(step: int) -> torch.nn.Module:
    """Sharded over all ranks; its contents follow from the step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Linear(33, 5))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    set_step(model, step)
    return model


def set_step(model: torch.nn.Module, step: int) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.fill_(step * 10 + number)


def demand_step(model: torch.nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        assert (local == step * 10 + number).all()


def trains(rank: int, world_size: int, root: str, steps: int, expected: int) -> list[int]:
    """Restores, goes on for some steps and saves each one; the steps that were restored and committed."""
    model = model_of(0)
    run = ek.Run(root, {"model": model}, keep=ek.Keep(last=2), options=OPTIONS)
    start = run.restore()
    assert start.step == expected
    demand_step(model, expected)
    for step in range(start.step + 1, start.step + steps + 1):
        set_step(model, step)
        run.save(step).result(BOUND_S)
    run.close()
    return [start.step, start.epoch]


def test_jobs_of_other_sizes_go_on_with_each_others_history(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    assert run_ranks(trains, 2, root, 2, 0) == [[0, 1]] * 2
    assert run_ranks(trains, 3, root, 1, 2) == [[2, 2]] * 3
    assert [entry.step for entry in history(root)] == [3, 2]


def refuses(rank: int, world_size: int, root: str) -> str:
    run = ek.Run(root, {"model": model_of(0)}, options=OPTIONS)
    with pytest.raises(Refused, match="ckpt-convert adopt") as refused:
        run.restore()
    run.close()
    return str(refused.value)


def test_a_run_that_lost_its_registers_is_refused_on_all_ranks_alike(tmp_path: Path) -> None:
    """[RUN-100]"""
    root = str(tmp_path / "run")
    run_ranks(trains, 2, root, 1, 0)
    shutil.rmtree(tmp_path / "run" / "commits")
    assert len(set(run_ranks(refuses, 2, root))) == 1
    assert not (tmp_path / "run" / "commits").exists()
    assert ek.adopt(root).adopted == ("step-0000000001.1.1",)
    assert run_ranks(trains, 2, root, 1, 1) == [[1, 3]] * 2


def gives_metrics(rank: int, world_size: int, root: str) -> tuple[str, str, list[str]]:
    """What a save says where rank 1 alone has something that is no number, and what rank 1 logs of metrics of its own."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("elastickpt").addHandler(handler)
    model = model_of(0)
    with ek.Run(root, {"model": model}, options=OPTIONS) as run:
        run.restore()
        errors = []
        for step, metrics in ((1, {"loss": torch.ones(2)}), (np.float32(2), {})):
            given: tuple[object, object] = (step, metrics) if rank else (2, {"loss": 0.5})
            with pytest.raises(Refused) as refused:
                run.save(given[0], metrics=given[1]).result(BOUND_S)  # type: ignore[arg-type]
            errors.append(str(refused.value))
        run.save(3, metrics={"loss": 0.5, "mine": 1.0} if rank else {"loss": torch.tensor(0.25)}).result(BOUND_S)
        for later in ({"later": rank + 1.0}, {"last": 2}):
            run.add_metrics(3, later)
    return errors[0], errors[1], heard


def test_what_is_no_number_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    """And metrics are rank 0's: another rank hears of those of its own that are not used."""
    root = str(tmp_path / "run")
    first, second = run_ranks(gives_metrics, 2, root)
    for error in (*first[:2], *second[:2]):
        assert "expected" in error
        assert "a Tensor of shape (2,)" in error or "float32" in error
    assert [line for line in first[2] if "ignored" in line] == []
    said, added = (line for line in second[2] if "ignored" in line)
    assert "mine" in said
    assert "loss" not in said
    assert added.endswith("metrics added on rank 1 are ignored: those of rank 0 count")
    assert [line for line in (*first[2], *second[2]) if "step 0" in line] == []
    assert [line for line in second[2] if "a step that is no number of epoch 1: not saved" in line]
    (entry,) = history(root)
    assert (entry.step, dict(entry.metrics)) == (3, {"loss": 0.25, "later": 1.0, "last": 2.0})


def loads_a_run(rank: int, world_size: int, root: str) -> list[int | None]:
    model = model_of(0)
    steps = []
    for path in (root, f"{root}@latest", f"{root}@1"):
        steps.append(ek.load({"model": model}, path).step)
        demand_step(model, steps[-1] or 0)
    return steps


def test_a_run_is_loaded_on_ranks_without_a_claim(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(trains, 2, root, 2, 0)
    assert run_ranks(loads_a_run, 3, root) == [[2, 2, 1]] * 3
    assert not (tmp_path / "run" / "commits" / "epoch-2.json").exists()


def saves_until_killed(rank: int, world_size: int, root: str) -> None:
    model = model_of(0)
    run = ek.Run(root, {"model": model}, options=OPTIONS)
    run.restore()
    for step in range(1, 10_000):
        set_step(model, step)
        try:
            handle = run.save(step)
            handle.wait_staged()
            dist.barrier()
        except (CheckpointError, RuntimeError):
            time.sleep(BOUND_S)


def restores(rank: int, world_size: int, root: str) -> int:
    model = model_of(0)
    run = ek.Run(root, {"model": model}, options=OPTIONS)
    step = run.restore().step
    demand_step(model, step)
    run.close()
    return step


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_rank_is_killed_the_next_job_finds_a_whole_step(tmp_path: Path, victim: int) -> None:
    root = tmp_path / "run"
    with spawn_ranks(saves_until_killed, 2, str(root)) as ranks:
        end = time.monotonic() + BOUND_S
        while len(list((root / "commits").glob("00*.json"))) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        time.sleep(0.05)
    steps = run_ranks(restores, 2, str(root))
    assert steps[0] == steps[1] >= 3


def is_preempted(rank: int, world_size: int, root: str) -> tuple[int, float]:
    """SIGTERM comes to rank 1 only; all ranks end after the same step, which is committed."""
    model = model_of(0)
    options = ek.RunOptions(due=ek.Every(steps=1000), signals={signal.SIGTERM: 30.0})
    run = ek.Run(root, {"model": model}, options=options)
    run.restore()
    told = 0.0
    for step in range(1, 1000):
        set_step(model, step)
        dist.barrier()
        if rank == 1 and step == 5:
            told = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        if run.due(step):
            run.save(step).result(BOUND_S)
        if run.ending:
            break
    run.close()
    return step, time.monotonic() - told


def test_a_notice_to_one_rank_ends_all_of_them_after_a_last_save(tmp_path: Path) -> None:
    ended = run_ranks(is_preempted, 4, str(tmp_path / "run"))
    (step,) = {one[0] for one in ended}
    assert 5 < step < 12
    assert [entry.step for entry in history(tmp_path / "run")] == [step]


def by_clock(rank: int, world_size: int, root: str) -> list[int]:
    model = model_of(0)
    run = ek.Run(root, {"model": model}, options=ek.RunOptions(due=ek.Every(seconds=0.15), signals={}))
    run.restore()
    saved = []
    for step in range(1, 40):
        time.sleep(0.01 * (rank + 1))
        dist.barrier()
        if run.due(step):
            saved.append(step)
            run.save(step).result(BOUND_S)
    run.close()
    return saved


def test_saves_by_clock_are_due_at_the_same_steps_everywhere(tmp_path: Path) -> None:
    first, second = run_ranks(by_clock, 2, str(tmp_path / "run"))
    assert first == second
    assert len(first) >= 2


def lost(rank: int, world_size: int, root: str) -> str:
    model = model_of(0)
    run = ek.Run(root, {"model": model}, options=OPTIONS)
    run.restore()
    run.save(1).result(BOUND_S)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    handle = run.save(2)  # does not wait for the dead rank
    error = handle.exception(BOUND_S)
    return type(error).__name__


def test_a_dead_rank_keeps_no_other_from_training(tmp_path: Path) -> None:
    """[SAVE-91]"""
    with spawn_ranks(lost, 2, str(tmp_path / "run")) as ranks:
        outcomes = ranks.wait()
    assert outcomes[0].value == RankLost.__name__


def test_what_any_rank_found_damaged_is_remembered_of_all(tmp_path: Path) -> None:
    """The bit that is bad lies in what only rank 1 reads; rank 0 writes it down. [RUN-66]"""
    root = tmp_path / "run"
    run_ranks(trains, 2, str(root), 2, 0)
    (chunk,) = (root / "step-0000000002.1.1").glob("params/model/0.weight/value/c.0.0")
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    assert run_ranks(restores, 2, str(root)) == [1, 1]
    told = complete(read_told(LocalStore(root))).findings
    assert {one.step: (found.outcome, found.kind) for one, found in told.items()} == {
        1: ("verified", ""),
        2: ("damaged", "checksum-mismatch"),
    }
    (bad,) = (found for found in told.values() if found.kind)
    assert bad.message.startswith("rank 1: ")
