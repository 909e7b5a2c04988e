"""States of many parameters taking what a checkpoint has of them, in columns: the usual case of `state_binding`.

    parameter   live                      in the checkpoint          bound here if
    weight      exp_avg, exp_avg_sq       arrays of these names      each lies as its parameter, and has the
                                                                     saved shape and element type
                step                      a field of the table       both are numbers of one element type

What a parameter's states are called, and which of them are arrays, is looked at once for all that are alike in it. Where there
is anything more to say of a parameter (another set of states, a tie, a difference) nothing of it is bound here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastickpt.format.arrays import Box
from elastickpt.format.records import Field
from elastickpt.format.tables import TableName
from elastickpt.format.values import ArrayValue
from elastickpt.training.binder import Binder
from elastickpt.training.dtensors import DTENSOR
from elastickpt.training.elements import PLAIN, dtype_name, lie_in_order, lie_plainly, loaded_type
from elastickpt.training.held import HeldArray
from elastickpt.training.optimizer_columns import IN_STATE_DICT, PART, PER_RANK
from elastickpt.training.optimizer_parts import OptimizerPart
from elastickpt.training.optimizer_states import TableView, beside
from elastickpt.training.parameters import Lying, OwnedParameter, states_of
from elastickpt.training.values import tensor_of


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """States of the same names: those that are arrays, and the fields of the others."""

    arrays: tuple[str, ...]
    numbers: tuple[Field, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Fitting:
    """A parameter whose states fit: the places of their arrays, their local tensors, and numbers with what each becomes."""

    param: OwnedParameter
    lying: Lying
    places: list[int]
    tensors: list[torch.Tensor]
    numbers: list[tuple[torch.Tensor, ArrayValue]]


def bind_alike(
    binder: Binder, view: TableView, part: OptimizerPart, *, alone: Collection[int], items: Collection[str]
) -> list[OwnedParameter]:
    """Binds the states of those parameters of a part of which nothing more is to be said, and gives the others.

    `alone` are ids of parameters that no other part has; `items` those of the checkpoint that have tables.
    """
    if not len(binder.listing.columns) or binder.listing.composites:
        return list(part.params)
    states, kinds, rest, fitting = states_of(part.optimizer), _Kinds(view, items), list[OwnedParameter](), list[_Fitting]()
    for param in part.params:
        live = states.get(param.parameter)
        found = None
        if type(live) is dict and id(param.parameter) in alone and not binder.names.has_other(*param.name):
            kind = kinds.of(param.name, binder.names.states.get(param.name, ()), tuple(live))
            found = None if kind is None else _fitting(binder, view, param, live, kind)
        if found is None:
            rest.append(param)
        else:
            fitting.append(found)
    if not lie_plainly([tensor for one in fitting for tensor in one.tensors]):
        fits = [lie_plainly(one.tensors) for one in fitting]
        left = {id(one.param) for one, fit in zip(fitting, fits, strict=True) if not fit} | {id(param) for param in rest}
        rest = [param for param in part.params if id(param) in left]
        fitting = [one for one, fit in zip(fitting, fits, strict=True) if fit]
    _bind(binder, fitting)
    return rest


def _bind(binder: Binder, fitting: Sequence[_Fitting]) -> None:
    columns = fitting
    if not lie_in_order([tensor for one in fitting for tensor in one.tensors]):
        columns = [one for one in fitting if lie_in_order(one.tensors)]
        alone = [one for one in fitting if not lie_in_order(one.tensors)]
        binder.fill_all([held for one in alone for held in _held(binder, one)])
    boxes: list[Box] = [one.lying.box for one in columns for _ in one.places]
    like = [one.lying.held for one in columns for _ in one.places]
    places = [place for one in columns for place in one.places]
    binder.fill_places(places, boxes, [tensor for one in columns for tensor in one.tensors], like)
    numbers = [number for one in fitting for number in one.numbers]
    made = {id(value): tensor_of(value) for _, value in numbers}  # one object for all parameters that have this value

    def fill() -> None:
        with torch.no_grad():
            for live, value in numbers:
                live.detach().copy_(made[id(value)])

    if numbers:
        binder.installs.append(fill)


def _held(binder: Binder, one: _Fitting) -> Iterator[HeldArray]:
    """The arrays of states on a device, or with gaps."""
    for place, tensor in zip(one.places, one.tensors, strict=True):
        id_, lying = binder.listing.columns.id(place), one.lying
        yield beside(id_, tensor, lying.held, box=lying.box, shape=lying.shape)


class _Kinds:
    """Kinds by what the checkpoint has of a parameter, and the names of its live states."""

    def __init__(self, view: TableView, items: Collection[str]) -> None:
        self._view, self._others = view, ("value.", *(f"{item}." for item in items))
        self._known: dict[tuple[object, ...], _Kind | None] = {}

    def of(self, name: TableName, stored: tuple[str, ...], live: tuple[str, ...]) -> _Kind | None:
        """None where the live states are not those of the checkpoint, or something else is said of them."""
        row = self._view.row_of(name)
        if row is None:
            return None
        key = (stored, live, *(field.which[row] >= 0 for field in self._view.scalars))
        if key not in self._known:
            self._known[key] = self._made(stored, live, [field for field in self._view.scalars if field.which[row] >= 0])
        return self._known[key]

    def _made(self, stored: tuple[str, ...], live: tuple[str, ...], numbers: Sequence[Field]) -> _Kind | None:
        arrays = tuple(state for state in stored if state != "value")
        if any(state.startswith(self._others) for state in arrays):
            return None
        if any(field.key.endswith((PER_RANK, IN_STATE_DICT, PART)) for field in numbers):
            return None
        keys = [*arrays, *(field.key for field in numbers)]
        return _Kind(arrays, tuple(numbers)) if len(keys) == len(live) and set(keys) == set(live) else None


def _fitting(binder: Binder, view: TableView, param: OwnedParameter, live: Mapping[str, Any], kind: _Kind) -> _Fitting | None:
    row, lying, columns = view.row_of(param.name), param.lying, binder.listing.columns
    if row is None or lying is None:
        return None
    numbers, places, tensors = [], [], []
    for field in kind.numbers:
        entry, value = live[field.key], field.values[field.which[row]]
        if type(entry) is not torch.Tensor or type(value) is not ArrayValue or entry.ndim or value.shape:
            return None
        if value.dtype != dtype_name(entry.dtype) or getattr(entry, "_st_info", None) is not None:
            return None
        numbers.append((entry, value))
    for key in kind.arrays:
        entry = live[key]
        local = _lying_so(entry, lying) if isinstance(entry, torch.Tensor) and entry.ndim else None
        place = columns.by_id.get(("params", *param.name, key), -1)
        if local is None or place < 0 or columns.shapes[place] != lying.shape:
            return None
        if local.shape != lying.box.shape and (local.numel() or not lying.box.is_empty):
            return None
        if columns.bare_dtypes[place] is None or columns.bare_dtypes[place] != dtype_name(local.dtype):
            return None
        places.append(place)
        tensors.append(local)
    return _Fitting(param, lying, places, tensors, numbers)


def _lying_so(entry: torch.Tensor, lying: Lying) -> torch.Tensor | None:
    """The local tensor of a state that is plain, or a DTensor that lies as its parameter does; None of another one."""
    if type(entry) in PLAIN:
        return entry
    own = lying.own
    if own is None or type(entry) is not loaded_type(*DTENSOR):
        return None
    spec = entry._spec  # type: ignore[attr-defined]
    if tuple(spec.placements) != own.placements or tuple(spec.shape) != own.shape:
        return None
    if spec.mesh is not own.device_mesh and spec.mesh != own.device_mesh:
        return None
    local: torch.Tensor = entry._local_tensor  # type: ignore[attr-defined]
    return local
