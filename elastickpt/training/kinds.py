"""What the entries of `state` are: models, optimizers, schedulers, objects or values, told apart here only.

DeepSpeed's ZeRO optimizers are refused in one message, as what they hold says nowhere to which elements of which parameter it
belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import LayoutUnsupported, StructureConflict, ValueNotCarried
from elastickpt.format.records import Item, ItemKind
from elastickpt.format.version import MAX_NAME_NBYTES
from elastickpt.training.entries import elements, type_name
from elastickpt.training.held_trees import PerRank, is_stateful
from elastickpt.training.modules import is_model
from elastickpt.training.rng import RNG
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


StateKind = Literal["model", "optimizer", "scheduler", "rng", "per-rank", "object", "value"]

_ITEM_KINDS: Mapping[StateKind, ItemKind] = {
    "model": "module",
    "optimizer": "optimizer",
    "scheduler": "stateful",
    "rng": "stateful",
    "per-rank": "stateful",
    "object": "stateful",
    "value": "values",
}


def kind_of(value: object) -> StateKind:
    """What one entry of `state` is. A value may still turn out to be one that no checkpoint can hold."""
    if is_model(value):
        return "model"
    each = value.values() if type(value) is dict else elements(value).values()
    if each and all(isinstance(one, Optimizer) for one in each):
        return "optimizer"
    if each and all(isinstance(one, LRScheduler) for one in each):
        return "scheduler"
    if isinstance(value, RNG):
        return "rng"
    if isinstance(value, PerRank):
        return "per-rank"
    return "object" if each and all(map(_is_object, each)) else "value"


def _is_object(value: object) -> bool:
    return is_stateful(value) and not isinstance(value, (nn.Module, Optimizer, LRScheduler, PerRank, RNG))


def kinds_of(state: Mapping[Any, object]) -> dict[str, StateKind]:
    """The kind of each entry, in order.

    Raises ValueNotCarried for what is no mapping, a key that is no name, or a model inside `PerRank`.
    """
    _require_mapping(state)
    kinds: dict[str, StateKind] = {}
    seen: dict[int, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not key or len(key.encode(errors="surrogatepass")) > MAX_NAME_NBYTES:
            raise ValueNotCarried(f"key {key!r} of `state`: expected a str of 1 to {MAX_NAME_NBYTES} bytes")
        kinds[key] = kind_of(value)
        optimizers = elements(value).values() if kinds[key] == "optimizer" else ()
        if any((first := seen.setdefault(id(one), key)) != key for one in optimizers):
            raise StructureConflict(f"`state` has one optimizer under two keys, {first!r} and {key!r}")
        if isinstance(value, PerRank) and isinstance(value.value, (nn.Module, Optimizer, LRScheduler, RNG, PerRank)):
            raise ValueNotCarried(
                f"value {key!r}: PerRank around a {type(value.value).__name__}, expected an object with its own state "
                f"or a plain value; put it into `state` as it is"
            )
    return kinds


def _require_mapping(state: object) -> None:
    if not isinstance(state, Mapping):
        raise ValueNotCarried(f"`state`: expected a mapping of names to what stands under them, found a {type(state).__name__}")


def item_of(key: str, value: object, kind: StateKind) -> Item:
    """The record of an entry, for people who list a checkpoint."""
    inner = value.value if isinstance(value, PerRank) else value
    return Item(key, _ITEM_KINDS[kind], type(inner).__name__ if kind in ("value", "per-rank") else type_name(inner))
