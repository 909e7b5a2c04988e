"""One small model at twelve layouts, and dense tensors sharded by hand to compare with. Imported by rank processes.

The dense truth is a function of names alone (`dense`), so every rank can make any part of any state without asking another:
values by slicing, never by `full_tensor()`, which is wrong for uneven strided shards.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH, HIDDEN, VOCAB = 10, 14, 13  # nothing divides evenly by 4, 3 or 2 everywhere
BLOCKS = 2
STEP = 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # buffers: two persistent floats and a 0-d int64
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks keep their global numbers, whatever stage they are on."""

    def __init__(self, blocks: tuple[int, ...], *, first: bool, last: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH) if first else None
        self.blocks = nn.ModuleDict({str(number): Block() for number in blocks})
        self.head = nn.Linear(WIDTH, VOCAB) if last else None
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False) if first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


@dataclass(frozen=True)
class LayoutCase:
    """`world` ranks; `build` gives a rank its model at this layout."""

    name: str
    world: int
    stages: int = 1


CASES = {
    case.name: case
    for case in (
        LayoutCase("single", 1),
        LayoutCase("ddp2", 2),
        LayoutCase("fsdp2", 2),
        LayoutCase("fsdp3", 3),
        LayoutCase("fsdp4", 4),
        LayoutCase("hsdp2x2", 4),
        LayoutCase("tp2", 2),
        LayoutCase("tp4", 4),
        LayoutCase("tp2fsdp2", 4),
        LayoutCase("pp2", 2, 2),
        LayoutCase("pp2fsdp2", 4, 2),
        LayoutCase("pp2tp2", 4, 2),
    )
}

TP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _stage(case: LayoutCase, rank: int) -> tuple[Model, int]:
    if case.stages == 1:
        return Model(tuple(range(BLOCKS)), first=True, last=True), 0
    stage = rank // (case.world // case.stages)
    return Model((stage,), first=stage == 0, last=stage == case.stages - 1), stage


def build(name: str, rank: int) -> nn.Module:
    """The model of this layout on this rank, with values that no checkpoint has."""
    case = CASES[name]
    torch.manual_seed(1000 + rank)
    model, _ = _stage(case, rank)
    if name == "ddp2":
        return DistributedDataParallel(model)
    if name.startswith("fsdp"):
        return _fsdp(model, init_device_mesh("cpu", (case.world,), mesh_dim_names=("dp",)))
    if name == "hsdp2x2":
        return _fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    if name in ("tp2", "tp4"):
        return _tp(model, init_device_mesh("cpu", (case.world,), mesh_dim_names=("tp",)))
    if name == "tp2fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return _fsdp(_tp(model, mesh["tp"]), mesh["dp"])
    if name == "pp2fsdp2":
        return _fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"])
    if name == "pp2tp2":
        return _tp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))["tp"])
    return model


def _fsdp(model: Model, mesh: DeviceMesh) -> Model:
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tp(model: Model, mesh: DeviceMesh) -> Model:
    for block in model.blocks.values():
        parallelize_module(block, mesh, TP_PLAN)
    plan: dict[str, Any] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel()
    if model.head is not None:
        plan["head"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    return model


# -- the dense truth ---------------------------------------------------------------------------------------------------


def dense(name: str, state: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor that `state` of parameter or buffer `name` has in every test: random, from the names alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{state}".encode()))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 1000, shape, generator=generator).to(dtype)


def hand_sharded(whole: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, by what torch physically does: plain shards first, then strided ones, each by chunk."""
    if not isinstance(live, DTensor):
        return whole
    part = whole
    coordinate = live.device_mesh.get_coordinate()
    assert coordinate is not None
    strided = [type(p).__name__ == "_StridedShard" for p in live.placements]
    for wave in (False, True):
        for axis, placement in enumerate(live.placements):
            if (placement.is_shard() and strided[axis] is wave) or (wave and strided[axis]):
                size = live.device_mesh.size(axis)
                step = -(-part.shape[placement.dim] // size)
                start = min(step * coordinate[axis], part.shape[placement.dim])
                stop = min(start + step, part.shape[placement.dim])
                part = part.narrow(placement.dim, start, stop - start)
    return part


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def named(model: nn.Module) -> Mapping[str, torch.Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found: dict[str, torch.Tensor] = dict(inner.named_parameters())
    persistent = inner.state_dict().keys()
    found.update((name, buffer) for name, buffer in inner.named_buffers() if name in persistent)
    return found


def adam(model: nn.Module, *, amsgrad: bool = False) -> torch.optim.Optimizer:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if n.endswith("weight")]
    plain = [p for n, p in trained if not n.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-4}]
    return torch.optim.AdamW(groups, lr=1e-3, amsgrad=amsgrad)


def fill(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives the model and its optimizer the dense truth, each rank its hand-made part."""
    for name, tensor in named(model).items():
        local(tensor).copy_(hand_sharded(dense(name, "value", tuple(tensor.shape), tensor.dtype), tensor))
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            states = optimizer.state[tensor]
            states["step"] = torch.tensor(float(STEP))
            for state in ("exp_avg", "exp_avg_sq"):
                states[state] = torch.zeros_like(tensor)
                local(states[state]).copy_(hand_sharded(dense(name, state, tuple(tensor.shape), tensor.dtype), tensor))


def differences(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What of model and optimizer is not bitwise the dense truth on this rank."""
    wrong = []
    for name, tensor in named(model).items():
        expected = {"value": hand_sharded(dense(name, "value", tuple(tensor.shape), tensor.dtype), tensor)}
        found = {"value": local(tensor)}
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            held = optimizer.state[tensor]
            for state in ("exp_avg", "exp_avg_sq"):
                expected[state] = hand_sharded(dense(name, state, tuple(tensor.shape), tensor.dtype), tensor)
                found[state] = local(held[state])
            if held["step"].item() != STEP or held["step"].dtype is not torch.float32:
                wrong.append(f"{name}: step {held['step']}")
        for state, whole in expected.items():
            if found[state].shape != whole.shape or not torch.equal(found[state], whole):
                wrong.append(f"{name}/{state}")
    for group, decay, rate in zip(optimizer.param_groups, (0.1, 0.0), (1e-3, 3e-4), strict=True):
        if (group["weight_decay"], group["lr"], group["betas"]) != (decay, rate, (0.9, 0.999)):
            wrong.append(f"group {decay}: {group['lr']} {group['weight_decay']} {group['betas']}")
    return wrong


# -- what ranks run ----------------------------------------------------------------------------------------------------


def save_at(rank: int, world_size: int, name: str, path: str, packed: str = "") -> None:
    """Saves the dense truth at this layout; to `packed` in that placement."""
    import elastickpt as ek

    model = build(name, rank)
    optimizer = adam(model)
    fill(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "counters": {"tokens": 12345, "name": "déjà"}}
    ek.save(state, path, step=STEP, placement="plain")
    if packed:
        ek.save(state, packed, step=STEP, placement="packed")


def load_at(
    rank: int, world_size: int, name: str, paths: list[str], through: Mapping[str, tuple[str, Any]]
) -> dict[str, list[str]]:
    """path → what is wrong on this rank after loading it into this layout; nothing should be. `through`: path → a path and a
    placement, in which it is saved again, and then loaded in its place."""
    import elastickpt as ek

    model = build(name, rank)
    found = {}
    for path in paths:
        optimizer = adam(model)
        for group in optimizer.param_groups:
            group.update(lr=1.0, weight_decay=9.0)
        with torch.no_grad():
            for tensor in named(model).values():
                local(tensor).zero_()
        state = {"model": model, "optimizer": optimizer, "counters": {"tokens": 0, "name": ""}}
        report = ek.load(state, path)
        if path in through:
            again, placement = through[path]
            ek.save(state, again, step=STEP, placement=placement)
            with torch.no_grad():
                for tensor in named(model).values():
                    local(tensor).zero_()
            report = ek.load(state, again)
        wrong = differences(model, optimizer)
        if state["counters"] != {"tokens": 12345, "name": "déjà"} or report.step != STEP:
            wrong.append(f"{state['counters']} {report.step}")
        found[path] = wrong
        dist.barrier() if world_size > 1 else None
    return found
