"""Models as held arrays: a module, a pipeline stage, or a list of them, under one key of `state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from elastickpt.errors import StructureConflict
from elastickpt.format.arrays import ArrayId
from elastickpt.format.records import Item
from elastickpt.training.dtensors import Job, hold, holders_of
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities, KnownTensor
from elastickpt.training.naming import NamedModule, NamedTensor, unwrapped, walk
from elastickpt.training.parallel import (
    buffers_kept,
    data_parallel_ranks,
    gathered_parameters,
    is_stage,
    module_of,
    reshard,
    sharded_parameters,
    sharding_ranks,
)
from elastickpt.training.versions import mark_changed


@dataclass(frozen=True, slots=True, eq=False)
class ExtraState:
    """A module with `get_extra_state`, and the JSON pointer "/<item>/<module FQN>" of its value."""

    pointer: str
    module: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class HeldModule:
    """What one item of `state` contributes: arrays that share memory with the model, and modules with extra state.

    `names` are all canonical names of the item, tied ones included, to the tensor that stands there.
    """

    item: Item
    modules: tuple[nn.Module, ...]
    arrays: tuple[HeldArray, ...]
    extra_states: tuple[ExtraState, ...]
    names: Mapping[str, torch.Tensor]

    def reshard(self) -> None:
        """Frees what FSDP2 has gathered, so that the next forward sees what was loaded into the shards, and a backward that
        belongs to an earlier one fails. Local."""
        for module in self.modules:
            reshard(module)
            mark_changed(gathered_parameters(module))


def is_model(value: object) -> bool:
    """Whether an entry of `state` is a model: a module, a pipeline stage, or a non-empty list or tuple of these."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(part, nn.Module) or is_stage(part) for part in value)
    return isinstance(value, nn.Module) or is_stage(value)


def hold_module(item: str, model: object, *, job: Job, identities: Identities) -> HeldModule:
    """What this rank holds of the model under `item`; reads nothing but structure and runs no training code.

    `model` satisfies `is_model`. Tensors that `identities` knows already are recorded there as ties and not held again;
    new ones are added. Raises StructureConflict when two parts give one name to different tensors, LayoutUnsupported
    and ValueNotCarried as `hold` does.
    """
    parts: Sequence[object] = model if isinstance(model, (list, tuple)) else (model,)
    modules = tuple(module_of(part) for part in parts)
    names: dict[str, torch.Tensor] = {}
    origin: dict[str, int] = {}
    arrays: list[HeldArray] = []
    extra: dict[str, nn.Module] = {}
    for index, module in enumerate(modules):
        sharded, below = sharded_parameters(module), sharding_ranks(module, world_size=job.world_size)
        for found in walk(module):
            if isinstance(found, NamedModule):
                _require_one_module(item, found, extra)
                continue
            tensor = sharded.get((id(found.owner), found.attribute), found.tensor)
            if found.name in names:
                if names[found.name] is not tensor:
                    raise _conflict(item, found.name, (origin[found.name], index), modules)
                continue
            names[found.name], origin[found.name] = tensor, index
            trained_on = below.get(id(found.owner), ()) if found.role == "buffer" else ()
            arrays += _hold_once(item, found, tensor, job, identities, trained_on)
    pointers = tuple(ExtraState(pointer(item, name), module) for name, module in _distinct(extra))
    return HeldModule(_item(item, model, modules), modules, tuple(arrays), pointers, names)


def _hold_once(
    item: str, found: NamedTensor, tensor: torch.Tensor, job: Job, identities: Identities, trained_on: tuple[int, ...]
) -> tuple[HeldArray, ...]:
    if identities.find(tensor) is not None:
        identities.alias(tensor, item, found.name)
        return ()
    data_parallel = data_parallel_ranks(found.wrappers, found.tensor, name=found.name)
    if found.role == "buffer":
        kept = buffers_kept(found.wrappers, sharded=bool(trained_on))
        holders = holders_of(job, data_parallel=(*data_parallel, *trained_on), kept=kept)
    else:
        holders = holders_of(job, data_parallel=data_parallel)
    held = hold(ArrayId("params", item, found.name, "value"), tensor, role=found.role, job=job, holders=holders)
    identities.add(KnownTensor(item, found.name, tensor, found.role, held, holders))
    return held


def hold_tensor(item: str, name: str, tensor: torch.Tensor, *, job: Job, identities: Identities) -> tuple[HeldArray, ...]:
    """What this rank holds of a tensor elsewhere in `state`; `name`: its JSON pointer below `item`, no first slash.

    () for a tensor that is known already under another name, which is recorded as a tie.
    """
    if identities.find(tensor) is not None:
        identities.alias(tensor, item, name)
        return ()
    holders = holders_of(job)
    held = hold(ArrayId("extra", item, name, ""), tensor, role="other", job=job, holders=holders)
    identities.add(KnownTensor(item, name, tensor, "other", held, holders))
    return held


def pointer(item: str, name: str) -> str:
    """The JSON pointer "/<item>/<name>", with "~" and "/" inside them escaped as RFC 6901 has it."""
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in (item, name))


def _distinct(extra: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Each module once, under its first name: a module that stands in two places has one state."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for name, module in extra.items():
        first.setdefault(id(module), (name, module))
    return list(first.values())


def _require_one_module(item: str, found: NamedModule, extra: dict[str, nn.Module]) -> None:
    if extra.setdefault(found.name, found.module) is not found.module:
        raise StructureConflict(
            f"item {item!r}: two of its modules have extra state under the one name {found.name!r}; "
            f"give the parts of a model distinct names"
        )


def _conflict(item: str, name: str, indices: tuple[int, int], modules: Sequence[nn.Module]) -> StructureConflict:
    first, second = (f"part {index} ({type(unwrapped(modules[index])).__name__})" for index in indices)
    return StructureConflict(
        f"item {item!r}: {first} and {second} both have a tensor {name!r}, and it is not the same one; "
        f"number the layers of all parts from the whole model's first layer"
    )


def _item(item: str, model: object, modules: Sequence[nn.Module]) -> Item:
    kinds = sorted({type(unwrapped(module)).__name__ for module in modules})
    name = kinds[0] if len(kinds) == 1 and not isinstance(model, (list, tuple)) else f"{len(modules)} x {', '.join(kinds)}"
    return Item(item, "module", name)
