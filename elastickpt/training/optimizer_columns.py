"""The states and options of an entry's optimizers, sorted into arrays, columns over parameters, and values of each rank."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from enum import Enum
from math import inf
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.tables import TableName
from elastickpt.format.values import ArrayReference, StateReference, Value
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import JobView, hold, holders_of, placed
from elastickpt.training.elements import settled
from elastickpt.training.held import HeldArray
from elastickpt.training.held_trees import as_tensor, hold_own, hold_tree, is_large
from elastickpt.training.known_memory import tensors_in
from elastickpt.training.optimizer_entries import Beyond, entry_place
from elastickpt.training.optimizer_parts import NO_OPTION, OptimizerPart
from elastickpt.training.optimizer_states import TableBuilder, fewest_quantised, hold_state, local_scalar, most_elements
from elastickpt.training.parameters import Identities, OwnedParameter, groups_of
from elastickpt.training.trees import mapped, place_of, token
from elastickpt.training.values import carried, carried_leaf, carried_option, scalar_values

PER_RANK = "@per-rank"
DTENSOR = "DTensor"  # what such a field says where the state is a DTensor: only its local tensor is this rank's own
PART = "@part"  # of a parameter: the path of the part, not its first one, to which states without a path belong [UCF-150]
IN_STATE_DICT = "@in"  # "<state>@in" says where in the optimizer's own state dict the state stands [UCF-151]
ENTRIES = "@entries"  # /<item>/@entries: the place of each entry to its path [UCF-152]


def options_of(group: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The hyper-parameters of a param group."""
    return ((key, value) for key, value in group.items() if key not in NO_OPTION)


def require_text(item: str, key: object) -> str:
    """A key of `optimizer.state` or of a parameter's state; raises ValueNotCarried for one that is no text."""
    if not isinstance(key, str) or not key:
        raise ValueNotCarried(f"optimizer {item!r}: a state under the key {key!r}, expected a non-empty str")
    return key


class StateColumns:
    """The states of an entry's optimizers, sorted into arrays, fields and per-rank values."""

    def __init__(self, item: str, job: JobView, prefix: str) -> None:
        self.item = item
        self.table = TableBuilder(item)
        self.rows: dict[TableName, int] = {}
        self.arrays: list[HeldArray] = []
        self.per_rank: dict[str, Value] = {}
        self._job = job
        self._prefix = prefix
        self._fewest_quantised: float = inf
        self._scalars: list[tuple[str, int, torch.Tensor]] = []
        self._put: dict[int, list[Container[str]]] = {}
        self._fewest: dict[int, float] = {}

    def add(self, param: OwnedParameter, states: Any, part: OptimizerPart, prefix: str) -> None:
        """All states of one parameter in a part; `prefix` stands before their names."""
        first = param.name not in self.rows
        row = self._row(param)
        if states and not (first or prefix):
            self.table.put("scalar", PART, part.path, rows=(row,))
        if not isinstance(states, dict):
            place = place_of(self.item, "state", *param.name)
            raise ValueNotCarried(f"value {place}: a {type(states).__name__}, expected a dict of states")
        self._fewest_quantised = self._fewest_of(part.optimizer)
        put = self._put.get(row, ())
        for key, entry in states.items():
            name = prefix + require_text(self.item, key)
            if put:
                self._require_new(param, row, name)
            self._add(param, row, name, entry)
        self._put.setdefault(row, []).append({prefix + key for key in states} if prefix else states)
        self._fewest_quantised = inf

    def _fewest_of(self, optimizer: Optimizer) -> float:
        if id(optimizer) not in self._fewest:
            self._fewest[id(optimizer)] = fewest_quantised(optimizer)
        return self._fewest[id(optimizer)]

    def _row(self, param: OwnedParameter) -> int:
        row = self.rows.get(param.name)
        if row is None:
            row = self.rows[param.name] = self.table.row(param.name)
        return row

    def _add(self, param: OwnedParameter, row: int, name: str, entry: object) -> None:
        if not isinstance(entry, torch.Tensor):
            self._add_tree(param, name, entry, row)
        elif entry.ndim == 0 and not is_composite(entry):
            self._scalars.append((name, row, local_scalar(entry)))
        else:
            self._add_tensor(param, name, entry, row)

    def _require_new(self, param: OwnedParameter, row: int, name: str) -> None:
        if any(name in names for names in self._put.get(row, ())):
            raise StructureConflict(
                f"optimizer {self.item!r}: two states of {'/'.join(param.name)} have the one name {name!r}; "
                f"give one of them another key in the optimizer's state dict"
            )

    def entries(self, found: Mapping[str, Beyond], identities: Identities) -> dict[str, Value]:
        """Takes what state dicts, by the path of their root, have beyond parts; gives the values for the places of the rest."""
        places: dict[str, Value] = {}
        values: dict[str, Value] = {}
        for root_path, rest in found.items():
            for one in rest.of_parameters:
                row = self._row(one.param)
                self._require_new(one.param, row, one.name)
                self._put.setdefault(row, []).append((one.name,))
                self._add(one.param, row, one.name, one.entry)
                self.table.put("scalar", one.name + IN_STATE_DICT, one.whereabouts, rows=(row,))
            for path, entry in rest.at.items():
                place = entry_place(self.item, root_path, path)
                if place in places:
                    raise ValueNotCarried(f"value {place}: two entries of a state dict; keys must differ as text")
                places[place] = carried([root_path, *path], place)
                if self._job.world_size > 1 and all(placed(tensor) is None for tensor in tensors_in(entry)):
                    self.per_rank[place], own = hold_own(self.item, entry, place=place, job=self._job)
                    self.arrays.extend(own)
                    values[place + PER_RANK] = True  # nobody says that other ranks have the same
                    continue
                values[place], held = hold_tree(self.item, entry, place=place, job=self._job, identities=identities)
                self.arrays.extend(held)
        shared = values if self._job.world_size == 1 else self.per_rank  # stages of a pipeline may have others
        shared[place_of(self.item, ENTRIES)] = places
        return values

    def _add_tensor(self, param: OwnedParameter, name: str, entry: torch.Tensor, row: int) -> None:
        if not self._may_differ(entry):
            held = hold_state(self._id(param, name), entry, param=param, job=self._job)
            if held is not None:
                self.arrays.extend(held)
                return
        parts = placed(settled(entry))
        self._add_own(param, name, entry if parts is None else parts.local, row, says=True if parts is None else DTENSOR)

    def _may_differ(self, entry: torch.Tensor) -> bool:
        """Whether one rank's part may be quantised and another's plain."""
        if self._fewest_quantised == inf:
            return False
        parts = placed(settled(entry))
        return parts is not None and not is_composite(parts.local) and most_elements(parts) >= self._fewest_quantised

    def _add_own(self, param: OwnedParameter, name: str, entry: object, row: int, *, says: Value) -> None:
        self.table.put("scalar", name + PER_RANK, says, rows=(row,))
        place = state_place(self.item, param.name, name)
        self.per_rank[place], held = hold_own(self.item, entry, place=place, job=self._job)
        self.arrays.extend(held)

    def _add_tree(self, param: OwnedParameter, name: str, entry: object, row: int) -> None:
        """A state that is no tensor: its large tensors, and those of a sharded parameter, are states of their own. [UCF-112]"""
        place, held = state_place(self.item, param.name, name), list[HeldArray]()
        sharded = param.lying is not None and param.lying.sharded

        def leaf(one: object, where: str) -> Value:
            if isinstance(one, torch.Tensor) and one.ndim == 0 and not is_composite(one):
                return carried_leaf(local_scalar(one), where)
            if not (is_large(one) or (isinstance(one, torch.Tensor) and (sharded or placed(one) is not None))):
                return carried_leaf(one, where)
            state = inner_state(name, where[len(place) :])
            found = hold_state(self._id(param, state), as_tensor(one), param=param, job=self._job)
            if found is None:
                raise _NoPlace
            held.extend(found)
            return StateReference(state, "torch" if isinstance(one, torch.Tensor) else "numpy")

        try:
            value = mapped(entry, place, leaf)
        except _NoPlace:
            self._add_own(param, name, entry, row, says=True)
        else:
            self.table.put("scalar", name, value, rows=(row,))
            self.arrays.extend(held)

    def _id(self, param: OwnedParameter, state: str) -> ArrayId:
        return ArrayId("params", *param.name, self._prefix + state)

    def put_scalars(self) -> None:
        """All 0-d states at once, so that those on a device cost one copy."""
        for (name, row, _), value in zip(self._scalars, scalar_values([one for _, _, one in self._scalars]), strict=True):
            self.table.put("scalar", name, value, rows=(row,))

    def put_groups(self, part: OptimizerPart, prefix: str) -> None:
        """The options of a part's groups, as columns over their parameters."""
        rows: dict[int, list[int]] = {}
        first: dict[int, TableName] = {}
        for param in part.params:
            rows.setdefault(param.group, []).append(self.rows[param.name])
            first.setdefault(param.group, param.name)
        for index, group in enumerate(groups_of(part.optimizer)):
            place = group_place(self.item, part.path, index)
            options = {
                require_text(self.item, key): self._option(one, f"{place}/{token(key)}", prefix + key, first.get(index))
                for key, one in options_of(group)
            }
            if index not in rows:
                self.per_rank[place] = dict(options)
            for key, value in options.items():
                self.table.put("hyper", prefix + key, value, rows=rows.get(index, ()))

    def _option(self, value: object, place: str, key: str, first: TableName | None) -> Value:
        """An option of a group; large arrays in it are extras, named by the group's first parameter, which it has anywhere."""
        if isinstance(value, Enum):
            return carried_option(value, place)

        def leaf(one: object, where: str) -> Value:
            if not is_large(one) or first is None:
                return carried_leaf(one, where)
            name = place_of("param_groups", *first, key)[1:] + where[len(place) :]
            holders = holders_of(self._job)
            held = hold(ArrayId("extra", self.item, name, ""), as_tensor(one), role="other", job=self._job, holders=holders)
            self.arrays.extend(held)
            return ArrayReference(self.item, name, "torch" if isinstance(one, torch.Tensor) else "numpy")

        return mapped(value, place, leaf)


class _NoPlace(Exception):
    """A tensor inside a state has no place in the whole."""


def inner_state(state: str, below: str) -> str:
    """The state of what stands `below` another one (a JSON pointer): ("dirs", "/0") -> "dirs.0"; a point in a token is `~2`."""
    return state + below.replace(".", "~2").replace("/", ".")


def group_place(item: str, path: str, index: int) -> str:
    """The place of a group of the part at `path`, in messages, and in the per-rank values if it has no parameters. [UCF-154]"""
    return place_of(item, *((path,) if path else ()), "param_groups", index)


def state_place(item: str, name: TableName, state: str) -> str:
    """The place of one state of one parameter, in messages; and in the per-rank values, if it is a rank's own."""
    return place_of(item, "state", *name, state)
