"""Optimizers as held arrays and tables: states by the name of their parameter, groups as columns over parameters.

    state[p]["exp_avg"]      (tensor of p's shape, DTensor, ...)  -> array params/<item>/<FQN>/exp_avg
    state[p]["step"]         (0-d tensor)                         -> field `scalar` "step" of p
    state[p]["prev"]         (None, number, list, small tensors)  -> field `scalar` "prev" of p
    state["counter"]         (belongs to no parameter)            -> value /<optimizer>/state/counter
    param_groups[k]["lr"]                                         -> field `hyper` "lr" of each parameter of group k

A plain tensor on a sharded parameter that does not have the local shard's shape has no place in a whole: it is this
rank's own (per-rank value /<optimizer>/state/<item>/<FQN>/<state>), and the field `scalar` "<state>@per-rank" says so.

States are named `<optimizer item>.<state>` when another optimizer of `state` has one of the same parameters, so that
both find their own. This is decided from what this rank has; ranks that share parameters must have the same optimizers
on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.format.box import Box
from elastickpt.format.values import Value
from elastickpt.training.dtensors import Holders, Job, hold, holders_of, placed
from elastickpt.training.elements import elements_of, settled
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities, KnownTensor
from elastickpt.training.stateful import hold_tree
from elastickpt.training.tables import Name, TableBuilder
from elastickpt.training.values import carried, place_of, scalar_values

PER_RANK = "@per-rank"
_NO_OPTION = ("params", "param_names")


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A parameter of an optimizer: the tensor in its group, and what the models of `state` say about it."""

    parameter: torch.Tensor
    group: int
    known: KnownTensor

    @property
    def name(self) -> Name:
        """(model item, FQN)"""
        return self.known.item, self.known.name


@dataclass(frozen=True, slots=True, eq=False)
class HeldOptimizer:
    """What one optimizer contributes; `table` can still take the fields of its schedulers."""

    table: TableBuilder
    members: tuple[Member, ...]
    arrays: tuple[HeldArray, ...]
    values: Mapping[str, Value]
    per_rank: Mapping[str, Value]


def members_of(item: str, optimizer: Optimizer, identities: Identities) -> tuple[Member, ...]:
    """The optimizer's parameters with their names, in the order of its groups.

    Raises StructureConflict for a parameter, or a tensor that state is kept for, that is in no model of `state`.
    """
    members = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            known = identities.find(parameter)
            if known is None or known.role != "parameter":
                raise StructureConflict(
                    f"optimizer {item!r}: a parameter of group {index}, of shape {tuple(parameter.shape)}, is in no "
                    f"model of `state`, so it has no name; put the model that it belongs to into `state` "
                    f"beside the optimizer"
                )
            members.append(Member(parameter, index, known))
    ids = {id(member.parameter) for member in members}
    for key in states_of(optimizer):
        if isinstance(key, torch.Tensor) and id(key) not in ids:
            raise StructureConflict(
                f"optimizer {item!r}: it keeps state for a tensor of shape {tuple(key.shape)} that is in none of its groups"
            )
    return tuple(members)


def states_of(optimizer: Optimizer) -> dict[Any, Any]:
    """`optimizer.state`: by parameter, and whatever else an optimizer uses as key."""
    return optimizer.state


def shared_parameters(optimizers: Iterable[Optimizer]) -> frozenset[int]:
    """Ids of the parameters that several of these optimizers have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for optimizer in optimizers:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        shared |= seen & own
        seen |= own
    return frozenset(shared)


def state_prefix(item: str, members: Sequence[Member], optimizer: Optimizer, shared: frozenset[int]) -> str:
    """What stands before each state's name: "<item>." where names alone would not say whose it is, else ""."""
    prefix = f"{item}."
    for member in members:
        names = optimizer.state.get(member.parameter, ())
        unclear = any(str(name) == "value" or str(name).startswith(("value.", prefix)) for name in names)
        if id(member.parameter) in shared or unclear:
            return prefix
    return ""


def options_of(group: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The hyper-parameters of a param group."""
    return ((key, value) for key, value in group.items() if key not in _NO_OPTION)


def hold_optimizer(
    item: str, optimizer: Optimizer, *, job: Job, identities: Identities, shared: frozenset[int]
) -> HeldOptimizer:
    """What this rank holds of an optimizer. `identities` knows all models of `state`; nothing is changed, and no step
    is run.

    Raises StructureConflict as `members_of` does, ValueNotCarried with the place of what no checkpoint can hold.
    """
    members = members_of(item, optimizer, identities)
    prefix = state_prefix(item, members, optimizer, shared)
    saver = _Saver(item, job, prefix)
    for member in members:
        saver.add(member, optimizer.state.get(member.parameter, {}))
    saver.put_scalars()
    saver.put_groups(optimizer, members)
    values: dict[str, Value] = {}
    for key, entry in states_of(optimizer).items():
        if not isinstance(key, torch.Tensor):
            place = place_of(item, "state", require_text(item, key))
            values[place], held = hold_tree(item, entry, place=place, job=job, identities=identities)
            saver.arrays.extend(held)
    return HeldOptimizer(saver.table, members, tuple(saver.arrays), values, saver.per_rank)


def require_text(item: str, key: object) -> str:
    """A key of `optimizer.state` or of a parameter's state; raises ValueNotCarried for one that is no text."""
    if not isinstance(key, str) or not key:
        raise ValueNotCarried(f"optimizer {item!r}: a state under the key {key!r}, expected a non-empty str")
    return key


class _Saver:
    """The states of one optimizer, sorted into arrays, fields and per-rank values."""

    def __init__(self, item: str, job: Job, prefix: str) -> None:
        self.item = item
        self.table = TableBuilder(item)
        self.arrays: list[HeldArray] = []
        self.per_rank: dict[str, Value] = {}
        self._job = job
        self._prefix = prefix
        self._scalars: list[tuple[str, int, torch.Tensor]] = []

    def add(self, member: Member, states: Any) -> None:
        row = self.table.row(member.name)
        place = place_of(self.item, "state", *member.name)
        if not isinstance(states, dict):
            raise ValueNotCarried(f"value {place}: a {type(states).__name__}, expected a dict of states")
        for key, entry in states.items():
            name = require_text(self.item, key)
            where = place + place_of(name)
            if not isinstance(entry, torch.Tensor):
                self.table.put("scalar", name, carried(entry, where), rows=(row,))
            elif entry.ndim == 0:
                self._scalars.append((name, row, local_scalar(entry, where)))
            else:
                self._add_tensor(member, name, entry, row)

    def _add_tensor(self, member: Member, name: str, entry: torch.Tensor, row: int) -> None:
        id_ = ArrayId("params", *member.name, self._prefix + name)
        held = hold_state(id_, entry, member=member, job=self._job)
        if held is not None:
            self.arrays.extend(held)
            return
        self.table.put("scalar", name + PER_RANK, True, rows=(row,))
        place = per_rank_place(self.item, member.name, name)
        self.per_rank[place] = carried(entry, place)

    def put_scalars(self) -> None:
        """All 0-d states at once, so that those on a device cost one copy."""
        for (name, row, _), value in zip(self._scalars, scalar_values([one for _, _, one in self._scalars]), strict=True):
            self.table.put("scalar", name, value, rows=(row,))

    def put_groups(self, optimizer: Optimizer, members: Sequence[Member]) -> None:
        rows: dict[int, list[int]] = {}
        for row, member in enumerate(members):
            rows.setdefault(member.group, []).append(row)
        for index, group in enumerate(optimizer.param_groups):
            for key, value in options_of(group):
                place = place_of(self.item, "param_groups", index, key)
                self.table.put("hyper", require_text(self.item, key), carried(value, place), rows=rows.get(index, ()))


def per_rank_place(item: str, name: Name, state: str) -> str:
    """Where a state without a place in the whole stands among the per-rank values."""
    return place_of(item, "state", *name, state)


def local_scalar(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The plain 0-d tensor of a 0-d state; raises ValueNotCarried for one that is still to be reduced."""
    parts = placed(settled(tensor))
    if parts is None:
        return tensor
    if not all(placement.is_replicate() for placement in parts.placements):
        raise ValueNotCarried(f"value {where}: a 0-d DTensor placed as {parts.placements}, expected it to be replicated")
    return parts.local


def hold_state(id_: ArrayId, tensor: torch.Tensor, *, member: Member, job: Job) -> tuple[HeldArray, ...] | None:
    """What this rank holds of a state; None when it is this rank's own, with no place in the whole.

    A DTensor has its own shape and place. A plain tensor has its parameter's, if it has the shape of the local shard;
    on a parameter that is not sharded it is whole, whatever its shape.
    """
    held = member.known.held
    if not held:  # this rank is outside the parameter's mesh
        return ()
    tensor = settled(tensor)
    parts, own = placed(tensor), placed(member.known.tensor)
    if parts is not None:
        same = own is not None and (parts.shape, parts.device_mesh, parts.placements) == (
            own.shape,
            own.device_mesh,
            own.placements,
        )
        if not same:
            return hold(id_, tensor, role="parameter", job=job, holders=holders_of(job))
        tensor = parts.local
    ndim = len(own.shape) if own is not None else member.parameter.ndim
    box = Box(held[0].box.start[:ndim], held[0].box.stop[:ndim])
    if tuple(tensor.shape) == box.shape or box.count == 0 == tensor.numel():
        return (_beside(id_, tensor, held[0], box, held[0].spec.shape[:ndim]),)
    if not is_sharded(held[0]):
        if held[0].sharing != "placed":
            return hold(id_, tensor, role="parameter", job=job, holders=Holders(held[0].sharing, held[0].replicas))
        whole = tuple(tensor.shape)
        return (replace(_beside(id_, tensor, held[0], Box.whole(whole), whole), placements=("R",) * len(held[0].placements)),)
    return None


def _beside(id_: ArrayId, tensor: torch.Tensor, held: HeldArray, box: Box, shape: tuple[int, ...]) -> HeldArray:
    """A plain local tensor that lies and is shared as its parameter is."""
    if tuple(tensor.shape) != box.shape:  # an empty shard, whose other axes torch leaves at any extent
        tensor = tensor.new_empty(box.shape)
    elements = elements_of(tensor, where=id_)
    tail = elements.tail
    spec = ArraySpec(id_, (*shape, *tail), elements.dtype)
    return HeldArray(
        spec,
        Box((*box.start, *(0 for _ in tail)), (*box.stop, *tail)),
        elements.tensor,
        "parameter",
        held.sharing,
        mesh=held.mesh,
        placements=held.placements,
        replicas=held.replicas,
        attributes=elements.attributes,
    )


def is_sharded(held: HeldArray) -> bool:
    """Whether other ranks hold other elements of the array."""
    if held.mesh is None:
        return held.box != Box.whole(held.spec.shape)
    return any(size > 1 and placement != "R" for size, placement in zip(held.mesh.sizes, held.placements, strict=True))
