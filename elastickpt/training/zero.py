"""DeepSpeed's ZeRO optimizers: refused in one message, as what they hold says nowhere to which elements of which parameter it
belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported, ValueNotCarried
from elastickpt.training.values import carried_leaf, mapped, place_of


def refuse_zero(key: str, value: Any) -> None:
    """Raises LayoutUnsupported, naming all of its state that is no plain data, for one of DeepSpeed's ZeRO optimizers, also
    inside a wrapper of it."""
    found = next(filter(_is_zero, _inside(value)), None)
    if found is None:
        return
    odd = list(_odd(found.state_dict(), place_of(key)))
    beside = f" and, beside them, {', '.join(odd)}" if odd else ""
    raise LayoutUnsupported(
        f"entry {key!r}: {type(found).__name__} is a ZeRO optimizer of DeepSpeed, which holds flat partitions of each rank"
        f"{beside}: nothing says to which elements of which parameter they belong, so no other layout could load them; put "
        f"ek.PerRank around an object into `state` whose state_dict has its tensors and plain values, which the same layout "
        f"loads, or shard the model with torch.distributed.fsdp.fully_shard"
    )


def _inside(value: Any) -> Iterator[Any]:
    yield value
    while isinstance(value, Optimizer) and (value := getattr(value, "optimizer", None)) is not None:
        yield value


def _is_zero(value: object) -> bool:
    modules = (cls.__module__ for cls in type(value).__mro__)
    return any(module.startswith("deepspeed.") and "zero" in module.split(".") for module in modules)


def _odd(state: object, place: str) -> Iterator[str]:
    """What of a state dict is no plain data: place and class."""
    found: list[str] = []

    def leaf(one: object, where: str) -> object:
        if not isinstance(one, torch.Tensor):
            try:
                carried_leaf(one, where)
            except ValueNotCarried:
                found.append(f"{where} (a {type(one).__name__})")
        return None

    mapped(state, place, leaf)
    yield from found
