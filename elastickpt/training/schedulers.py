"""Learning-rate schedulers: their state dict, but lists with an entry for each param group go to the optimizer's table.

    state_dict()["base_lrs"]               (an entry for each group)  -> field `schedule` "<item>/base_lrs"
    state_dict()["_schedulers"][1]["..."]  (SequentialLR)             -> field `schedule` "<item>/_schedulers/1/..."
    everything else                                                   -> the item's value tree, None for such a list

So a scheduler finds its lists again when the groups of its optimizer are cut otherwise, or differ between pipeline
stages. A list goes by groups if its name says so: torch's own are known, a class of its own names its lists in
`elastickpt_group_lists`. Every other list is a plain value, whatever its length. [UCF-89] If its optimizer is not in
`state`, a scheduler's lists are carried whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import ValueNotCarried
from elastickpt.format.records import OptimizerTable
from elastickpt.format.values import Value
from elastickpt.training.draft import Draft
from elastickpt.training.dtensors import Job
from elastickpt.training.groups import differ, option_lists
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.optimizer_binding import BoundOptimizer
from elastickpt.training.optimizers import HeldOptimizer
from elastickpt.training.stateful import bind_tree, hold_tree
from elastickpt.training.tables import Agreed, Disagreement, Name, TableView
from elastickpt.training.values import carried, place_of, revived, token

# The lists of torch's schedulers that have an entry for each param group (format-v1, *Optimizer tables*).
_TORCH_GROUP_LISTS = frozenset(("_last_lr", "base_lrs", "base_momentums", "lr_lambdas", "max_lrs", "max_momentums", "min_lrs"))

GroupList = Callable[[str, Optimizer, Sequence[object]], bool]


def _masked(scheduler: LRScheduler, state: Any, place: str, take: GroupList) -> dict[str, object]:
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
            found[key] = [_masked(one, each, f"{where}/{k}", take) for k, (one, each) in pairs]
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


def hold_scheduler(
    item: str, scheduler: LRScheduler, *, optimizers: Mapping[int, HeldOptimizer], job: Job, identities: Identities
) -> tuple[Value, tuple[HeldArray, ...]]:
    """The value tree and tensors of a scheduler; its group lists go to the tables of `optimizers`, by id of the
    optimizer.

    Raises ValueNotCarried with the place of what no checkpoint can hold.
    """

    def take(place: str, optimizer: Optimizer, entries: Sequence[object]) -> bool:
        held = optimizers.get(id(optimizer))
        if held is None:
            return False
        for index, entry in enumerate(entries):
            rows = [row for row, member in enumerate(held.members) if member.group == index]
            held.table.put("schedule", place[1:], carried(entry, f"{place}/{index}"), rows=rows)
        return True

    place = place_of(item)
    masked = _masked(scheduler, scheduler.state_dict(), place, take)
    return hold_tree(item, masked, place=place, job=job, identities=identities)


def bind_scheduler(draft: Draft, item: str, scheduler: LRScheduler, *, optimizers: Sequence[BoundOptimizer]) -> None:
    """Gives a scheduler its state, with its group lists put together for the groups that there are now."""
    place = place_of(item)
    draft.places.add(place)
    if place not in draft.listing.values:
        draft.missing(place, f"the state of a {type(scheduler).__name__}")
        return
    live: dict[str, Sequence[object]] = {}

    def take(where: str, optimizer: Optimizer, entries: Sequence[object]) -> bool:
        live[where] = entries
        return True

    masked, found = _masked(scheduler, scheduler.state_dict(), place, take), draft.listing.values[place]
    lists = _group_lists(draft, place, scheduler, live, optimizers)
    _require_lengths(draft, live, dict(_lists(found, place)))
    tree: Any = bind_tree(draft, item, found, place=place, live=masked, instead=lists)
    draft.installs.append(lambda: scheduler.load_state_dict(tree))


def _group_lists(
    draft: Draft,
    place: str,
    scheduler: LRScheduler,
    live: Mapping[str, Sequence[object]],
    optimizers: Sequence[BoundOptimizer],
) -> dict[str, list[object]]:
    """The saved group lists of the scheduler at `place`, for the groups that its optimizer has now."""
    found: dict[str, list[object]] = {}
    for table in draft.listing.tables:
        keys = [field.key for field in table.fields if field.kind == "schedule" and f"/{field.key}".startswith(place + "/")]
        if not keys:
            continue
        bound = next((one for one in optimizers if one.item == table.item), None)
        view = TableView(table)
        if bound is None or bound.view is None:
            names = _names_elsewhere(draft, place, scheduler, table, optimizers)
        else:
            names = bound.saved_groups()
        if names is None:
            draft.differs(place, "value", expected="a scheduler without optimizer", found=f"one of {table.item!r}")
            continue
        for key in keys:
            entries = option_lists(names, view, key)
            found[f"/{key}"] = _entries(draft, f"/{key}", entries, live.get(f"/{key}"))
    return found


def _names_elsewhere(
    draft: Draft, place: str, scheduler: LRScheduler, table: OptimizerTable, optimizers: Sequence[BoundOptimizer]
) -> list[list[Name]] | None:
    """For each group of the scheduler's optimizer, the saved names of its parameters, where the item of `table` is not
    in `state`: by the names that models of `state` give them, else by their place among all parameters; where these are
    of another number, every group stands for all. None for a scheduler without optimizer.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        return None
    groups = [list(group["params"]) for group in optimizer.param_groups]
    view = TableView(table)
    named = [[_saved_name(draft, view, parameter) for parameter in group] for group in groups]
    key = next((bound.item for bound in optimizers if bound.optimizer is optimizer), None)
    where = "is not in `state`" if key is None else f"stands under {key!r} in `state`"
    saved = f"its optimizer {where}: entries of its groups come from {table.item!r} in the checkpoint"
    if all(name is not None for group in named for name in group):
        draft.note(f"{place}: {saved}, by the names of their parameters")
        return [[name for name in group if name is not None] for group in named]
    if sum(map(len, groups)) != len(table.parameters):
        draft.note(f"{place}: {saved}, which has {len(table.parameters)} parameters: what all of them agree on")
        return [list(table.parameters) for _ in groups]
    draft.note(f"{place}: {saved}, by the places of their parameters, which have no names here")
    rows = iter(table.parameters)
    return [[next(rows) for _ in group] for group in groups]


def _saved_name(draft: Draft, view: TableView, parameter: torch.Tensor) -> Name | None:
    known = draft.identities.find(parameter)
    candidates = () if known is None else draft.names.candidates(known.item, known.name)
    return next((name for name in candidates if view.has(name)), None)


def _entries(
    draft: Draft, where: str, entries: Sequence[Agreed | Disagreement | None], live: Sequence[object] | None
) -> list[object]:
    made: list[object] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Agreed):
            made.append(revived(entry.value))
        elif isinstance(entry, Disagreement):
            differ(draft, f"{where}/{index}", entry)
            made.append(None)
        elif live is not None:
            made.append(live[index])
            draft.note(f"{where}/{index} is not in the checkpoint for the parameters of its group: {live[index]!r} stays")
        else:
            draft.missing(f"{where}/{index}", "an entry for its group")
            made.append(None)
    return made


def _lists(value: object, place: str) -> Iterator[tuple[str, list[object]]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _lists(one, f"{place}/{token(key)}")
    elif isinstance(value, list):
        yield place, value
        for index, one in enumerate(value):
            yield from _lists(one, f"{place}/{index}")


def _require_lengths(draft: Draft, expected: Mapping[str, Sequence[object]], found: Mapping[str, Sequence[object]]) -> None:
    """A list over groups that was saved whole, without its optimizer, must have an entry for each group."""
    for place, entries in found.items():
        if place in expected and len(entries) != len(expected[place]):
            draft.differs(
                place, "value", expected=f"entries for {len(expected[place])} groups", found=f"a list of {len(entries)}"
            )
