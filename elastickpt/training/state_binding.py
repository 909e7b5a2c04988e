"""The states of one parameter taking what a checkpoint has of them.

States that exist are filled where they are, whatever their device. States that do not exist yet are made: like the
parameter (same device, mesh and placements) where the shapes are equal, else whole. A 0-d `step` is made on the CPU, as
torch does, unless the group is `fused` or `capturable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from elastickpt.format.arrays import ArrayId
from elastickpt.format.tables import TableName
from elastickpt.format.values import ArrayReference, StateReference, Value
from elastickpt.training.anew import composite_state, fill_own, like_parameter, local_of, replicated_as, tensor_anew
from elastickpt.training.binder import Binder
from elastickpt.training.composites import Saved, is_composite, is_sparse
from elastickpt.training.dtensors import hold_for_loading, placed, placed_as
from elastickpt.training.elements import numpy_over
from elastickpt.training.groups import overwritten
from elastickpt.training.optimizer_columns import DTENSOR, IN_STATE_DICT, PART, PER_RANK, state_place
from elastickpt.training.optimizer_parts import Prefix
from elastickpt.training.optimizer_states import hold_state, local_scalar
from elastickpt.training.parameters import OwnedParameter
from elastickpt.training.tree_binding import bind_tree
from elastickpt.training.trees import holds_arrays, mapped, named_tuple_of, place_of, references
from elastickpt.training.values import revived, revived_leaf, shown

Composites = Mapping[str, tuple[ArrayId, Saved]]


@dataclass(frozen=True, slots=True, eq=False)
class StoredStates:
    """The arrays of one parameter that are states of one entry, without `prefix`, which stands before their names; and the
    composite tensors that some of them are parts of."""

    prefix: str
    arrays: Mapping[str, ArrayId]
    composites: Composites


@dataclass(frozen=True, slots=True, eq=False)
class SavedStates:
    """What a checkpoint has of one parameter `name` for one part of an optimizer, by the part's own keys.

    `stored` is what stands before names of arrays in the checkpoint, and `prefix` what stands before the part's keys. `own` are
    states of each rank's own, with what their field says. `referred` and `inner`, by their names without `stored`, are arrays
    and composite tensors that stand inside other states.
    """

    name: TableName
    stored: str
    prefix: Prefix
    arrays: Mapping[str, ArrayId]
    composites: Composites
    scalars: Mapping[str, Value]
    own: Mapping[str, Value]
    all_whereabouts: Mapping[str, Value]
    referred: Mapping[str, ArrayId]
    inner: Composites

    @classmethod
    def of(cls, name: TableName, prefix: Prefix, fields: Mapping[str, Value], stored: StoredStates) -> SavedStates:
        """From all that is stored of the parameter, and its fields `scalar`."""

        def mine(found: Mapping[str, Any]) -> dict[str, Any]:
            return {key: one for stored_key, one in found.items() if (key := prefix.strip(stored_key)) is not None}

        inside = {one.name for value in fields.values() for one in references(value) if isinstance(one, StateReference)}
        parts = {part for _, saved in stored.composites.values() for part in saved.parts.values()}
        arrays = {key: id_ for key, id_ in stored.arrays.items() if id_ not in parts}
        values = mine(fields)
        return cls(
            name,
            stored.prefix,
            prefix,
            mine({key: id_ for key, id_ in arrays.items() if key not in inside}),
            mine({key: one for key, one in stored.composites.items() if key not in inside}),
            {key: value for key, value in values.items() if not key.endswith((PER_RANK, IN_STATE_DICT, PART))},
            {key.removesuffix(PER_RANK): value for key, value in values.items() if key.endswith(PER_RANK)},
            {key.removesuffix(IN_STATE_DICT): value for key, value in values.items() if key.endswith(IN_STATE_DICT)},
            {key: id_ for key, id_ in arrays.items() if key in inside},
            {key: one for key, one in stored.composites.items() if key in inside},
        )

    def array(self, key: str) -> ArrayId:
        """The array of a state that has one."""
        return ArrayId("params", *self.name, self.stored + self.prefix.text + key)

    def only(self, whereabouts: Value | None) -> SavedStates:
        """Those that stand in the state dict in this way; None: those of the optimizer's own states."""
        kept = {key for key in self.all_keys() if self.all_whereabouts.get(key) == whereabouts}
        return replace(
            self,
            arrays={key: id_ for key, id_ in self.arrays.items() if key in kept},
            composites={key: one for key, one in self.composites.items() if key in kept},
            scalars={key: value for key, value in self.scalars.items() if key in kept},
            own={key: value for key, value in self.own.items() if key in kept},
        )

    def all_keys(self) -> tuple[str, ...]:
        """All states."""
        return (*self.scalars, *self.arrays, *self.composites, *sorted(self.own))


class ParameterStates:
    """The states of one parameter in `store`: what is live, what is saved, and what becomes of each.

    `store` is the state of an optimizer, or a dict for what goes to its own `load_state_dict`.
    """

    def __init__(
        self,
        binder: Binder,
        item: str,
        param: OwnedParameter,
        saved: SavedStates,
        store: dict[Any, Any],
        group: Mapping[str, object],
    ) -> None:
        self._binder = binder
        self._member = param
        self._item = item
        self._store = store
        self._group = group
        self._saved = saved
        self._arrays, self._own, self._scalars = saved.arrays, saved.own, saved.scalars
        self._composites, self._referred, self._inner = saved.composites, saved.referred, saved.inner

    def bind(self) -> None:
        live: Mapping[str, Any] = self._store.get(self._member.parameter, {})
        if live and not self._saved.all_keys():
            # saved before this parameter's first step: it has no state then, as in the run that is resumed
            self._binder.note(f"{place_of(self._item)}: parameters had no state when they were saved, and have none now")
            self._binder.installs.append(partial(self._store.pop, self._member.parameter, None))
            return
        for key, entry in live.items():
            if not isinstance(entry, torch.Tensor) or (is_sparse(entry) and key in self._composites):
                self._replace(key, entry)
            elif entry.ndim == 0 and not is_composite(entry):
                self._fill_scalar(key, entry)
            else:
                self._fill_tensor(key, entry)
        self.create(live)

    def create(self, live: Mapping[str, Any]) -> None:
        """Makes all states that are not `live`."""
        for key in self._saved.all_keys():
            if key not in live:
                self._create(key, None)

    def _replace(self, key: str, entry: object) -> None:
        if key in self._scalars or key in self._arrays or key in self._composites or key in self._own:
            self._create(key, entry)
        elif entry is not None:
            self._binder.missing(self._where(key), shown(entry))

    def _fill_scalar(self, key: str, entry: torch.Tensor) -> None:
        where, found = self._where(key), self._scalars.get(key)
        if key not in self._scalars:
            self._absent(key, entry)
            return
        local = local_scalar(entry)
        if step := overwritten(self._binder, local, found, where):
            self._binder.installs.append(step)

    def _fill_tensor(self, key: str, entry: torch.Tensor) -> None:
        id_ = self._saved.array(key)
        held = hold_state(id_, entry, param=self._member, job=self._binder.job)
        if key in self._own and (held is None or self._own[key] == DTENSOR):
            self._fill_own(key, entry)
            return
        if held is None and key in self._composites and is_composite(local_of(entry)):
            held = hold_for_loading(id_, entry, job=self._binder.job)
        if key in self._own or key in self._scalars or (held is None and key not in self._arrays):
            self._absent(key, entry)
        elif held is None:
            expected = f"{tuple(entry.shape)} on each rank"
            self._binder.differs(
                self._where(key), "shape", expected=expected, found=str(self._binder.listing.arrays[id_].shape)
            )
        else:
            for one in held:
                self._binder.fill(one)
            self._know(key)

    def _fill_own(self, key: str, entry: torch.Tensor) -> None:
        value, local = self._own_value(key), local_of(entry)
        if isinstance(value, ArrayReference):
            fill_own(self._binder, value, local, where=self._where(key))
        elif value is not None and (step := overwritten(self._binder, local, value, self._where(key))):
            self._binder.installs.append(step)

    def _absent(self, key: str, entry: torch.Tensor) -> None:
        """A live tensor whose like is not in the checkpoint."""
        where = self._where(key)
        if key in self._arrays:
            found = str(self._binder.listing.arrays[self._arrays[key]].shape)
            self._know(key)
            self._binder.differs(where, "shape", expected=str(tuple(entry.shape)), found=found)
        elif key in self._composites:
            self._know(key)
            self._binder.differs(where, "value", expected=shown(entry), found=self._composites[key][1].text)
        elif key in self._own:
            self._binder.differs(where, "value", expected=shown(entry), found="each rank's own, which has no place in a whole")
        elif key in self._scalars:
            self._know(key)
            self._binder.differs(where, "value", expected=shown(entry), found=shown(self._scalars[key]))
        else:
            self._binder.missing(where, shown(entry))

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
        self._binder.know(id_)
        made = like_parameter(self._binder, self._member, id_)
        held = hold_state(id_, made, param=self._member, job=self._binder.job)
        for one in held or ():
            self._binder.fill(one)
        return made

    def _composite_anew(self, key: str, id_: ArrayId, saved: Saved) -> torch.Tensor | None:
        return composite_state(self._binder, self._member, id_, saved)

    def _create_own(self, key: str) -> None:
        value, parts = self._own_value(key), placed(self._member.parameter)
        if value is None:
            return
        device = self._member.parameter.device
        tree = bind_tree(self._binder, self._item, value, place=self._where(key), live=None, device=device)
        if self._own[key] == DTENSOR and parts is not None and isinstance(tree, torch.Tensor):
            tree = placed_as(parts, tree)
        self._attach(key, tree)

    def _own_value(self, key: str) -> Value:
        """This rank's own state, on the layout that saved it."""
        if not self._binder.listing.same_layout:
            self._binder.differs(
                self._where(key),
                "value",
                expected="the layout that saved it",
                found="each rank's own tensor, which has no place in the whole parameter: it cannot be resharded",
            )
            return None
        place = state_place(self._item, self._saved.name, self._saved.prefix.text + key)
        value = self._binder.of_writer(self._binder.job.rank).get(place)
        if value is None:
            self._binder.missing(place, "this rank's own state")
        return value

    def _revived(self, key: str, value: Value, live: object) -> object:
        group, parameter = self._group, self._member.parameter
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
            self._binder.missing(where, "an array")
            return None
        if one.origin == "numpy":
            self._binder.know(self._referred[one.name])
            return numpy_over(tensor_anew(self._binder, self._referred[one.name], device="cpu"))[()]
        return self._array_anew(one.name, self._referred[one.name])

    def _attach(self, key: str, entry: object) -> None:
        store, parameter = self._store, self._member.parameter
        self._binder.installs.append(lambda: store.setdefault(parameter, {}).__setitem__(key, entry))

    def _where(self, key: str) -> str:
        return state_place(self._item, self._member.name, self._saved.prefix.text + key)

    def _know(self, key: str) -> None:
        if key in self._arrays:
            self._binder.know(self._arrays[key])
        for saved in (self._composites[key][1],) if key in self._composites else ():
            self._binder.arrays.update(saved.parts.values())
        for one in references(self._scalars.get(key)):
            if isinstance(one, StateReference):
                self._binder.arrays.update(self._inner[one.name][1].parts.values() if one.name in self._inner else ())
                self._binder.arrays.update((self._referred[one.name],) if one.name in self._referred else ())
