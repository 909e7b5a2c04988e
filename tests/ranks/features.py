"""What else a training job holds, at the layouts of `layouts`: other optimizers, groups by stage, extra state, stage lists.

Everything is the dense truth of `layouts`, so a rank compares what it loaded with slices that it makes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from layouts import CASES, Block, Model, _fsdp, _tp, build, dense, hand_sharded, local, named
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

State = dict[str, Any]
Parameters = list[tuple[str, nn.Parameter]]

STEPS = 7.0
MILESTONES = [2, 3, 3, 9]


class Scaled(Block):
    """A block with extra state, as layers with scaling factors have."""

    scales: object = None

    def get_extra_state(self) -> object:
        return self.scales

    def set_extra_state(self, state: object) -> None:
        self.scales = state


def _muon(parameters: Parameters) -> dict[str, Optimizer]:
    matrices = [p for _, p in parameters if p.ndim == 2]
    rest = [p for _, p in parameters if p.ndim != 2]
    return {"muon": torch.optim.Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(rest, lr=0.01)}


def _one(make: Callable[..., Optimizer], **options: Any) -> Callable[[Parameters], dict[str, Optimizer]]:
    return lambda parameters: {"optimizer": make([p for _, p in parameters], **options)}


OPTIMIZERS: dict[str, Callable[[Parameters], dict[str, Optimizer]]] = {
    "adam-amsgrad": _one(torch.optim.Adam, lr=0.01, amsgrad=True),
    "sgd-momentum": _one(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adagrad": _one(torch.optim.Adagrad, lr=0.01),
    "muon-adamw": _muon,
}
STATES: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adagrad: ("sum", "step"),
    torch.optim.Muon: ("momentum_buffer",),
}


def trained(model: nn.Module) -> Parameters:
    return [(name, p) for name, p in named(model).items() if isinstance(p, nn.Parameter) and p.requires_grad]


def expected(name: str, state: str, live: torch.Tensor) -> torch.Tensor:
    """This rank's part of a state of parameter `name`."""
    if state == "step":
        return torch.tensor(STEPS)
    return hand_sharded(dense(name, state, tuple(live.shape), live.dtype), live)


def fill_values(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in named(model).items():
            local(tensor).copy_(expected(name, "value", tensor))


def fill_states(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            held = optimizer.state[p]
            for state in STATES[type(optimizer)]:
                held[state] = torch.tensor(STEPS) if state == "step" else torch.zeros_like(p)
                local(held[state]).copy_(expected(names[p], state, held[state] if state == "step" else p))


def wrong_values(model: nn.Module) -> list[str]:
    found = [name for name, tensor in named(model).items() if not same(local(tensor), expected(name, "value", tensor))]
    return [f"{name}/value" for name in found]


def wrong_states(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> list[str]:
    wrong = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            held = optimizer.state[p]
            if set(held) != set(STATES[type(optimizer)]):
                wrong.append(f"{names[p]}: {sorted(held)}")
            wrong += [f"{names[p]}/{s}" for s in held if not same(local(held[s]), expected(names[p], s, p))]
    return wrong


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return (found.shape, found.dtype) == (wanted.shape, wanted.dtype) and torch.equal(found, wanted)


def by_parameter(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in trained(model)}


# -- other optimizers, at any layout -----------------------------------------------------------------------------------


def _optimized(kind: str, layout: str, rank: int) -> tuple[nn.Module, dict[str, Optimizer], State]:
    model = build(layout, rank)
    optimizers = OPTIMIZERS[kind](trained(model))
    schedulers = {f"{name} rate": MultiStepLR(o, MILESTONES) for name, o in optimizers.items()}
    return model, optimizers, {"model": model, **optimizers, **schedulers}


def save_optimizers(rank: int, world_size: int, layout: str, folder: str) -> None:
    """Saves one checkpoint below `folder` for each kind, after four epochs: the rates are 1 / 1000 of what they were."""
    import elastickpt as ek

    for kind in OPTIMIZERS:
        model, optimizers, state = _optimized(kind, layout, rank)
        fill_values(model)
        for name, optimizer in optimizers.items():
            fill_states(optimizer, by_parameter(model))
            for _ in range(4):
                optimizer._opt_called = True  # as after a step, whose arithmetic is not wanted here
                state[f"{name} rate"].step()
        ek.save(state, f"{folder}/{kind}")


def load_optimizers(rank: int, world_size: int, layout: str, folder: str) -> list[str]:
    """What is wrong on this rank after loading each kind into fresh optimizers; nothing should be."""
    import elastickpt as ek

    wrong = []
    for kind in OPTIMIZERS:
        model, optimizers, state = _optimized(kind, layout, rank)
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        ek.load(state, f"{folder}/{kind}")
        found = wrong_values(model)
        for name, optimizer in optimizers.items():
            found += wrong_states(optimizer, by_parameter(model))
            scheduler, rate = state[f"{name} rate"], rates[name] * 0.1**3  # cut once at 2, and twice at 3
            said = (scheduler.last_epoch, dict(scheduler.milestones), scheduler.base_lrs)
            if said != (4, {2: 1, 3: 2, 9: 1}, [rates[name]]) or abs(optimizer.param_groups[0]["lr"] / rate - 1) > 1e-12:
                found.append(f"{name}: {said} {optimizer.param_groups[0]['lr']}")
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.ones_like(p)
            optimizer.step()
        wrong += [f"{kind}: {one}" for one in found]
    return wrong


# -- groups that differ between ranks, extra state in submodules, several stages per rank ------------------------------

BLOCKS = 4
RATES = {"embed": 0.1, "head": 0.2, "bias": 0.3, "matrix": 0.4}
ALL = [0, 1, 2, 3]
PLACES = {  # the blocks of each rank
    "single": [ALL],
    "pp2": [[0, 1], [2, 3]],
    "interleaved2": [[0, 2], [1, 3]],  # two stages on each
    "pp4": [[0], [1], [2], [3]],
    "fsdp3": [ALL, ALL, ALL],
    "tp2": [ALL, ALL],
}


def group_of(name: str) -> str:
    part = name.partition(".")[0]
    return part if part in ("embed", "head") else "bias" if name.endswith("bias") else "matrix"


def _parts(layout: str, rank: int) -> list[Model]:
    """The models of this rank: one with all of its blocks, or one for each stage."""
    numbers = PLACES[layout][rank]
    stages = [tuple(numbers)] if layout != "interleaved2" else [(number,) for number in numbers]
    models = []
    for blocks in stages:
        torch.manual_seed(1000 + rank)
        model = Model(blocks, first=0 in blocks, last=BLOCKS - 1 in blocks)
        for number in blocks:
            model.blocks[str(number)] = Scaled()
        if layout == "fsdp3":
            _fsdp(model, init_device_mesh("cpu", (3,)))
        elif layout == "tp2":
            _tp(model, init_device_mesh("cpu", (2,)))
        models.append(model)
    return models


def _staged(layout: str, rank: int) -> tuple[list[Model], Optimizer, State]:
    """Each rank has the groups that its parameters need, in an order of its own."""
    models = _parts(layout, rank)
    parameters = [pair for model in models for pair in trained(model)]
    kinds = sorted({group_of(name) for name, _ in parameters}, reverse=bool(rank % 2))
    groups = [{"params": [p for n, p in parameters if group_of(n) == kind], "lr": RATES[kind]} for kind in kinds]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5 if rank % 2 else 0.25)
    state: State = {"model": models[0], "optimizer": optimizer, "rate": MultiStepLR(optimizer, MILESTONES)}
    if layout == "interleaved2":
        count = sum(map(len, PLACES[layout]))
        device, ones = torch.device("cpu"), torch.ones(1, 2)
        pairs = zip(models, PLACES[layout][rank], strict=True)
        state["model"] = [PipelineStage(m, n, count, device, input_args=ones, output_args=ones) for m, n in pairs]
    return models, optimizer, state


def _scales(number: str) -> State:
    return {"scale": torch.arange(3.0) + int(number), "history": (int(number), "amax")}


def save_stages(rank: int, world_size: int, layout: str, path: str) -> None:
    import elastickpt as ek

    models, optimizer, state = _staged(layout, rank)
    for model in models:
        fill_values(model)
        for number, block in model.blocks.items():
            block.scales = _scales(number)
    fill_states(optimizer, {p: name for model in models for p, name in by_parameter(model).items()})
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(2):
        optimizer._opt_called = True
        state["rate"].step()
    ek.save(state, path)


def load_stages(rank: int, world_size: int, layout: str, path: str) -> list[str]:
    """What is wrong on this rank after the load; nothing should be."""
    import elastickpt as ek

    models, optimizer, state = _staged(layout, rank)
    names = {p: name for model in models for p, name in by_parameter(model).items()}
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    ek.load(state, path)
    wrong = [one for model in models for one in wrong_values(model)] + wrong_states(optimizer, names)
    for group in optimizer.param_groups:
        kinds = {group_of(names[p]) for p in group["params"]}
        (kind,) = kinds
        found = (group["lr"], group["initial_lr"], group["weight_decay"])
        if found != (RATES[kind] * 0.1, RATES[kind], 0.0):
            wrong.append(f"group {kind}: {found}")
    rates = [RATES[group_of(names[group["params"][0]])] for group in optimizer.param_groups]
    scheduler = state["rate"]
    if (scheduler.last_epoch, scheduler.base_lrs) != (2, rates):
        wrong.append(f"scheduler: {scheduler.last_epoch} {scheduler.base_lrs}")
    for model in models:
        for number, block in model.blocks.items():
            wanted, scales = _scales(number), block.scales
            if not isinstance(scales, dict) or not torch.equal(scales["scale"], wanted["scale"]):
                wrong.append(f"scale of {number}: {scales}")
            elif scales["history"] != wanted["history"]:
                wrong.append(f"history of {number}: {scales}")
    return wrong


WORLDS = {name: case.world for name, case in CASES.items()} | {name: len(ranks) for name, ranks in PLACES.items()}
