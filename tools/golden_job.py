"""The job whose checkpoint is tests/golden/v1-by-0.1.0: TP2 × FSDP2 on four ranks, or whole in one process.

Every tensor's contents are a function of its name (`dense`), and each rank cuts its part out of the whole by hand, so that
the truth does not come from the library or from torch's own gathering.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Iterator
from math import inf, nan, prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import elastickpt as ek
from elastickpt.saving.request import PlacementChoice

WORLD = 4
STEP = 7
TP_DIM = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
ODD_NAMES = ("a b/c", "Größe", "W", "w", "n" * 230)

State = dict[str, Any]


class Net(nn.Module):
    """Uneven everywhere, in two element types, with buffers, and names that need escapes, of which all but one are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 3, dtype=torch.bfloat16)
        self.up = nn.Linear(3, 7)
        self.down = nn.Linear(7, 3, bias=False)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.odd = nn.ParameterDict({name: nn.Parameter(torch.zeros(3), name == "w") for name in ODD_NAMES})


class Loader:
    """A loader with a position of its own on each rank."""

    def __init__(self, rank: int) -> None:
        self.position = {"rank": rank, "cursor": 100 + rank, "order": torch.arange(rank, rank + 3)}

    def state_dict(self) -> State:
        return self.position

    def load_state_dict(self, state: State) -> None:
        self.position = state

    def reshard(self, states: list[State], rank: int, world_size: int) -> State:
        del rank, world_size
        return {"cursors": [state["cursor"] for state in states]}


def dense(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole contents of an array of this name; a hash, not a random stream, so that no release of numpy changes it."""
    count = prod(shape)
    words = torch.from_numpy(np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * count), "<i2").astype(np.int64))
    if dtype.is_floating_point or dtype.is_complex:
        return (words.reshape(shape) / 4096).to(dtype)
    return (words.reshape(shape) & (1 if dtype == torch.bool else 63)).to(dtype)


def extras() -> State:
    """Tensors beside the model, of other element types and shapes."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "ids": ((2, 3), torch.int64),
        "mask": ((5,), torch.bool),
        "codes": ((4,), torch.float8_e4m3fn),
        "wave": ((3,), torch.complex64),
        "scalar": ((), torch.float64),
        "none": ((0, 3), torch.float16),
        "zarr.json": ((1,), torch.int8),
        "__private": ((2,), torch.uint8),
    }
    return {name: dense(f"extra/{name}", shape, dtype) for name, (shape, dtype) in wanted.items()}


def values() -> State:
    """A value of every kind that typed JSON has a tag for, and the plain ones."""
    return {
        "plain": [None, True, 1, -1.5, "é\u2028😀", {"b": 1, "a": [2]}],
        "tuple": (1, ("x",)),
        "bytes": b"\x00\xff",
        "map": {1: "one", "1": "text", (0, 1): None, "$key": 2},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "counter": Counter({30: 1, 80: 2}),
        "set": {10, 9, frozenset({"a", "b"})},
        "float": [inf, -inf, -0.0, 1e-5, 5e-324],
        "nan": nan,
        "big": -(2**70),
        "complex": complex(1.5, -inf),
    }


def state(rank: int, *, parallel: bool, filled: bool) -> State:
    """The whole state of a rank; not `filled`: the same with other contents, to load into."""
    torch.manual_seed(rank)
    model: nn.Module = Net()
    if parallel:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for name in ("up", "down"):
            fully_shard(getattr(model, name), mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    decayed = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is one for one in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.002, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.001, betas=(0.8, 0.95), foreach=False)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)
    if filled:
        _step(model, optimizer, scheduler)
        _fill(model, optimizer, *(divmod(rank, 2) if parallel else (None, None)))
        random.seed(5)
        np.random.seed(6)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "extra": extras() if filled else {name: torch.zeros_like(one) for name, one in extras().items()},
        "values": values() if filled else {},
        "loader": ek.PerRank(Loader(rank if filled else -1)),
        "rng": ek.RNG(),
    }


def truth() -> Iterator[tuple[str, torch.Tensor]]:
    """(item/name/state or extra/name, whole contents) of every array."""
    model = Net()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"model/{name}/value", _filled(f"{name}/value", tensor)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"model/{name}/{key}", _filled(f"{name}/{key}", tensor)
    for name, tensor in extras().items():
        yield f"extra/{name}", tensor


def _filled(name: str, like: torch.Tensor) -> torch.Tensor:
    return dense(name, tuple(like.shape), like.dtype)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.MultiStepLR) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
        scheduler.step()


def _fill(model: nn.Module, optimizer: torch.optim.Optimizer, dp: int | None, tp: int | None) -> None:
    """This rank's part of every tensor: first cut by tensor parallelism, then by rows."""

    def part(name: str, state: str, like: torch.Tensor) -> torch.Tensor:
        whole = _filled(f"{name}/{state}", like)
        if tp is not None and name in TP_DIM:
            whole = _cut(whole, TP_DIM[name], tp)
        return whole if dp is None else _cut(whole, 0, dp)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _local(parameter).copy_(part(name, "value", parameter))
            for key, state in optimizer.state[parameter].items() if parameter.requires_grad else ():
                if key == "step":
                    state.fill_(STEP)
                else:
                    _local(state).copy_(part(name, key, state))
        for name, buffer in model.named_buffers():
            buffer.copy_(_filled(f"{name}/value", buffer))


def _cut(whole: torch.Tensor, dim: int, place: int) -> torch.Tensor:
    size = -(-whole.shape[dim] // 2)
    return whole.narrow(dim, min(place * size, whole.shape[dim]), min(size, max(whole.shape[dim] - place * size, 0)))


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def save_rank(rank: int, world_size: int, path: str, placement: PlacementChoice = "plain") -> None:
    """What each of the four ranks does."""
    if world_size != WORLD or dist.get_rank() != rank:
        raise ValueError(f"expected {WORLD} ranks, found {world_size}")
    ek.save(state(rank, parallel=True, filled=True), path, step=STEP, placement=placement)
