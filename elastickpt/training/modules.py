"""Models as held arrays: a module, a pipeline stage, or a list of them, under one key of `state`; or the part of a model that
training changes, `trainable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import nn

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.records import Item
from elastickpt.training.dtensors import Holders, JobView, hold, holders_of
from elastickpt.training.elements import mark_changed, order_of
from elastickpt.training.entries import below, covering
from elastickpt.training.held import HeldArray, held_alike
from elastickpt.training.naming import NamedModule, NamedTensor, unwrapped, walk
from elastickpt.training.own_state import OwnEntry, OwnSaid, Registered, ask, beyond
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
from elastickpt.training.parameters import Identities, KnownTensor


class Trainable:
    """What `trainable` returns. `model` is a module, a pipeline stage, or a list of these."""

    __slots__ = ("model",)

    def __init__(self, model: object) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"trainable({type(self.model).__name__})"


def trainable(model: object) -> Trainable:
    """Those parameters of a model that require gradients, as an entry of `state`, under the model's own names: adapters, for
    example.

    Which they are is looked at in each save and load. Frozen parameters, buffers and extra state are left out: on loading
    they are as the program made them. A checkpoint of the whole model under the same key loads into it with
    `strict="missing"`.

    Args:
        model: A module, a pipeline stage, or a list of these.

    Returns:
        The entry.

    Raises:
        LayoutUnsupported: When it is saved: `model` is no module.

    Examples:
        >>> info = ek.save({"model": ek.trainable(model)}, "out/adapters")
        >>> sorted(name for _, name in ek.open("out/adapters").parameters)
        ['layers.0.bias', 'layers.0.weight']
    """
    return Trainable(model)


@dataclass(frozen=True, slots=True, eq=False)
class ExtraState:
    """A module with `get_extra_state`, and the JSON pointer "/<item>/<module FQN>" of its value."""

    pointer: str
    module: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class ModulePart:
    """One module of an item: `names` are its canonical names, tied ones included, to the tensor that stands there.

    `entries` are what its own state dict has beyond these; `loaders` its modules that load by themselves, by name, with the
    versions of their classes.
    """

    module: nn.Module
    names: Mapping[str, torch.Tensor]
    entries: tuple[OwnEntry, ...]
    loaders: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class HeldModule:
    """What one item of `state` contributes: arrays that share memory with the model, modules with extra state, own entries.

    `names` are those of all parts.
    """

    item: Item
    parts: tuple[ModulePart, ...]
    arrays: tuple[HeldArray, ...]
    extra_states: tuple[ExtraState, ...]
    names: Mapping[str, torch.Tensor]

    def reshard(self) -> None:
        """Frees what FSDP2 has gathered, so that the next forward sees what was loaded into the shards, and a backward that
        belongs to an earlier one fails. Local."""
        for part in self.parts:
            reshard(part.module)
            mark_changed(gathered_parameters(part.module))


def is_model(value: object) -> bool:
    """Whether an entry of `state` is a model: a module, a pipeline stage, or a non-empty list or tuple of these; or the
    trainable part of one."""
    if isinstance(value, Trainable):
        return is_model(value.model)
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(part, nn.Module) or is_stage(part) for part in value)
    return isinstance(value, nn.Module) or is_stage(value)


def hold_module(item: str, model: object, *, job: JobView, identities: Identities) -> HeldModule:
    """What this rank holds of the model under `item`; runs training code only where modules save by themselves (their own
    state dicts and hooks), before what they register is looked at.

    `model` satisfies `is_model`. Tensors that `identities` knows already are recorded there as ties and not held again;
    new ones are added. Raises StructureConflict when two parts give one name to different tensors, LayoutUnsupported
    and ValueNotCarried as `hold` does, and as `own_state.beyond` does.
    """
    part, model = isinstance(model, Trainable), model.model if isinstance(model, Trainable) else model
    given: Sequence[object] = model if isinstance(model, (list, tuple)) else (model,)
    modules = tuple(module_of(one) for one in given)
    holding = _Holding(item, modules, job, identities)
    if part:
        parts = tuple(holding.trained(index) for index in range(len(modules)))
        if not holding.names:
            raise ValueNotCarried(f"item {item!r}: no parameter of this model requires a gradient, so nothing of it is trained")
        return HeldModule(_item(item, model, modules), parts, tuple(holding.arrays), (), holding.names)
    parts = tuple(holding.part(index) for index in range(len(modules)))
    pointers = tuple(ExtraState(pointer(item, name), module) for name, module in _distinct(holding.extra))
    return HeldModule(_item(item, model, modules), parts, tuple(holding.arrays), pointers, holding.names)


class _Holding:
    """One walk over all parts of an item."""

    def __init__(self, item: str, modules: Sequence[nn.Module], job: JobView, identities: Identities) -> None:
        self.names: dict[str, torch.Tensor] = {}
        self.arrays: list[HeldArray] = []
        self.extra: dict[str, nn.Module] = {}
        self._item, self._modules, self._job, self._identities = item, modules, job, identities
        self._origin: dict[str, int] = {}
        self._ignored: dict[int, frozenset[int]] = {}  # by id of a DDP

    def part(self, index: int) -> ModulePart:
        module = self._modules[index]
        sharded = sharded_parameters(module)
        trained_on = sharding_ranks(module, world_size=self._job.world_size) if sharded else {}
        registered, said, loaders = Registered(), list[OwnSaid](), dict[str, int]()
        for found in walk(module):
            if isinstance(found, NamedModule):
                if "extra state" in found.traits:
                    _require_one_module(self._item, found, self.extra)
                    registered.extra_states.add(f"{below(found.name)}_extra_state")
                if "own loading" in found.traits:
                    loaders[found.name] = found.module._version
                if "own saving" in found.traits and not covering((one.name for one in said), found.name):
                    said.append(ask(found.name, found.module, root=not found.name))
                continue
            tensor = sharded.get((id(found.owner), found.attribute), found.tensor)
            registered.tensors[found.name] = tensor
            if tensor is not found.tensor:
                registered.gathered[found.name] = found.tensor
            self._tensor(found, tensor, index, trained_on.get(id(found.owner), ()) if found.role == "buffer" else ())
        entries = tuple(entry for one in said for entry in beyond(one, registered))
        return ModulePart(module, registered.tensors, entries, loaders)

    def trained(self, index: int) -> ModulePart:
        """The parameters that require gradients, and nothing else; no code of the modules runs."""
        module, own = self._modules[index], dict[str, torch.Tensor]()
        sharded = sharded_parameters(module)
        for found in walk(module):
            if isinstance(found, NamedTensor) and found.role == "parameter":
                tensor = sharded.get((id(found.owner), found.attribute), found.tensor)
                if tensor.requires_grad:
                    own[found.name] = tensor
                    self._tensor(found, tensor, index, ())
        return ModulePart(module, own, (), {})

    def _tensor(self, found: NamedTensor, tensor: torch.Tensor, index: int, trained_on: tuple[int, ...]) -> None:
        if found.name not in self.names:
            self.names[found.name], self._origin[found.name] = tensor, index
            self.arrays += self._hold_once(found, tensor, trained_on)
        elif self.names[found.name] is not tensor:
            raise _conflict(self._item, found.name, (self._origin[found.name], index), self._modules)

    def _hold_once(self, found: NamedTensor, tensor: torch.Tensor, trained_on: tuple[int, ...]) -> tuple[HeldArray, ...]:
        job, identities = self._job, self._identities
        if identities.find(tensor) is not None:
            identities.alias(tensor, self._item, found.name)
            return ()
        data_parallel = data_parallel_ranks(found.wrappers, found.tensor, name=found.name, ignored=self._ignored)
        if found.role == "buffer":
            kept = buffers_kept(found.wrappers, sharded=bool(trained_on))
            holders = holders_of(job, data_parallel=(*data_parallel, *trained_on), kept=kept)
        else:
            holders = holders_of(job, data_parallel=data_parallel)
        held = hold(ArrayId("params", self._item, found.name, "value"), tensor, role=found.role, job=job, holders=holders)
        identities.add(KnownTensor(self._item, found.name, tensor, found.role, held, holders))
        return held


def hold_tensor(item: str, name: str, tensor: torch.Tensor, *, job: JobView, identities: Identities) -> tuple[HeldArray, ...]:
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


def hold_plain(
    item: str, tensors: Sequence[torch.Tensor], specs: Sequence[ArraySpec], *, job: JobView, identities: Identities
) -> list[HeldArray]:
    """The same of plain tensors that were not met before, of these shapes and element types, at the names of their specs."""
    holders = holders_of(job)
    shapes = [spec.shape for spec in specs]
    boxes = {shape: Box.whole(shape) for shape in set(shapes)}
    in_order = all(map(torch.Tensor.is_contiguous, tensors))
    orders: Iterable[tuple[int, ...]] = repeat(()) if in_order else map(order_of, tensors)
    alike = (holders.sharing, holders.ranks, holders.kept)
    held = held_alike(specs, map(boxes.__getitem__, shapes), tensors, alike, orders)
    identities.add_all(item, [spec.id.name for spec in specs], tensors, held.__getitem__, holders)
    return held


def meet_plain(
    item: str,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    spec_of: Callable[[int], ArraySpec],
    *,
    job: JobView,
    identities: Identities,
) -> Holders:
    """Who holds plain tensors that were not met before, and now were; the spec of each, by its place, is for who asks."""
    holders = holders_of(job)
    identities.add_all(item, names, tensors, lambda place: _plainly(spec_of(place), tensors[place], holders), holders)
    return holders


def meet_placed(
    item: str, names: Sequence[str], tensors: Sequence[torch.Tensor], *, job: JobView, identities: Identities
) -> None:
    """Records that DTensors were met that were not before, each of which is one array."""
    holders = holders_of(job)

    def held(place: int) -> HeldArray:
        return hold(ArrayId("extra", item, names[place], ""), tensors[place], role="other", job=job, holders=holders)[0]

    identities.add_all(item, names, tensors, held, holders)


def _plainly(spec: ArraySpec, tensor: torch.Tensor, holders: Holders) -> HeldArray:
    box = Box.whole(spec.shape)
    return HeldArray(
        spec,
        box,
        tensor.detach(),
        "other",
        holders.sharing,
        replicas=holders.ranks,
        kept=holders.kept,
        order=order_of(tensor),
    )


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
