"""Optimizers taking a checkpoint's states and groups; the reverse of `optimizers`.

States that exist are filled where they are, whatever their device. States that do not exist yet are made: like the
parameter (same device, mesh and placements) where the shapes are equal, else whole. A 0-d `step` is made on the CPU, as
torch does, unless the group is `fused` or `capturable`. `optimizer.step()` is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from elastickpt.format.arrays import ArrayId
from elastickpt.format.values import ArrayReference, StateReference, Value
from elastickpt.training.anew import tensor_anew
from elastickpt.training.composites import Saved, is_composite, is_sparse
from elastickpt.training.draft import Draft
from elastickpt.training.dtensors import hold_for_loading, placed, placed_as
from elastickpt.training.groups import bind_groups, overwritten
from elastickpt.training.members import Member, members_of, states_of
from elastickpt.training.memory import numpy_over
from elastickpt.training.optimizers import (
    DTENSOR,
    PER_RANK,
    hold_state,
    local_scalar,
    state_place,
)
from elastickpt.training.state_anew import composite_state, fill_own, like_parameter, local_of, replicated_as
from elastickpt.training.stateful import bind_tree
from elastickpt.training.tables import Name, TableView
from elastickpt.training.trees import holds_arrays, mapped, named_tuple_of, place_of, references
from elastickpt.training.values import revived, revived_leaf, shown


class BoundOptimizer:
    """One optimizer of `state` and the table that the checkpoint has for it (None when it has none)."""

    def __init__(self, draft: Draft, item: str, optimizer: Optimizer) -> None:
        self.item = item
        self.optimizer = optimizer
        self.members = members_of(item, optimizer, draft.identities)
        self.view = next((TableView(table) for table in draft.listing.tables if table.item == item), None)
        self._draft = draft
        self._owners = sorted((table.item for table in draft.listing.tables), key=len, reverse=True)

    def saved_name(self, member: Member) -> Name | None:
        """The name, its own or a tied one, under which the checkpoint's table has this parameter."""
        names = self._draft.names.candidates(*member.name)
        return next((name for name in names if self.view is not None and self.view.has(name)), None)

    def saved_groups(self) -> list[list[Name]]:
        """For each live group, the names of its parameters in the checkpoint's table."""
        found: list[list[Name]] = [[] for _ in self.optimizer.param_groups]
        for member in self.members:
            if (name := self.saved_name(member)) is not None:
                found[member.group].append(name)
        return found

    def saved_arrays(self, name: Name) -> tuple[str, dict[str, ArrayId]]:
        """What stands before its states' names in the checkpoint, and the array of each state of this optimizer."""
        prefix, found = "", {}
        for stored in self._draft.names.states.get(name, ()):
            owner = next((item for item in self._owners if stored.startswith(f"{item}.")), None)
            if stored == "value" or stored.startswith("value.") or owner not in (None, self.item):
                continue
            if owner is not None:
                prefix = f"{owner}."
            found[stored.removeprefix(f"{self.item}.")] = ArrayId("params", *name, stored)
        return prefix, found

    def saved_composites(self, name: Name, prefix: str) -> dict[str, tuple[ArrayId, Saved]]:
        """The composite states of a parameter: what a plain tensor's id would be, and what they are made of."""
        return {
            id_.state.removeprefix(prefix): (id_, saved)
            for id_, saved in self._draft.listing.composites.items()
            if (id_.section, id_.item, id_.name) == ("params", *name) and id_.state != "value" and id_.state.startswith(prefix)
        }


def bind_optimizer(draft: Draft, item: str, optimizer: Optimizer) -> BoundOptimizer:
    """Binds states, groups and values of one optimizer. Raises StructureConflict as saving it would."""
    place = place_of(item)
    draft.places.add(place)
    bound = BoundOptimizer(draft, item, optimizer)
    if bound.view is None:
        draft.missing(place, f"the state of {type(optimizer).__name__} over {len(bound.members)} parameters")
        return bound
    saved, now = next((one.type for one in draft.listing.items if one.name == item), ""), type(optimizer).__name__
    if saved not in ("", now):
        draft.note(
            f"{place}: saved by {saved}, now a {now}, which gets the states of the other: it may know them by other names"
        )
    for member in bound.members:
        name = bound.saved_name(member)
        if name is None:
            draft.missing(place + place_of("state", *member.name), "a parameter of this optimizer")
        else:
            _States(draft, bound, member, name).bind()
    groups = zip(optimizer.param_groups, bound.saved_groups(), strict=True)
    bind_groups(draft, item, bound.view, groups)
    _bind_values(draft, item, optimizer)
    return bound


class _States:
    """The states of one parameter: what is live, what is saved, and what becomes of each."""

    def __init__(self, draft: Draft, bound: BoundOptimizer, member: Member, name: Name) -> None:
        self._draft = draft
        self._member = member
        self._item = bound.item
        self._optimizer = bound.optimizer
        self._prefix, arrays = bound.saved_arrays(name)
        self._name = name
        self._composites = bound.saved_composites(name, self._prefix)
        fields = {} if bound.view is None else bound.view.of("scalar", name)
        self._own = {key.removesuffix(PER_RANK): value for key, value in fields.items() if key.endswith(PER_RANK)}
        self._scalars = {key: value for key, value in fields.items() if not key.endswith(PER_RANK)}
        inner = {one.name for value in self._scalars.values() for one in references(value) if isinstance(one, StateReference)}
        parts = {part for _, saved in self._composites.values() for part in saved.parts.values()}
        self._referred = {key: id_ for key, id_ in arrays.items() if key in inner}
        self._inner = {key: found for key, found in self._composites.items() if key in inner}
        self._arrays = {key: id_ for key, id_ in arrays.items() if key not in inner and id_ not in parts}
        self._composites = {key: found for key, found in self._composites.items() if key not in inner}

    def bind(self) -> None:
        live: Mapping[str, Any] = self._optimizer.state.get(self._member.parameter, {})
        saved = (*self._scalars, *self._arrays, *self._composites, *sorted(self._own))
        if live and not saved:
            # saved before this parameter's first step: it has no state then, as in the run that is resumed
            self._draft.note(f"{place_of(self._item)}: parameters had no state when they were saved, and have none now")
            self._draft.installs.append(partial(self._optimizer.state.pop, self._member.parameter, None))
            return
        for key, entry in live.items():
            if not isinstance(entry, torch.Tensor) or (is_sparse(entry) and key in self._composites):
                self._replace(key, entry)
            elif entry.ndim == 0 and not is_composite(entry):
                self._fill_scalar(key, entry)
            else:
                self._fill_tensor(key, entry)
        for key in saved:
            if key not in live:
                self._create(key, None)

    def _replace(self, key: str, entry: object) -> None:
        if key in self._scalars or key in self._arrays or key in self._composites or key in self._own:
            self._create(key, entry)
        elif entry is not None:
            self._draft.missing(self._where(key), shown(entry))

    def _fill_scalar(self, key: str, entry: torch.Tensor) -> None:
        where, found = self._where(key), self._scalars.get(key)
        if key not in self._scalars:
            self._absent(key, entry)
            return
        local = local_scalar(entry)
        if step := overwritten(self._draft, local, found, where):
            self._draft.installs.append(step)

    def _fill_tensor(self, key: str, entry: torch.Tensor) -> None:
        id_ = ArrayId("params", *self._name, self._prefix + key)
        held = hold_state(id_, entry, member=self._member, job=self._draft.job)
        if key in self._own and (held is None or self._own[key] == DTENSOR):
            self._fill_own(key, entry)
            return
        if held is None and key in self._composites and is_composite(local_of(entry)):
            held = hold_for_loading(id_, entry, job=self._draft.job)
        if key in self._own or key in self._scalars or (held is None and key not in self._arrays):
            self._absent(key, entry)
        elif held is None:
            expected = f"{tuple(entry.shape)} on each rank"
            self._draft.differs(self._where(key), "shape", expected=expected, found=str(self._draft.listing.arrays[id_].shape))
        else:
            for one in held:
                self._draft.fill(one)
            self._know(key)

    def _fill_own(self, key: str, entry: torch.Tensor) -> None:
        value, local = self._own_value(key), local_of(entry)
        if isinstance(value, ArrayReference):
            fill_own(self._draft, value, local, where=self._where(key))
        elif value is not None and (step := overwritten(self._draft, local, value, self._where(key))):
            self._draft.installs.append(step)

    def _absent(self, key: str, entry: torch.Tensor) -> None:
        """A live tensor whose like is not in the checkpoint."""
        where = self._where(key)
        if key in self._arrays:
            found = str(self._draft.listing.arrays[self._arrays[key]].shape)
            self._know(key)
            self._draft.differs(where, "shape", expected=str(tuple(entry.shape)), found=found)
        elif key in self._composites:
            self._know(key)
            self._draft.differs(where, "value", expected=shown(entry), found=self._composites[key][1].text)
        elif key in self._own:
            self._draft.differs(where, "value", expected=shown(entry), found="each rank's own, which has no place in a whole")
        elif key in self._scalars:
            self._know(key)
            self._draft.differs(where, "value", expected=shown(entry), found=shown(self._scalars[key]))
        else:
            self._draft.missing(where, shown(entry))

    def _create(self, key: str, live: object) -> None:
        if key in self._arrays:
            self._attach(key, self._array_anew(key, self._arrays[key]))
        elif key in self._composites:
            made = self._composite_anew(key, *self._composites[key])
            if made is not None:
                self._attach(key, made)
        elif key in self._own:
            self._create_own(key)
        else:
            self._attach(key, self._revived(key, self._scalars[key], live))

    def _array_anew(self, key: str, id_: ArrayId) -> torch.Tensor:
        self._draft.know(id_)
        made = like_parameter(self._draft, self._member, id_)
        held = hold_state(id_, made, member=self._member, job=self._draft.job)
        for one in held or ():
            self._draft.fill(one)
        return made

    def _composite_anew(self, key: str, id_: ArrayId, saved: Saved) -> torch.Tensor | None:
        return composite_state(self._draft, self._member, id_, saved)

    def _create_own(self, key: str) -> None:
        value, parts = self._own_value(key), placed(self._member.parameter)
        if value is None:
            return
        device = self._member.parameter.device
        tree = bind_tree(self._draft, self._item, value, place=self._where(key), live=None, device=device)
        if self._own[key] == DTENSOR and parts is not None and isinstance(tree, torch.Tensor):
            tree = placed_as(parts, tree)
        self._attach(key, tree)

    def _own_value(self, key: str) -> Value:
        """This rank's own state, on the layout that saved it."""
        if not self._draft.listing.same_layout:
            self._draft.differs(
                self._where(key),
                "value",
                expected="the layout that saved it",
                found="each rank's own tensor, which has no place in the whole parameter: it cannot be resharded",
            )
            return None
        place = state_place(self._item, self._name, key)
        value = self._draft.of_writer(self._draft.job.rank).get(place)
        if value is None:
            self._draft.missing(place, "this rank's own state")
        return value

    def _revived(self, key: str, value: Value, live: object) -> object:
        group = self._optimizer.param_groups[self._member.group]
        parameter = self._member.parameter
        on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
        if holds_arrays(value):
            return mapped(value, self._where(key), self._inner_leaf, named_tuple_of)
        made = revived(value, device="cpu" if on_cpu else parameter.device, place=self._where(key))
        if isinstance(made, torch.Tensor) and parameter.ndim == made.ndim == 0 and key != "step":
            return replicated_as(parameter, made)
        return made

    def _inner_leaf(self, one: object, where: str) -> object:
        """What stands inside a state that is no tensor."""
        if not isinstance(one, StateReference):
            return revived_leaf(one, self._member.parameter.device)
        if one.name in self._inner:
            return self._composite_anew(one.name, *self._inner[one.name])
        if one.name not in self._referred:
            self._draft.missing(where, "an array")
            return None
        if one.origin == "numpy":
            self._draft.know(self._referred[one.name])
            return numpy_over(tensor_anew(self._draft, self._referred[one.name], device="cpu"))[()]
        return self._array_anew(one.name, self._referred[one.name])

    def _attach(self, key: str, entry: object) -> None:
        optimizer, parameter = self._optimizer, self._member.parameter
        self._draft.installs.append(lambda: optimizer.state[parameter].__setitem__(key, entry))

    def _where(self, key: str) -> str:
        return state_place(self._item, self._member.name, key)

    def _know(self, key: str) -> None:
        if key in self._arrays:
            self._draft.know(self._arrays[key])
        for saved in (self._composites[key][1],) if key in self._composites else ():
            self._draft.arrays.update(saved.parts.values())
        for one in references(self._scalars.get(key)):
            if isinstance(one, StateReference):
                self._draft.arrays.update(self._inner[one.name][1].parts.values() if one.name in self._inner else ())
                self._draft.arrays.update((self._referred[one.name],) if one.name in self._referred else ())


def _bind_values(draft: Draft, item: str, optimizer: Optimizer) -> None:
    """State that belongs to no parameter."""
    below = place_of(item, "state") + "/"
    saved = {place: value for place, value in draft.listing.values.items() if place.startswith(below)}
    states = states_of(optimizer)
    live = {place_of(item, "state", key): key for key in states if isinstance(key, str)}
    for place, key in live.items():
        if place not in saved:
            draft.missing(place, shown(states[key]))
    for place, value in saved.items():
        draft.places.add(place)
        key = live.get(place, place[len(below) :].replace("~1", "/").replace("~0", "~"))
        tree = bind_tree(draft, item, value, place=place, live=states.get(key))
        draft.installs.append(lambda key=key, tree=tree: states.__setitem__(key, tree))  # type: ignore[misc]
