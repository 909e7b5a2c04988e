"""Models whose every tensor is known whole: what a rank holds is compared with a slice of it, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from elastickpt.format.arrays import Box


def dense(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The whole tensor of this name, float32: no two elements of it are equal while it has at most 1e5."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + 1e5 * (sum(map(ord, name)) % 97)).reshape(tuple(shape))


def cut(name: str, shape: Sequence[int], box: Box) -> torch.Tensor:
    """The part of `dense` that lies in `box`."""
    return dense(name, shape)[tuple(map(slice, box.start, box.stop))]


def filled(module: nn.Module) -> nn.Module:
    """`module`, not wrapped or sharded yet, with every parameter and buffer set to its dense tensor."""
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.copy_(dense(name, tensor.shape))
    return module


def mlp(width: int, hidden: int) -> nn.Module:
    """Linear, LayerNorm, Linear; filled."""
    return filled(nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`mlp` with its first layer cut by rows, its last by columns, its norm whole on every rank."""
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
