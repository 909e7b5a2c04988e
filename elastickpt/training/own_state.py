"""What modules keep beside parameters, buffers and extra state: what their own state dict has beyond these.

    own entry "0.total", a tensor         -> array extra/<item>/0.total, and a reference to it at /<item>/0.total
    own entry "0.preds", a list of such   -> arrays extra/<item>/0.preds/0, ..., and the list at /<item>/0.preds
    own entry "0.count", a number         -> value /<item>/0.count

In a job of several ranks nobody says that they are alike on all ranks: each rank keeps its own, at the same place among its
per-rank values, and the value true at "<place>@per-rank" says so; only a DTensor says by itself where it lies. [UCF-141]

Of a module that loads by itself the version of its class, which torch hands to that code, stands at /<item>/@version/<module>,
so that contents of an older version are known as such. [UCF-142]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from elastickpt.errors import ValueNotCarried
from elastickpt.training.dtensors import placed
from elastickpt.training.entries import below, covering, own_state_dict, saves_by_itself, titled
from elastickpt.training.known_memory import KnownMemory, spans_of
from elastickpt.training.naming import ModuleKeys

PER_RANK = "@per-rank"
VERSION = "@version"


@dataclass(frozen=True, slots=True, eq=False)
class OwnEntry:
    """One entry of a module's own state dict that no parameter, buffer or extra state shows. `owner` names the module."""

    key: str
    value: object
    owner: str


@dataclass(frozen=True, slots=True, eq=False)
class OwnSaid:
    """What a module's own state dict says, by canonical key; `owners` says of each key which module's code wrote it."""

    name: str
    module: nn.Module
    entries: Mapping[str, Any]
    owners: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Registered:
    """What is registered in a model, by canonical names: its tensors, and of those that are gathered now also the copy."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    gathered: dict[str, torch.Tensor] = field(default_factory=dict)
    extra_states: set[str] = field(default_factory=set)

    def named(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(tensors[name] for tensors in (self.tensors, self.gathered) if name in tensors)


def ask(name: str, module: nn.Module, *, root: bool) -> OwnSaid:
    """Calls the module's own `state_dict`, its hooks included. Raises as `own_state_dict` does."""
    entries: dict[str, Any] = {}
    owners: dict[str, str] = {}
    keys, prefix = ModuleKeys(module, under=name), below(name)
    for key, value in own_state_dict(module, name=name, root=root).items():
        path = keys.follow(key.removeprefix(prefix))
        entries[path.name] = value
        writer = next(((n, m) for n, m in reversed(path.modules) if saves_by_itself(m)), (name, module))
        owners[path.name] = titled(*writer)
    return OwnSaid(name, module, entries, owners)


def beyond(said: OwnSaid, registered: Registered) -> tuple[OwnEntry, ...]:
    """The entries that show nothing registered. What shows it under any name, a part of it or a copy of the same contents
    under its own name is nothing new.

    Raises ValueNotCarried, naming class and entry, for other contents under the name of a parameter or buffer, and for one of
    these that the state dict leaves out.
    """
    known = KnownMemory((*registered.tensors.values(), *registered.gathered.values()))
    found = []
    for key, value in said.entries.items():
        if key in registered.tensors:
            _require_same(said, key, value, registered.named(key))
        elif key not in registered.extra_states and not (isinstance(value, torch.Tensor) and known.covers(value)):
            found.append(OwnEntry(key, value, said.owners[key]))
    _require_all(said, registered)
    return tuple(found)


def _require_same(said: OwnSaid, key: str, value: object, tensors: Iterable[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor) and any(_shows(value, tensor) for tensor in tensors):
        return
    raise ValueNotCarried(
        f"{said.owners[key]} puts other contents than those of its tensor {key!r} into its state dict under that name; only "
        f"one of a name can be saved: give the other a name of its own"
    )


def _shows(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether an entry is a tensor's memory, or a copy of the same bits."""
    if value is tensor:
        return True
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        return False
    return spans_of(value) == spans_of(tensor) or _same_bits(value, tensor)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    mine, theirs = placed(one), placed(other)
    if (mine is None) != (theirs is None):
        return False
    first, second = (each if parts is None else parts.local for each, parts in ((one, mine), (other, theirs)))
    if type(first) not in _PLAIN or type(second) not in _PLAIN or first.layout is not torch.strided:
        return False
    bits = [each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (first, second)]
    return torch.equal(*bits)


_PLAIN = (torch.Tensor, nn.Parameter)


def _require_all(said: OwnSaid, registered: Registered) -> None:
    shown = KnownMemory(value for value in said.entries.values() if isinstance(value, torch.Tensor))
    prefix = below(said.name)
    for name, tensors in registered.tensors.items():
        if not name.startswith(prefix) or name in said.entries:
            continue
        if any(tensor.numel() for tensor in tensors) and not any(shown.touches(tensor) for tensor in tensors):
            raise ValueNotCarried(
                f"{titled(said.name, said.module)} leaves {name!r} out of its state dict, which is a parameter or a persistent "
                f"buffer: what no checkpoint shall hold must be a non-persistent buffer, or not stand in `state`"
            )


def require_taken_back(entries: Iterable[OwnEntry], loaders: Iterable[str]) -> None:
    """Raises ValueNotCarried for an entry that no code of the model would take on loading: it could not be given back."""
    names = tuple(loaders)
    for entry in entries:
        if not covering(names, entry.key):
            raise ValueNotCarried(
                f"{entry.owner} writes {entry.key!r} into its state dict, and nothing takes it back on loading: register it as "
                f"a buffer, return it from get_extra_state, or take it in _load_from_state_dict or a load_state_dict pre-hook"
            )
