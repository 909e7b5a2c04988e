"""A small model, trained on gloo ranks by stages, tensor parallelism and FSDP, saved and loaded as other libraries do it."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import elastickpt as ek

LAYERS, WIDTH, HIDDEN, VOCAB = 4, 8, 12, 11
STEPS = 3

PROGRAM = """\
ucl 1
needs layers
mesh m = pp, tp
order optimizer = all
in model
    embed.weight              v  h             same tp  first pp
    layers.{i: layers/pp}.
        norm.weight           h                same tp
        norm.bias             h                same tp
        up.weight             f/tp  h
        up.bias               f/tp
        down.weight           h  f/tp
        down.bias             h                same tp
    head.weight               v  h             same tp  last pp
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """All of it, or the layers of one stage, which count from 0 in each."""

    def __init__(self, layers: int = LAYERS, *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        if first:
            self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        if last:
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if hasattr(self, "embed") else x
        for layer in self.layers:
            x = layer(x)
        return self.head(x) if hasattr(self, "head") else x


def whole(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (4, 7), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), wanted.reshape(-1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens, wanted = batch(step)
        optimizer.zero_grad()
        loss = loss_of(model(tokens), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_stages(stage: Net, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list[float]:
    """Two stages, one after the other; the last one knows the loss."""
    losses = []
    for step in steps:
        tokens, wanted = batch(step)
        optimizer.zero_grad()
        if rank == 0:
            hidden = stage(tokens)
            dist.send(hidden.detach().contiguous(), 1)
            gradient = torch.empty_like(hidden)
            dist.recv(gradient, 1)
            hidden.backward(gradient)
        else:
            hidden = torch.empty(*tokens.shape, WIDTH)
            dist.recv(hidden, 0)
            hidden.requires_grad_()
            loss = loss_of(stage(hidden), wanted)
            loss.backward()
            dist.send(hidden.grad.contiguous(), 0)
            losses.append(float(loss.detach()))
        optimizer.step()
    return losses


def stage_of(rank: int, seed: int = 0) -> Net:
    """Stage `rank` of two, with the weights that the whole has."""
    full = whole(seed)
    stage = Net(LAYERS // 2, first=rank == 0, last=rank == 1)
    half = LAYERS // 2
    own = {}
    for name, one in full.state_dict().items():
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            if number // half == rank:
                own[name.replace(f"layers.{number}.", f"layers.{number % half}.", 1)] = one
        elif name in stage.state_dict():
            own[name] = one
    stage.load_state_dict(own)
    return stage


def tensor_parallel(model: Net, mesh: Any) -> Net:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: local(one) for key, one in value.items()}
    if isinstance(value, list):
        return [local(one) for one in value]
    return value.to_local() if isinstance(value, DTensor) else value


def save_rank(
    folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, pp: tuple[int, int], tp: tuple[int, int]
) -> None:
    """One rank's file in Megatron's legacy form."""
    name = f"mp_rank_{tp[0]:02d}" + (f"_{pp[0]:03d}" if pp[1] > 1 else "")
    place = Path(folder) / "iter_0000003" / name
    place.mkdir(parents=True)
    args = argparse.Namespace(tensor_model_parallel_size=tp[1], pipeline_model_parallel_size=pp[1], layers=LAYERS)
    contents = {"args": args, "checkpoint_version": 3.0, "iteration": STEPS}
    contents |= {"model": local(model.state_dict()), "optimizer": local(optimizer.state_dict())}
    torch.save(contents, place / "model_optim_rng.pt")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("3")


def source(rank: int, world_size: int, folder: str, layout: str) -> list[float]:
    """Trains, saves, and trains on; the losses after the save."""
    torch.set_num_threads(1)
    if layout == "pp2":
        stage = stage_of(rank)
        optimizer = adam(stage)
        train_stages(stage, optimizer, rank, range(STEPS))
        save_rank(folder, stage, optimizer, (rank, 2), (0, 1))
        return train_stages(stage, optimizer, rank, range(STEPS, 2 * STEPS))
    if layout == "tp2":
        model = tensor_parallel(whole(), init_device_mesh("cpu", (2,)))
        optimizer = adam(model)
        train(model, optimizer, range(STEPS))
        save_rank(folder, model, optimizer, (0, 1), (rank, 2))
        return train(model, optimizer, range(STEPS, 2 * STEPS))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(whole(), mesh["tp"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = adam(model)
    train(model, optimizer, range(STEPS))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states, "step": STEPS}, checkpoint_id=folder)
    return train(model, optimizer, range(STEPS, 2 * STEPS))


def go_on_by_stages(rank: int, world_size: int, folder: str) -> list[float]:
    """Two stages that load their ranks' files as torch does, and train on."""
    torch.set_num_threads(1)
    stage = stage_of(rank, seed=7)
    optimizer = adam(stage)
    with torch.serialization.safe_globals([argparse.Namespace]):
        path = Path(folder) / "iter_0000003" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
        found = torch.load(path, weights_only=True)
    stage.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return train_stages(stage, optimizer, rank, range(STEPS, 2 * STEPS))


WIDTHS = (16, 24, 20, 16, 12)


def mixed(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Matrices for Muon, vectors for Adam; sizes that two ranks do not cut at the bounds of layers."""
    torch.manual_seed(seed)
    layers = [nn.Linear(one, other) for one, other in pairwise(WIDTHS)]
    model = nn.Sequential(*layers)
    return model, *mixed_optimizers(model)


def mixed_optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    named = list(model.named_parameters())
    muon = torch.optim.Muon([(name, one) for name, one in named if one.ndim == 2], lr=1e-2)
    return muon, torch.optim.Adam([(name, one) for name, one in named if one.ndim < 2], lr=1e-2)


def mixed_losses(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], steps: range) -> list[float]:
    losses = []
    for step in steps:
        given = torch.randn(4, WIDTHS[0], generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        loss = model(given).square().mean()
        loss.backward()
        for one in optimizers:
            one.step()
        losses.append(float(loss.detach()))
    return losses


def mixed_shards(world_size: int, seed: int) -> tuple[nn.Module, tuple[torch.optim.Optimizer, ...]]:
    torch.set_num_threads(1)
    model, _, _ = mixed(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",)))
    return model, mixed_optimizers(model)


def mixed_source(rank: int, world_size: int, folder: str) -> list[float]:
    """Muon and Adam over FSDP2 on two ranks: three steps, a save by DCP, two more."""
    model, optimizers = mixed_shards(world_size, 0)
    mixed_losses(model, optimizers, range(3))
    weights, states = get_state_dict(model, optimizers)
    dcp.save({"model": weights, "optimizer": states, "step": 3}, checkpoint_id=folder)
    return mixed_losses(model, optimizers, range(3, 5))


def mixed_again(rank: int, world_size: int, folder: str) -> list[float]:
    """The two steps, from the converted checkpoint."""
    model, (muon, adam) = mixed_shards(world_size, 4)
    ek.load({"model": model, "optimizer": [muon, adam]}, folder, strict="missing")
    return mixed_losses(model, (muon, adam), range(3, 5))
