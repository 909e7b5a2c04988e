"""Everything in a `state`, bit by bit and with types, as one comparable value."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from elastickpt.format.encode_values import typed_key
from elastickpt.training.held_trees import PerRank, is_stateful
from elastickpt.training.rng import RNG, streams


def fingerprint(state: Mapping[str, object]) -> dict[str, Hashable]:
    """What each entry holds. Equal for two states exactly when all tensors, values, groups and random streams are."""
    return {key: _of(value) for key, value in state.items()}


def _of(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, nn.Module):
        extra = [m.get_extra_state() for m in value.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
        return ("module", *((name, _tensor(one)) for name, one in _tensors(value).items()), _of(extra))
    if isinstance(value, Optimizer):
        return _optimizer(value)
    if isinstance(value, RNG):
        return typed_key(streams())
    if isinstance(value, PerRank):
        return ("per-rank", _of(value.value))
    if is_stateful(value):
        return ("object", _of(value.state_dict()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_of(one) for one in value))
    if isinstance(value, dict):
        return (type(value), tuple((_of(key), _of(one)) for key, one in value.items()))
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return (type(value), value.dtype.str, value.shape, value.tobytes())
    return typed_key(value)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _tensor(tensor: torch.Tensor) -> Hashable:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    placement = str(getattr(tensor, "placements", ""))
    return (type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), placement, flat.numpy().tobytes())


def _optimizer(optimizer: Optimizer) -> Hashable:
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = [
        (len(group["params"]), _of({key: group[key] for key in sorted(group) if key != "params"}))
        for group in optimizer.param_groups
    ]
    keyed: dict[Any, Any] = optimizer.state
    states = []
    for index, parameter in enumerate(order):
        own = keyed.get(parameter, {})
        states.append((index, tuple((key, _of(own[key])) for key in sorted(own))))
    others = [(key, _of(one)) for key, one in keyed.items() if not isinstance(key, torch.Tensor)]
    return ("optimizer", tuple(groups), tuple(states), tuple(others))
