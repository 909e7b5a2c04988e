"""Optimizers as held arrays and tables: states by the name of their parameter, groups as columns over parameters.

    state[p]["exp_avg"]      (tensor of p's shape, DTensor, ...)  -> array params/<item>/<FQN>/exp_avg
    state[p]["step"]         (0-d tensor)                         -> field `scalar` "step" of p
    state[p]["prev"]         (None, number, list, small tensors)  -> field `scalar` "prev" of p
    state["counter"]         (belongs to no parameter)            -> value /<optimizer>/state/counter
    param_groups[k]["lr"]                                         -> field `hyper` "lr" of each parameter of group k

A plain tensor on a sharded parameter that does not have the local shard's shape has no place in a whole: it is this
rank's own (per-rank value /<optimizer>/state/<item>/<FQN>/<state>), and the field `scalar` "<state>@per-rank" says so. [UCF-87]

States are named `<optimizer item>.<state>` when another optimizer of `state` has one of the same parameters, so that
both find their own. This is decided from what this rank has; ranks that share parameters must have the same optimizers
on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.format.box import Box
from elastickpt.format.values import Value
from elastickpt.training.dtensors import Job, Placed, hold, memorable, parts_of_spec, placed
from elastickpt.training.elements import composition_of, elements_of, settled
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.members import Lying, Member, members_of, states_of
from elastickpt.training.memo import Seen
from elastickpt.training.stateful import hold_tree
from elastickpt.training.tables import Name, TableBuilder
from elastickpt.training.values import carried, place_of, scalar_values

PER_RANK = "@per-rank"
_NO_OPTION = ("params", "param_names")


@dataclass(frozen=True, slots=True, eq=False)
class HeldOptimizer:
    """What one optimizer contributes; `table` can still take the fields of its schedulers."""

    table: TableBuilder
    members: tuple[Member, ...]
    arrays: tuple[HeldArray, ...]
    values: Mapping[str, Value]
    per_rank: Mapping[str, Value]


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
        if not isinstance(states, dict):
            place = place_of(self.item, "state", *member.name)
            raise ValueNotCarried(f"value {place}: a {type(states).__name__}, expected a dict of states")
        for key, entry in states.items():
            name = require_text(self.item, key)
            if not isinstance(entry, torch.Tensor):
                value = carried(entry, state_place(self.item, member.name, name))
                self.table.put("scalar", name, value, rows=(row,))
            elif entry.ndim == 0:
                self._scalars.append((name, row, local_scalar(entry)))
            else:
                self._add_tensor(member, name, entry, row)

    def _add_tensor(self, member: Member, name: str, entry: torch.Tensor, row: int) -> None:
        id_ = ArrayId("params", *member.name, self._prefix + name)
        held = hold_state(id_, entry, member=member, job=self._job)
        if held is not None:
            self.arrays.extend(held)
            return
        self.table.put("scalar", name + PER_RANK, True, rows=(row,))
        place = state_place(self.item, member.name, name)
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


def state_place(item: str, name: Name, state: str) -> str:
    """The place of one state of one parameter, in messages; and in the per-rank values, if it is a rank's own."""
    return place_of(item, "state", *name, state)


def local_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """The plain 0-d tensor of a 0-d state; raises LayoutUnsupported for one that is still to be reduced."""
    parts = placed(settled(tensor))
    if parts is None:
        return tensor
    if not all(placement.is_replicate() for placement in parts.placements):
        raise LayoutUnsupported(f"a 0-d optimizer state placed as {parts.placements}, expected it to be replicated")
    return parts.local


def hold_state(id_: ArrayId, tensor: torch.Tensor, *, member: Member, job: Job) -> tuple[HeldArray, ...] | None:
    """What this rank holds of a state; None when it is this rank's own, with no place in the whole.

    A DTensor has its own shape and place. A plain tensor has its parameter's, if it has the shape of the local shard;
    on a parameter that is not sharded it is whole, whatever its shape.
    """
    lying = member.lying
    if lying is None:
        return ()
    memo, plain = job.memo, None if job.memo is None else memorable(tensor)
    if memo is None or plain is None:
        return _hold_state(id_, tensor, member=member, job=job, lying=lying)
    local, spec = plain
    cause = (lying.held.spec, spec, *parts_of_spec(spec))  # the parameter's spec is an object of its own: it says how that lies
    if (again := memo.find(tensor, local, id_, "parameter", cause)) is not None:
        return (again,)
    found = _hold_state(id_, tensor, member=member, job=job, lying=lying)
    if found is not None and len(found) == 1:
        memo.put(tensor, Seen.of(found[0], local, role="parameter", cause=cause))
    return found


def _hold_state(id_: ArrayId, tensor: torch.Tensor, *, member: Member, job: Job, lying: Lying) -> tuple[HeldArray, ...] | None:
    tensor = settled(tensor)
    parts = placed(tensor)
    local = tensor if parts is None else parts.local
    if composition_of(local) or (parts is not None and not _same_place(parts, lying.own)):
        if parts is None and lying.sharded:
            return None
        return hold(id_, tensor, role="parameter", job=job, holders=member.known.holders)
    if tuple(local.shape) == lying.box.shape or lying.box.count == 0 == local.numel():
        return (_beside(id_, local, lying.held, box=lying.box, shape=lying.shape),)
    if lying.sharded:
        return None
    whole = tuple(local.shape)
    held = _beside(id_, local, lying.held, box=Box.whole(whole), shape=whole)
    return (replace(held, placements=("R",) * len(held.placements)),)


def _same_place(one: Placed, other: Placed | None) -> bool:
    return (
        other is not None
        and one.shape == other.shape
        and one.placements == other.placements
        and one.device_mesh == other.device_mesh
    )


def _beside(id_: ArrayId, tensor: torch.Tensor, held: HeldArray, *, box: Box, shape: tuple[int, ...]) -> HeldArray:
    """A plain local tensor that lies in `box` and is shared as its parameter is."""
    if tuple(tensor.shape) != box.shape:  # an empty shard, whose other axes torch leaves at any extent
        tensor = tensor.new_empty(box.shape)
    elements = elements_of(tensor, where=id_)
    if tail := elements.tail:
        shape, box = (*shape, *tail), Box((*box.start, *(0 for _ in tail)), (*box.stop, *tail))
    return HeldArray(
        ArraySpec(id_, shape, elements.dtype),
        box,
        elements.tensor,
        "parameter",
        held.sharing,
        mesh=held.mesh,
        placements=held.placements,
        replicas=held.replicas,
        attributes=elements.attributes,
    )
