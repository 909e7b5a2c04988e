"""What an optimizer holds per parameter: states, as arrays that lie beside their parameter; and all else in columns, written
from live groups and read back into them.

A param group is not stored: each of its options is a column over parameter names, dictionary-coded. So a group can be
put together again from whatever parameters stand in it, at any layout.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod

import torch
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.encode_values import typed_key, values_equal
from elastickpt.format.records import Field, FieldKind, OptimizerTable
from elastickpt.format.tables import TableKey, TableName, TableRow, rows_of
from elastickpt.format.values import Value
from elastickpt.training.composites import is_composite
from elastickpt.training.dtensors import DTensorParts, JobView, has_place, hold, is_even, memorable, parts_of_spec, placed
from elastickpt.training.elements import elements_of, settled
from elastickpt.training.held import HeldArray, Seen
from elastickpt.training.parameters import Lying, OwnedParameter


def local_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """The plain 0-d tensor of a 0-d state; raises LayoutUnsupported for one that is still to be reduced."""
    parts = placed(settled(tensor))
    if parts is None:
        return tensor
    if not all(placement.is_replicate() for placement in parts.placements):
        raise LayoutUnsupported(f"a 0-d optimizer state placed as {parts.placements}, expected it to be replicated")
    return parts.local


def hold_state(id_: ArrayId, tensor: torch.Tensor, *, param: OwnedParameter, job: JobView) -> tuple[HeldArray, ...] | None:
    """What this rank holds of a state; None when it is this rank's own, with no place in the whole.

    A DTensor has its own shape and place. A plain tensor has its parameter's, if it has the shape of the local shard;
    on a parameter that is not sharded it is whole, whatever its shape.
    """
    lying = param.lying
    if lying is None:
        return ()
    memo, plain = job.memo, None if job.memo is None else memorable(tensor)
    if memo is None or plain is None:
        return _hold_state(id_, tensor, param=param, job=job, lying=lying)
    local, spec = plain
    cause = (lying.held.spec, spec, *parts_of_spec(spec))  # the parameter's spec is an object of its own: it says how that lies
    if (again := memo.find(tensor, local, id_, "parameter", cause)) is not None:
        return (again,)
    found = _hold_state(id_, tensor, param=param, job=job, lying=lying)
    if found is not None and len(found) == 1:
        memo.put(tensor, Seen.of(found[0], local, role="parameter", cause=cause))
    return found


def _hold_state(
    id_: ArrayId, tensor: torch.Tensor, *, param: OwnedParameter, job: JobView, lying: Lying
) -> tuple[HeldArray, ...] | None:
    tensor = settled(tensor)
    parts = placed(tensor)
    local = tensor if parts is None else parts.local
    if is_composite(local) or (parts is not None and not _same_place(parts, lying.own)):
        if (parts is None and lying.sharded) or not has_place(tensor, job=job):
            return None
        return hold(id_, tensor, role="parameter", job=job, holders=param.known.holders)
    if tuple(local.shape) == lying.box.shape or lying.box.count == 0 == local.numel():
        return (beside(id_, local, lying.held, box=lying.box, shape=lying.shape),)
    if lying.sharded:
        return None
    whole = tuple(local.shape)
    held = beside(id_, local, lying.held, box=Box.whole(whole), shape=whole)
    return (replace(held, placements=("R",) * len(held.placements)),)


def _same_place(one: DTensorParts, other: DTensorParts | None) -> bool:
    return (
        other is not None
        and one.shape == other.shape
        and one.placements == other.placements
        and one.device_mesh == other.device_mesh
    )


def beside(id_: ArrayId, tensor: torch.Tensor, held: HeldArray, *, box: Box, shape: tuple[int, ...]) -> HeldArray:
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


FEW_ELEMENTS = 1024  # below this many nobody quantises a shard


def fewest_quantised(optimizer: Optimizer) -> float:
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


def most_elements(parts: DTensorParts) -> float:
    """The elements of the largest shard of a DTensor of which ranks hold unevenly many rows; -1 for another one."""
    ways = prod(
        size for size, placement in zip(parts.device_mesh.shape, parts.placements, strict=True) if not placement.is_replicate()
    )
    return -1 if ways == 1 or is_even(parts) else -(-parts.shape[0] // ways) * prod(parts.shape[1:])


class TableBuilder:
    """An OptimizerTable while it is being made: rows are parameters, in the order of the optimizer's groups."""

    def __init__(self, item: str) -> None:
        self.item = item
        self._rows: list[TableName] = []
        self._columns: dict[TableKey, tuple[dict[Hashable, int], list[Value], dict[int, int]]] = {}

    def row(self, name: TableName) -> int:
        """Adds a parameter."""
        self._rows.append(name)
        return len(self._rows) - 1

    def put(self, kind: FieldKind, key: str, value: Value, *, rows: Iterable[int]) -> None:
        """The value of one field for these parameters."""
        codes, values, which = self._columns.setdefault((kind, key), ({}, [], {}))
        code = codes.setdefault(typed_key(value), len(values))
        if code == len(values):
            values.append(value)
        which.update(dict.fromkeys(rows, code))

    def finished(self) -> OptimizerTable:
        """The table; parameters without a value of a field have -1 there."""
        count = len(self._rows)
        fields = tuple(
            Field(kind, key, tuple(values), tuple(which.get(row, -1) for row in range(count)))
            for (kind, key), (_, values, which) in self._columns.items()
        )
        return OptimizerTable(self.item, tuple(self._rows), fields)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two parameters that must have one value, and have two."""

    first: TableName
    second: TableName
    values: tuple[Value, Value]


@dataclass(frozen=True, slots=True)
class OneValue:
    """The value that all parameters that have one agree on."""

    value: Value


class TableView:
    """A table of a checkpoint, by field and parameter name."""

    def __init__(self, table: OptimizerTable) -> None:
        self._table = table
        self._rows = {name: row for row, name in enumerate(table.parameters)}

    @cached_property
    def fields(self) -> Mapping[TableKey, Field]:
        """Its fields by (kind, key)."""
        return {(field.kind, field.key): field for field in self._table.fields}

    @cached_property
    def _by_name(self) -> Mapping[TableName, TableRow]:
        return rows_of(self._table)

    @cached_property
    def scalars(self) -> tuple[Field, ...]:
        """Its fields of 0-d states."""
        return tuple(field for field in self._table.fields if field.kind == "scalar")

    def row_of(self, name: TableName) -> int | None:
        """Where a parameter stands in each field; None for one that the optimizer had not."""
        return self._rows.get(name)

    def has(self, name: TableName) -> bool:
        """Whether the optimizer had this parameter."""
        return name in self._rows

    def keys(self, kind: FieldKind) -> tuple[str, ...]:
        """The keys of all fields of one kind."""
        return tuple(key for each, key in self.fields if each == kind)

    def of(self, kind: FieldKind, name: TableName) -> dict[str, Value]:
        """All values of one kind that a parameter has."""
        return {key: value for (each, key), value in self._by_name[name].items() if each == kind}

    def agreed(self, kind: FieldKind, key: str, names: Collection[TableName]) -> OneValue | Disagreement | None:
        """The one value of these parameters; None when none of them has one.

        Names that it does not know are left out.
        """
        field = self.fields.get((kind, key))
        if field is None:
            return None
        codes = {field.which[row] for name in names if (row := self._rows.get(name)) is not None} - {-1}
        if len(codes) < 2:  # the usual case
            return OneValue(field.values[codes.pop()]) if codes else None
        first: tuple[TableName, int] | None = None
        for name in names:
            code = field.which[self._rows[name]] if name in self._rows else -1
            if code < 0:
                continue
            if first is None:
                first = (name, code)
            elif not values_equal(field.values[first[1]], field.values[code]):
                return Disagreement(first[0], name, (field.values[first[1]], field.values[code]))
        return None if first is None else OneValue(field.values[first[1]])
