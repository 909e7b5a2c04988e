"""Learning-rate schedulers taking what a checkpoint has; the reverse of `schedulers`.

A scheduler finds its lists again when the groups of its optimizer are cut otherwise, or differ between pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.format.encode_values import typed_key
from elastickpt.format.records import OptimizerTable
from elastickpt.format.tables import TableName
from elastickpt.training.binder import Binder
from elastickpt.training.groups import differ, option_lists
from elastickpt.training.optimizer_binding import BoundOptimizer
from elastickpt.training.optimizer_states import Disagreement, OneValue, TableView
from elastickpt.training.optimizers import LISTS, without_group_lists
from elastickpt.training.parameters import groups_of
from elastickpt.training.tree_binding import bind_tree
from elastickpt.training.values import carried, revived, token


def bind_scheduler(
    binder: Binder, item: str, scheduler: LRScheduler, *, place: str, optimizers: Sequence[BoundOptimizer]
) -> None:
    """Gives a scheduler its state, with its group lists put together for the groups that there are now."""
    binder.places.add(place)
    if place not in binder.listing.values:
        binder.missing(place, f"the state of a {type(scheduler).__name__}")
        return
    live: dict[str, Sequence[object]] = {}

    def take(where: str, optimizer: Optimizer, entries: Sequence[object]) -> bool:
        live[where] = entries
        return True

    masked, found = without_group_lists(scheduler, scheduler.state_dict(), place, take), binder.listing.values[place]
    lists = _group_lists(binder, place, scheduler, live, optimizers)
    _require_lengths(binder, live, dict(_lists(found, place)))
    tree: Any = bind_tree(binder, item, found, place=place, live=masked, instead=lists)
    binder.installs.append(lambda: scheduler.load_state_dict(tree))


def _group_lists(
    binder: Binder,
    place: str,
    scheduler: LRScheduler,
    live: Mapping[str, Sequence[object]],
    optimizers: Sequence[BoundOptimizer],
) -> dict[str, list[object]]:
    """The saved group lists of the scheduler at `place`, for the groups that its optimizer has now."""
    found: dict[str, list[object]] = {}
    for table in binder.listing.tables:
        keys = [field.key for field in table.fields if field.kind == "schedule" and f"/{field.key}".startswith(place + "/")]
        if not keys:
            continue
        bound = next((one for one in optimizers if one.item == table.item), None)
        if bound is None or bound.view is None:
            found |= _elsewhere(binder, place, scheduler, (table, keys), optimizers, live)
            continue
        part = bound.part_of(getattr(scheduler, "optimizer", None)) or bound.parts[0]
        names = bound.saved_groups(part)
        empty = [index for index, group in enumerate(groups_of(part.optimizer)) if not group["params"]]
        whole = _whole_lists(binder, place) if empty else None
        for at, key in ((f"/{key}", key) for key in keys):
            entries = option_lists(names, bound.view, key)
            saved = (whole or {}).get(at, ())
            for index in empty if len(saved) == len(entries) else ():
                entries[index] = OneValue(carried(saved[index], at))
            found[at] = _entries(binder, at, entries, live.get(at))
    return found


def _elsewhere(
    binder: Binder,
    place: str,
    scheduler: LRScheduler,
    saved: tuple[OptimizerTable, Sequence[str]],
    optimizers: Sequence[BoundOptimizer],
    live: Mapping[str, Sequence[object]],
) -> dict[str, list[object]]:
    """The lists of a scheduler, with these keys of a table, where the item of the table is not in `state`.

    By the names that models of `state` give the parameters of its optimizer; else, by the places of groups, as the rank of
    this number, or every rank, had them.
    """
    table, keys = saved
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        binder.differs(place, "value", expected="a scheduler without optimizer", found=f"one of {table.item!r}")
        return {}
    key = next((bound.item for bound in optimizers if bound.part_of(optimizer) is not None), None)
    where = "is not in `state`" if key is None else f"stands under {key!r} in `state`"
    note = f"{place}: its optimizer {where}: entries of its groups come from {table.item!r} in the checkpoint"
    view = TableView(table)
    named = [[_saved_name(binder, view, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    if all(name is not None for group in named for name in group):
        binder.note(f"{note}, by the names of their parameters")
        names = [[name for name in group if name is not None] for group in named]
        lists = {f"/{one}": option_lists(names, view, one) for one in keys}
        return {at: _entries(binder, at, entries, live.get(at)) for at, entries in lists.items()}
    whole = _whole_lists(binder, place)
    if whole is not None:
        binder.note(f"{note}, by the places of groups, as their parameters have no names here")
        return _fitted(binder, whole, len(named))
    binder.note(f"{note}: what all its parameters agree on, as they have no names here")
    everybody = [list(table.parameters) for _ in named]
    return {f"/{one}": _entries(binder, f"/{one}", option_lists(everybody, view, one), live.get(f"/{one}")) for one in keys}


def _whole_lists(binder: Binder, place: str) -> dict[str, list[object]] | None:
    """The lists of a scheduler as this rank, or every rank, had them; None where nobody, or not everybody, has the same."""
    agreed = binder.agreed_of_ranks(f"{place}/{LISTS}")
    if not agreed:
        return None
    lists: Any = revived(agreed[0])
    return {str(where): list(entries) for where, entries in lists.items()}


def _fitted(binder: Binder, lists: Mapping[str, list[object]], groups: int) -> dict[str, list[object]]:
    found = {}
    for at, entries in lists.items():
        same = len({typed_key(carried(entry, at)) for entry in entries}) == 1
        if len(entries) == groups or same:
            found[at] = entries if len(entries) == groups else entries[:1] * groups
        else:
            binder.differs(at, "value", expected=f"entries for {groups} groups", found=f"entries for {len(entries)}")
    return found


def _saved_name(binder: Binder, view: TableView, parameter: torch.Tensor) -> TableName | None:
    known = binder.identities.find(parameter)
    candidates = () if known is None else binder.names.candidates(known.item, known.name)
    return next((name for name in candidates if view.has(name)), None)


def _entries(
    binder: Binder, where: str, entries: Sequence[OneValue | Disagreement | None], live: Sequence[object] | None
) -> list[object]:
    made: list[object] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, OneValue):
            made.append(revived(entry.value))
        elif isinstance(entry, Disagreement):
            differ(binder, f"{where}/{index}", entry)
            made.append(None)
        elif live is not None:
            made.append(live[index])
            binder.note(f"{where}/{index} is not in the checkpoint for the parameters of its group: {live[index]!r} stays")
        else:
            binder.missing(f"{where}/{index}", "an entry for its group")
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


def _require_lengths(binder: Binder, expected: Mapping[str, Sequence[object]], found: Mapping[str, Sequence[object]]) -> None:
    """A list over groups that was saved whole, without its optimizer, must have an entry for each group."""
    for place, entries in found.items():
        if place in expected and len(entries) != len(expected[place]):
            binder.differs(
                place, "value", expected=f"entries for {len(expected[place])} groups", found=f"a list of {len(entries)}"
            )
