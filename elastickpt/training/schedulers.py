"""Learning-rate schedulers: their state dict, but lists with an entry for each param group go to the optimizer's table.

    state_dict()["base_lrs"]               (an entry for each group)  -> field `schedule` "<item>/base_lrs"
    state_dict()["_schedulers"][1]["..."]  (SequentialLR)             -> field `schedule` "<item>/_schedulers/1/..."
    everything else                                                   -> the item's value tree, None for such a list

So a scheduler finds its lists again when the groups of its optimizer are cut otherwise, or differ between pipeline
stages. If its optimizer is not in `state`, the lists are carried whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.errors import ValueNotCarried
from elastickpt.format.values import Value
from elastickpt.training.draft import Draft
from elastickpt.training.dtensors import Job
from elastickpt.training.groups import differ, option_lists
from elastickpt.training.held import HeldArray
from elastickpt.training.identities import Identities
from elastickpt.training.optimizer_binding import BoundOptimizer
from elastickpt.training.optimizers import HeldOptimizer
from elastickpt.training.stateful import bind_tree, hold_tree
from elastickpt.training.tables import Agreed, Disagreement
from elastickpt.training.values import carried, place_of, revived, token

# Lists of torch's schedulers whose length has nothing to do with groups, though it may be the same number.
_OTHER_LISTS = frozenset(("milestones", "_milestones", "_schedule_phases"))

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
        and key not in _OTHER_LISTS
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

    state, found = scheduler.state_dict(), draft.listing.values[place]
    masked = _masked(scheduler, state, place, take)
    lists = _group_lists(draft, place, live, optimizers)
    _require_lengths(draft, dict(_lists(state, place)), lists)
    _require_lengths(draft, live, dict(_lists(found, place)))
    tree: Any = bind_tree(draft, item, found, place=place, live=masked, instead=lists)
    draft.installs.append(lambda: scheduler.load_state_dict(tree))


def _group_lists(
    draft: Draft, place: str, live: Mapping[str, Sequence[object]], optimizers: Sequence[BoundOptimizer]
) -> dict[str, list[object]]:
    """The saved group lists of the scheduler at `place`, for the groups of the optimizers that had them."""
    by_item = {bound.item: bound for bound in optimizers}
    found: dict[str, list[object]] = {}
    for table in draft.listing.tables:
        keys = [field.key for field in table.fields if field.kind == "schedule" and f"/{field.key}".startswith(place + "/")]
        bound = by_item.get(table.item)
        if not keys:
            continue
        if bound is None or bound.view is None:
            draft.differs(place, "value", expected="a scheduler without optimizer in `state`", found=f"one of {table.item!r}")
            continue
        for key in keys:
            entries = option_lists(bound.saved_groups(), bound.view, key)
            found[f"/{key}"] = _entries(draft, f"/{key}", entries, live.get(f"/{key}"))
    return found


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
    """A list that goes by groups on one side only has the same length on both by chance, or not at all."""
    for place, entries in found.items():
        if place in expected and len(entries) != len(expected[place]):
            draft.differs(
                place, "value", expected=f"a list of {len(expected[place])}", found=f"entries for {len(entries)} groups"
            )
