"""Optimizers as held arrays and tables: states by the name of their parameter, groups as columns over parameters.

    state[p]["exp_avg"]      (tensor of p's shape, DTensor, ...)  -> array params/<item>/<FQN>/exp_avg
    state[p]["step"]         (0-d tensor)                         -> field `scalar` "step" of p
    state[p]["prev"]         (None, number, list, small tensors)  -> field `scalar` "prev" of p
    state[p]["dirs"]         (a list of large tensors or DTensors)-> field `scalar` "dirs" of p, arrays .../dirs.0, dirs.1
    state[p]["exp_avg"]      (composite: 8-bit codes and scales)  -> arrays .../exp_avg.codes, exp_avg.scale
    state["counter"]         (belongs to no parameter)            -> value /<optimizer>/state/counter
    param_groups[k]["lr"]                                         -> field `hyper` "lr" of each parameter of group k

A plain tensor on a sharded parameter that does not have the local shard's shape has no place in a whole: it is this
rank's own (per-rank value /<optimizer>/state/<item>/<FQN>/<state>), and the field `scalar` "<state>@per-rank" says so. [UCF-87]
So is a composite one whose parts are not cut as its rows are, and a list or dict with such a tensor inside. Where ranks hold
unevenly many rows, a low-bit optimizer may keep a composite state on one rank and a plain one on another: then both are own.

States are named `<optimizer item>.<state>` when another optimizer of `state` has one of the same parameters, so that
both find their own. This is decided from what this rank has; ranks that share parameters must have the same optimizers
on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.format.box import Box
from elastickpt.format.values import ArrayReference, StateReference, Value
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import Job, Placed, has_place, hold, holders_of, is_even, memorable, parts_of_spec, placed
from elastickpt.training.elements import elements_of, settled
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.members import Lying, Member, members_of, states_of
from elastickpt.training.memo import Seen
from elastickpt.training.own import as_tensor, hold_own, is_large
from elastickpt.training.stateful import hold_tree
from elastickpt.training.tables import Name, TableBuilder
from elastickpt.training.trees import mapped, place_of
from elastickpt.training.values import carried_leaf, scalar_values

PER_RANK = "@per-rank"
DTENSOR = "DTensor"  # what such a field says where the state is a DTensor: only its local tensor is this rank's own
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
    saver = _Saver(item, job, prefix, _fewest_quantised(optimizer))
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

    def __init__(self, item: str, job: Job, prefix: str, fewest_quantised: float) -> None:
        self.item = item
        self._fewest_quantised = fewest_quantised
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
                self._add_tree(member, name, entry, row)
            elif entry.ndim == 0 and not is_composite(entry):
                self._scalars.append((name, row, local_scalar(entry)))
            else:
                self._add_tensor(member, name, entry, row)

    def _add_tensor(self, member: Member, name: str, entry: torch.Tensor, row: int) -> None:
        parts = placed(settled(entry))
        may_differ = parts is not None and not is_composite(parts.local) and most_elements(parts) >= self._fewest_quantised
        held = None if may_differ else hold_state(self._id(member, name), entry, member=member, job=self._job)
        if held is not None:
            self.arrays.extend(held)
            return
        self._add_own(member, name, entry if parts is None else parts.local, row, says=True if parts is None else DTENSOR)

    def _add_own(self, member: Member, name: str, entry: object, row: int, *, says: Value) -> None:
        self.table.put("scalar", name + PER_RANK, says, rows=(row,))
        place = state_place(self.item, member.name, name)
        self.per_rank[place], held = hold_own(self.item, entry, place=place, job=self._job)
        self.arrays.extend(held)

    def _add_tree(self, member: Member, name: str, entry: object, row: int) -> None:
        """A state that is no tensor: its large tensors, and those of a sharded parameter, are states of their own. [UCF-112]"""
        place, held = state_place(self.item, member.name, name), list[HeldArray]()
        sharded = member.lying is not None and member.lying.sharded

        def leaf(one: object, where: str) -> Value:
            if isinstance(one, torch.Tensor) and one.ndim == 0 and not is_composite(one):
                return carried_leaf(local_scalar(one), where)
            if not (is_large(one) or (isinstance(one, torch.Tensor) and (sharded or placed(one) is not None))):
                return carried_leaf(one, where)
            state = inner_state(name, where[len(place) :])
            found = hold_state(self._id(member, state), as_tensor(one), member=member, job=self._job)
            if found is None:
                raise _NoPlace
            held.extend(found)
            return StateReference(state, "torch" if isinstance(one, torch.Tensor) else "numpy")

        try:
            value = mapped(entry, place, leaf)
        except _NoPlace:
            self._add_own(member, name, entry, row, says=True)
        else:
            self.table.put("scalar", name, value, rows=(row,))
            self.arrays.extend(held)

    def _id(self, member: Member, state: str) -> ArrayId:
        return ArrayId("params", *member.name, self._prefix + state)

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
                name, own = require_text(self.item, key), rows.get(index, ())
                self.table.put("hyper", name, self._option(value, index, name, [members[row].name for row in own]), rows=own)

    def _option(self, value: object, index: int, key: str, names: Sequence[Name]) -> Value:
        """An option of a group; large arrays in it are extras, named by the group's first parameter, which it has anywhere."""
        place = place_of(self.item, "param_groups", index, key)

        def leaf(one: object, where: str) -> Value:
            if not is_large(one) or not names:
                return carried_leaf(one, where)
            name = place_of("param_groups", *names[0], key)[1:] + where[len(place) :]
            holders = holders_of(self._job)
            held = hold(ArrayId("extra", self.item, name, ""), as_tensor(one), role="other", job=self._job, holders=holders)
            self.arrays.extend(held)
            return ArrayReference(self.item, name, "torch" if isinstance(one, torch.Tensor) else "numpy")

        return mapped(value, place, leaf)


FEW_ELEMENTS = 1024  # below this many nobody quantises a shard


def _fewest_quantised(optimizer: Optimizer) -> float:
    """From how many elements on a shard's state may be a composite tensor on one rank and a plain one on another; infinite for
    an optimizer beside which no class of composite tensors is defined, which says the same on all ranks."""
    beside = type(optimizer).__module__.rpartition(".")[0] or type(optimizer).__module__
    kinds, seen = [torch.Tensor], set[type]()
    while kinds:
        kind = kinds.pop()
        if kind in seen:
            continue
        seen.add(kind)
        kinds += kind.__subclasses__()
        if hasattr(kind, "__tensor_flatten__") and (kind.__module__.rpartition(".")[0] or kind.__module__) == beside:
            return FEW_ELEMENTS
    return inf


def most_elements(parts: Placed) -> float:
    """The elements of the largest shard of a DTensor of which ranks hold unevenly many rows; -1 for another one."""
    ways = prod(
        size for size, placement in zip(parts.device_mesh.shape, parts.placements, strict=True) if not placement.is_replicate()
    )
    return -1 if ways == 1 or is_even(parts) else -(-parts.shape[0] // ways) * prod(parts.shape[1:])


class _NoPlace(Exception):
    """A tensor inside a state has no place in the whole."""


def inner_state(state: str, below: str) -> str:
    """The state of what stands `below` another one (a JSON pointer): ("dirs", "/0") -> "dirs.0"; a point in a token is `~2`."""
    return state + below.replace(".", "~2").replace("/", ".")


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
    if is_composite(local) or (parts is not None and not _same_place(parts, lying.own)):
        if (parts is None and lying.sharded) or not has_place(tensor, job=job):
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
        order=elements.order,
    )
