"""What is saved: sharded tensors whose every element is a function of (step, name, place), so that any mixture is seen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

State = dict[str, dict[str, torch.Tensor]]

SHAPES = {
    "embed.weight": (101, 64),
    "layers.0.weight": (256, 192),
    "layers.0.bias": (192,),
    "layers.1.weight": (300, 257),  # more than one checksum block of 256 KiB
    "head.weight": (64, 101),
}
ITEMS = ("model", "exp_avg")
STEPS = 100  # a job saves fewer
JOBS = 4  # of which one continues another; what they save at one step differs
_MODULUS, _PER_STEP, _PER_ELEMENT = 1 << 23, 7919, 104_729  # below 2**24 every value is exact in float32


def empty_state(mesh: DeviceMesh, scale: int) -> State:
    """All tensors, each sharded over its rows on the one-dimensional `mesh`, holding what no step holds.

    1.1 MB with a `scale` of 1; with others so many times the rows.
    """
    rank, ranks = mesh.get_local_rank(), mesh.size()
    state: State = {}
    for item in ITEMS:
        state[item] = {}
        for name, (extent, *others) in SHAPES.items():
            shape = (extent * scale, *others)
            rows = -(-shape[0] // ranks)
            local = torch.full((max(0, min(rows, shape[0] - rank * rows)), *shape[1:]), -1.0)
            state[item][name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=_stride(shape)
            )
    return state


def fill(state: State, step: int, job: int = 0) -> None:
    """Give every element its value at `step` of a job."""
    for local, expected in _pieces(state, step + job * STEPS):
        local.copy_(expected)


def clear(state: State) -> None:
    """Give every element what no step holds, so that a load that leaves something out is seen."""
    for local, _ in _pieces(state, 0):
        local.fill_(-1.0)


def held(state: State) -> tuple[int, int] | None:
    """The one step and job whose values all elements of this rank have, bit for bit; None if there is none."""
    first = next(iter(_pieces(state, 0)))[0][:1]
    for number in range(STEPS * JOBS):
        if torch.equal(first, next(_pieces(state, number))[1][:1]):
            whole = all(_same(local, expected) for local, expected in _pieces(state, number))
            return (number % STEPS, number // STEPS) if whole else None
    return None


def mixture(state: State) -> str:
    """In words: which share of this rank's elements has the value of which step and job."""
    found: Counter[int] = Counter()
    for local, expected in _pieces(state, 0):
        ahead = (local.to(torch.int64) - expected.to(torch.int64)) % _MODULUS
        numbers = torch.where((ahead % _PER_STEP == 0) & (ahead < STEPS * JOBS * _PER_STEP), ahead // _PER_STEP, -1)
        for number, count in zip(*numpy.unique(numbers.numpy(), return_counts=True), strict=True):
            found[int(number)] += int(count)
    total = sum(found.values())
    words = [f"{100 * count / total:.3g}% {_whose(number)}" for number, count in found.most_common(4)]
    return "of the elements " + ", ".join(words)


def _whose(number: int) -> str:
    return "no step" if number < 0 else f"step {number % STEPS} of job {number // STEPS}"


def _pieces(state: State, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each local tensor, and what it holds at a step and job of this number."""
    for item in state:
        for name, tensor in state[item].items():
            local, first = tensor, 0
            if isinstance(tensor, DTensor):
                rows = -(-tensor.shape[0] // tensor.device_mesh.size())
                local = tensor.to_local()
                first = tensor.device_mesh.get_local_rank() * rows * math.prod(tensor.shape[1:])
            salt = sum(ord(letter) * (at + 1) for at, letter in enumerate(f"{item}/{name}")) * 31 + number * _PER_STEP
            flat = torch.arange(first, first + local.numel(), dtype=torch.int64)
            yield local, ((flat * _PER_ELEMENT + salt) % _MODULUS).to(torch.float32).reshape(local.shape)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: 0.0 and -0.0 differ."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
