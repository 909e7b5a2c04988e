"""What the entries of `state` are: models, optimizers, schedulers, objects or values, told apart here only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.limits import MAX_NAME_NBYTES
from elastickpt.format.records import Item, ItemKind
from elastickpt.training.entries import elements, type_name
from elastickpt.training.modules import is_model
from elastickpt.training.perrank import PerRank
from elastickpt.training.rng import RNG
from elastickpt.training.stateful import is_stateful

Kind = Literal["model", "optimizer", "scheduler", "rng", "per-rank", "object", "value"]

_ITEM_KINDS: Mapping[Kind, ItemKind] = {
    "model": "module",
    "optimizer": "optimizer",
    "scheduler": "stateful",
    "rng": "stateful",
    "per-rank": "stateful",
    "object": "stateful",
    "value": "values",
}


def kind_of(value: object) -> Kind:
    """What one entry of `state` is. A value may still turn out to be one that no checkpoint can hold."""
    if is_model(value):
        return "model"
    each = elements(value).values()
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


def kinds_of(state: Mapping[Any, object]) -> dict[str, Kind]:
    """The kind of each entry, in order.

    Raises ValueNotCarried for what is no mapping, a key that is no name, or a model inside `PerRank`.
    """
    _require_mapping(state)
    kinds: dict[str, Kind] = {}
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


def item_of(key: str, value: object, kind: Kind) -> Item:
    """The record of an entry, for people who list a checkpoint."""
    inner = value.value if isinstance(value, PerRank) else value
    return Item(key, _ITEM_KINDS[kind], type(inner).__name__ if kind in ("value", "per-rank") else type_name(inner))
