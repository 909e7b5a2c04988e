"""Optimizers as held arrays and tables: states by the name of their parameter, groups as columns over parameters.

    state[p]["exp_avg"]      (tensor of p's shape, DTensor, ...)  -> array params/<item>/<FQN>/exp_avg
    state[p]["step"]         (0-d tensor)                         -> field `scalar` "step" of p
    state[p]["prev"]         (None, number, list, small tensors)  -> field `scalar` "prev" of p
    state[p]["dirs"]         (a list of large tensors or DTensors)-> field `scalar` "dirs" of p, arrays .../dirs.0, dirs.1
    state[p]["exp_avg"]      (composite: 8-bit codes and scales)  -> arrays .../exp_avg.codes, exp_avg.scale
    state["counter"]         (belongs to no parameter)            -> value /<optimizer>/state/counter
    param_groups[k]["lr"]                                         -> field `hyper` "lr" of each parameter of group k
    state_dict()["scaler"]   (from an override or a hook)         -> value /<optimizer>/scaler, tensors in extra/<optimizer>/...

A plain tensor on a sharded parameter that does not have the local shard's shape has no place in a whole: it is this
rank's own (per-rank value /<optimizer>/state/<item>/<FQN>/<state>), and the field `scalar` "<state>@per-rank" says so. [UCF-87]
So is a composite one whose parts are not cut as its rows are, and a list or dict with such a tensor inside. Where ranks hold
unevenly many rows, a low-bit optimizer may keep a composite state on one rank and a plain one on another: then both are own.

An optimizer inside another one, or in a list or dict of them, is a part of the entry (`optimizer_parts`); its states and
options are named `<path>.<state>` where another part has the same. States are named `<optimizer item>.<state>` when another
optimizer of `state` has one of the same parameters, so that both find their own. This is decided from what this rank has;
ranks that share parameters must have the same optimizers on them.

Learning-rate schedulers: their state dict, but lists with an entry for each param group go to the optimizer's table.

    state_dict()["base_lrs"]               (an entry for each group)  -> field `schedule` "<item>/base_lrs"
    state_dict()["_schedulers"][1]["..."]  (SequentialLR)             -> field `schedule` "<item>/_schedulers/1/..."
    everything else                                                   -> the item's value tree, None for such a list

So a scheduler finds its lists again when the groups of its optimizer are cut otherwise, or differ between pipeline
stages. A list goes by groups if its name says so: torch's own are known, a class of its own names its lists in
`elastickpt_group_lists`. Every other list is a plain value, whatever its length. [UCF-89] If its optimizer is not in
`state`, a scheduler's lists are carried whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import ValueNotCarried
from elastickpt.format.tables import TableName
from elastickpt.format.values import Value
from elastickpt.training.dtensors import JobView
from elastickpt.training.entries import elements, has_own_way, state_dict_of
from elastickpt.training.held import HeldArray
from elastickpt.training.held_trees import hold_tree
from elastickpt.training.known_memory import CarriedTensors, DerivedEntries, tensors_in
from elastickpt.training.optimizer_columns import StateColumns, require_text
from elastickpt.training.optimizer_entries import Beyond, beyond
from elastickpt.training.optimizer_parts import (
    OptimizerPart,
    Prefixes,
    optimizers_inside,
    parts_of,
    prefixes_of,
)
from elastickpt.training.optimizer_states import TableBuilder
from elastickpt.training.parameters import Identities, groups_of, states_of
from elastickpt.training.trees import place_of
from elastickpt.training.values import carried, token


@dataclass(frozen=True, slots=True, eq=False)
class HeldOptimizer:
    """What an entry with optimizers contributes; `table` can still take the fields of their schedulers.

    `rows` are the rows of the table for each group of each optimizer of the entry, by its id.
    """

    table: TableBuilder
    rows: Mapping[int, Sequence[Sequence[int]]]
    arrays: tuple[HeldArray, ...]
    values: Mapping[str, Value]
    per_rank: Mapping[str, Value]


@dataclass(frozen=True, slots=True, eq=False)
class StateOptimizers:
    """The optimizers of all entries of `state`: `owners` are the entries with each, `shared` ids of parameters of several."""

    items: tuple[str, ...]
    owners: Mapping[int, str]
    shared: frozenset[int]

    @classmethod
    def of(cls, entries: Mapping[str, object]) -> StateOptimizers:
        """`entries` are all entries with optimizers."""
        owners = {id(root): item for item, entry in entries.items() for root in elements(entry).values()}
        seen: set[int] = set()
        shared: set[int] = set()
        for entry in entries.values():
            own: set[int] = set()
            roots = {id(root) for root in elements(entry).values()}
            for one in optimizers_inside(entry):
                if id(one) in roots or id(one) not in owners:
                    own.update(id(parameter) for group in groups_of(one) for parameter in group["params"])
            shared |= seen & own
            seen |= own
        return cls(tuple(entries), owners, frozenset(shared))

    def elsewhere(self, item: str) -> frozenset[int]:
        """Ids of the optimizers of other entries."""
        return frozenset(which for which, owner in self.owners.items() if owner != item)


def state_prefix(item: str, parts: Sequence[OptimizerPart], prefixes: Mapping[str, Prefixes], beside: StateOptimizers) -> str:
    """What stands before each state's name: "<item>." where names alone would not say whose it is, else ""."""
    prefix = f"{item}."
    others = tuple(f"{other}." for other in beside.items)
    for part in parts:
        if prefixes[part.path].states.startswith(others):
            return prefix
        states = states_of(part.optimizer)
        for param in part.params:
            names = states.get(param.parameter, ())
            unclear = any(str(name) == "value" or str(name).startswith(("value.", prefix)) for name in names)
            if id(param.parameter) in beside.shared or unclear:
                return prefix
    return ""


def hold_optimizer(item: str, entry: object, *, job: JobView, identities: Identities, beside: StateOptimizers) -> HeldOptimizer:
    """What this rank holds of an entry with optimizers. `identities` knows all models of `state`; nothing is changed, and no
    step is run. The state dicts of optimizers that override them, or have hooks there, are called.

    Raises StructureConflict as `owned_parameters` does, ValueNotCarried with the place of what no checkpoint can hold.
    """
    parts = parts_of(item, entry, identities, elsewhere=beside.elsewhere(item))
    own = {path: state_dict_of(item, root) for path, root in elements(entry).items() if has_own_way(root)}
    prefixes = prefixes_of(parts)
    saver = StateColumns(item, job, state_prefix(item, parts, prefixes, beside))
    for part in parts:
        states, before = states_of(part.optimizer), prefixes[part.path].states
        for param in part.params:
            saver.add(param, states.get(param.parameter, {}), part, before)
    values: dict[str, Value] = {}
    for part in parts:
        if part.own_groups:
            saver.put_groups(part, prefixes[part.path].options)
        for key, value in states_of(part.optimizer).items():
            if not isinstance(key, torch.Tensor):
                place = place_of(item, "state", prefixes[part.path].values + require_text(item, key))
                values[place], held = hold_tree(item, value, place=place, job=job, identities=identities)
                saver.arrays.extend(held)
    if own:
        found = {path: entries_of(item, path, parts, own[path], identities) for path in own}
        values |= saver.entries(found, identities)
    saver.put_scalars()
    return HeldOptimizer(saver.table, _rows(parts, saver.rows), tuple(saver.arrays), values, saver.per_rank)


def entries_of(item: str, root_path: str, parts: Sequence[OptimizerPart], state_dict: object, identities: Identities) -> Beyond:
    """What the state dict of the root at `root_path` has beyond the entry's parts."""
    within = [part for part in parts if part.root_path == root_path]
    root = within[0].root
    states = (tensor for part in parts for tensor in tensors_in(dict(states_of(part.optimizer))))
    carried = CarriedTensors((*states, *(one.tensor for one in identities)))
    return beyond(item, within, state_dict, carried=carried, computed=DerivedEntries(lambda: state_dict_of(item, root)))


def _rows(parts: Sequence[OptimizerPart], rows: Mapping[TableName, int]) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for part in parts:
        groups: list[list[int]] = [[] for _ in groups_of(part.optimizer)]
        for param in part.params:
            groups[param.group].append(rows[param.name])
        for one in (part.optimizer, *part.delegates):
            if len(groups_of(one)) == len(groups):
                found[id(one)] = groups
    return found


# The lists of torch's schedulers that have an entry for each param group (format-v1, *Optimizer tables*).
_TORCH_GROUP_LISTS = frozenset(("_last_lr", "base_lrs", "base_momentums", "lr_lambdas", "max_lrs", "max_momentums", "min_lrs"))

GroupList = Callable[[str, Optimizer, Sequence[object]], bool]


def without_group_lists(scheduler: LRScheduler, state: Any, place: str, take: GroupList) -> dict[str, object]:
    """A scheduler's state with None where `take(place, optimizer, list)` has taken a list with an entry for each
    group.
    """
    if not isinstance(state, dict):
        raise ValueNotCarried(
            f"value {place}: the state of {type(scheduler).__name__} is a {type(state).__name__}, expected a dict"
        )
    nested = getattr(scheduler, "_schedulers", ())
    found: dict[str, object] = {}
    for key, value in state.items():
        where = f"{place}/{token(key)}"
        if key == "_schedulers" and isinstance(value, list) and len(value) == len(nested):
            pairs = enumerate(zip(nested, value, strict=True))
            found[key] = [without_group_lists(one, each, f"{where}/{k}", take) for k, (one, each) in pairs]
        elif _is_group_list(scheduler, key, value) and take(where, scheduler.optimizer, value):
            found[key] = None
        else:
            found[key] = value
    return found


def _is_group_list(scheduler: LRScheduler, key: str, value: object) -> bool:
    optimizer = getattr(scheduler, "optimizer", None)
    return (
        type(value) is list
        and (key in _TORCH_GROUP_LISTS or key in getattr(type(scheduler), "elastickpt_group_lists", ()))
        and isinstance(optimizer, Optimizer)
        and len(value) == len(optimizer.param_groups)
    )


LISTS = "@lists"  # /<scheduler>/@lists, a per-rank value: the lists that went to a table, whole, by place [UCF-153]


def scheduler_state(
    scheduler: LRScheduler, *, place: str, optimizers: Iterable[HeldOptimizer]
) -> tuple[dict[str, object], dict[str, Value]]:
    """A scheduler's state without its group lists, which go to the table of that of `optimizers` which has its optimizer; and
    these lists by place, as this rank has them.

    Raises ValueNotCarried with the place of what no checkpoint can hold.
    """

    def take(place: str, optimizer: Optimizer, entries: Sequence[object]) -> bool:
        held = next((one for one in optimizers if id(optimizer) in one.rows), None)
        if held is None:
            return False
        lists[place] = carried(list(entries), place)
        for index, (entry, rows) in enumerate(zip(entries, held.rows[id(optimizer)], strict=True)):
            held.table.put("schedule", place[1:], carried(entry, f"{place}/{index}"), rows=rows)
        return True

    lists: dict[str, Value] = {}
    return without_group_lists(scheduler, scheduler.state_dict(), place, take), lists
