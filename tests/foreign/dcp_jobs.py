"""Jobs that save with `torch.distributed.checkpoint` on gloo ranks, and give back what was saved, whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """Sizes that divide unevenly: 101 rows, or 51 of 102 on each of two tensor ranks, which need even shares."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(7, hidden)
        self.down = nn.Linear(hidden, 5)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def laid_out(model: nn.Module, layout: str, world_size: int) -> nn.Module:
    if layout == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",)))
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("rep", "dp")))
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def whole(value: object) -> object:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def loaded(rank: int, world_size: int, folder: str, layout: str) -> dict[str, Any]:
    """What torch's own reader gives a job at a layout: every array of model and optimizer, whole."""
    torch.manual_seed(7)
    model = laid_out(Net(102), layout, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    made = {f"{name}|value": whole(one) for name, one in weights.items()}
    return made | {f"{name}|{state}": whole(one) for name, of_one in states["state"].items() for state, one in of_one.items()}


def save(rank: int, world_size: int, folder: str, layout: str, form: str) -> dict[str, Any]:
    """One step of training, then a save; every array whole, by "name|state"."""
    torch.manual_seed(0)
    model = laid_out(Net(102 if layout == "tp fsdp" else 101), layout, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    torch.manual_seed(1)
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    weights, states = get_state_dict(model, optimizer, options=options)
    value: dict[str, Any] = {
        "plain": {"model": weights, "optimizer": states, "step": 1},
        "flat": {"model": weights, "optimizer": states, "step": 1},
        "root": {**weights, "optimizer": states},
        "app": {"app": {"model": weights, "optim": states}, "step": 1},
    }[form]
    dcp.save(value, checkpoint_id=folder)
    made = {f"{name}|value": whole(one) for name, one in weights.items()}
    nested = get_state_dict(model, optimizer)[1]["state"]
    return made | {f"{name}|{state}": whole(one) for name, of_one in nested.items() for state, one in of_one.items()}
