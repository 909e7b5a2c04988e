"""One rank of a job loads by itself, while the others do something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import elastickpt as ek
from elastickpt.errors import CheckpointError, StateMismatch
from tools.gloo_ranks import run_ranks

WIDTH = 64
Seen = dict[str, object]


def stage(number: int, *, filled: bool) -> dict[str, object]:
    """A pipeline stage under its name in the whole model, with an optimizer that has made a step."""
    torch.manual_seed(number if filled else 100)
    model = nn.Module()
    model.add_module(f"layer{number}", nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 if filled else 0.5)
    if filled:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(number + 1))
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": 7 if filled else 0}


def numbers(state: dict[str, object]) -> list[object]:
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    found: list[object] = [parameter.detach().sum().item() for parameter in model.parameters()]
    for moments in optimizer.state_dict()["state"].values():
        found += [float(moments["step"]), moments["exp_avg"].sum().item(), moments["exp_avg_sq"].sum().item()]
    return [*found, optimizer.param_groups[0]["lr"], state["step"]]


def one_lost_its_stage(rank: int, world_size: int, root: str, lost: int) -> Seen:
    """All save; then one loads what it had, and what another one had, while the others wait in a barrier of their own."""
    mine = stage(rank, filled=True)
    saved = {**mine, "own": ek.PerRank({"rank": rank}), "rng": ek.RNG()}
    ek.save(saved, f"{root}/c", step=7)
    expected = torch.rand(3)
    seen: Seen = {}
    if rank == lost:
        fresh = stage(rank, filled=False)
        own = ek.PerRank({"rank": -1})
        live = {**fresh, "own": own, "rng": ek.RNG()}
        report = ek.elastic.load_alone(live, f"{root}/c")
        seen["streams"] = torch.equal(torch.rand(3), expected)
        seen["own"] = own.value
        seen["equal"] = numbers(live) == numbers(mine)
        seen["step"], seen["read"] = report.step, report.read_nbytes
        other = stage((rank + 1) % world_size, filled=False)
        ek.elastic.load_alone(other, f"{root}/c")
        seen["other"] = numbers(other) == numbers(stage((rank + 1) % world_size, filled=True))
        part = nn.Module()
        part.add_module(f"layer{rank}", nn.Linear(WIDTH, WIDTH))
        ek.elastic.load_alone({"model": part}, f"{root}/c")
        seen["part"] = torch.equal(next(part.parameters()), next(iter(mine["model"].parameters())))  # type: ignore[attr-defined]
        whole = nn.Module()
        for number in range(world_size):
            whole.add_module(f"layer{number}", nn.Linear(WIDTH, WIDTH))
        ek.elastic.load_alone({"model": whole}, f"{root}/c")
        seen["whole"] = [layer.weight.sum().item() for layer in whole.children()]
        lacking = {"model": whole, "nobody has it": torch.ones(2)}
        before = [layer.weight.clone() for layer in whole.children()]
        try:
            ek.elastic.load_alone(lacking, f"{root}/c")
        except StateMismatch as error:
            seen["missing"] = "nobody has it" in error.message
        seen["unchanged"] = all(torch.equal(a, b.weight) for a, b in zip(before, whole.children(), strict=True))
        try:
            ek.elastic.load_alone(lacking, f"{root}/absent")
        except CheckpointError as error:
            seen["absent"] = error.kind
    dist.barrier()
    ek.save(mine, f"{root}/next")  # their calls go on as if nothing had been
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize("lost", [0, 1])
def test_one_rank_loads_while_no_other_one_is_asked(lost: int, tmp_path: Path) -> None:
    seen = run_ranks(one_lost_its_stage, 3, str(tmp_path), lost)[lost]
    stages = [stage(number, filled=True)["model"] for number in range(3)]
    weights = [next(iter(model.parameters())).sum().item() for model in stages]  # type: ignore[attr-defined]
    nbytes = 3 * 4 * (WIDTH * WIDTH + WIDTH)  # value and two moments, of this stage
    assert seen.pop("whole") == weights
    read = seen.pop("read")
    assert isinstance(read, int)
    assert nbytes <= read < 2 * nbytes  # and nothing of the other two
    assert seen == {
        "streams": True,
        "own": {"rank": lost},
        "equal": True,
        "step": 7,
        "other": True,
        "part": True,
        "missing": True,
        "unchanged": True,
        "absent": "not-a-checkpoint",
    }


def one_lost_its_shard(rank: int, world_size: int, root: str) -> bool:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(24, dtype=torch.float32).reshape(8, 3)
    ek.save({"t": distribute_tensor(whole, mesh, [Shard(0)])}, f"{root}/c")
    live = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])
    if rank == 1:
        ek.elastic.load_alone({"t": live}, f"{root}/c")
    dist.barrier()
    assert isinstance(live, DTensor)
    expected = whole[4:] if rank == 1 else torch.zeros(4, 3)
    return torch.equal(live.to_local(), expected)


@pytest.mark.ranks
def test_of_a_sharded_tensor_the_local_part_is_filled(tmp_path: Path) -> None:
    assert run_ranks(one_lost_its_shard, 2, str(tmp_path)) == [True, True]


def test_without_a_job_it_is_a_load(tmp_path: Path) -> None:
    mine, fresh = stage(0, filled=True), stage(0, filled=False)
    ek.save(mine, tmp_path / "c")
    ek.elastic.load_alone(fresh, tmp_path / "c")
    assert numbers(fresh) == numbers(mine)
