"""A checkpoint in memory, without files: put together from all ranks as by a save, and read as by a load.

For tests of `training`: `MemoryCheckpoint([capture(...) of each rank])`, then `bind(..., listing=checkpoint.listing())`
and `checkpoint.fill(binding)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from elastickpt.errors import CoverageGap, ReplicaConflict, StateMismatch
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.encode_values import typed_key
from elastickpt.format.records import ArrayRecord, FieldKind, Item, OptimizerTable
from elastickpt.format.tables import TableName
from elastickpt.format.values import Value
from elastickpt.training.elements import torch_dtype
from elastickpt.training.held import LiveState
from elastickpt.training.listing import Binding, Listing
from elastickpt.training.optimizer_states import TableBuilder, TableView

_KINDS: tuple[FieldKind, ...] = ("hyper", "scalar", "schedule")


class MemoryCheckpoint:
    """The contents of all ranks' LiveStates, copied. Raises CoverageGap for an element that no rank holds,
    ReplicaConflict
    where ranks hold different contents under one name."""

    def __init__(self, ranks: Sequence[LiveState], *, step: int | None = None) -> None:
        self.step = step
        self.world_size = len(ranks)
        self.arrays = _whole(ranks)
        self.specs = {held.spec.id: held.spec for live in ranks for held in live.arrays}
        self.attributes = _attributes(ranks)
        self.tables = _merged([table for live in ranks for table in live.tables])
        self.values = _same([live.values for live in ranks])
        self.per_rank = [dict(live.per_rank) for live in ranks]
        self.tied = tuple(dict.fromkeys(group for live in ranks for group in live.tied))
        self.items = tuple(dict.fromkeys(item for live in ranks for item in live.items))
        self.columns = _columns(self.specs, self.attributes)
        self.reads: list[int] = []  # writers whose per-rank values were asked for

    def listing(self, *, world_size: int | None = None) -> Listing:
        """What `bind` is given on a job of `world_size` ranks; None, or the number that saved, means the same
        layout.
        """
        items: tuple[Item, ...] = self.items
        return Listing(
            self.specs,
            self.tables,
            self.values,
            self._own,
            items,
            self.world_size,
            world_size in (None, self.world_size),
            self.step,
            self.tied,
            tuple(range(self.world_size if world_size is None else world_size)),
            self.attributes,
            lambda id_: self.arrays[id_].clone(),
            columns=self.columns,
        )

    def _own(self, writer: int) -> Mapping[str, Value]:
        self.reads.append(writer)
        return self.per_rank[writer]

    def fill(self, binding: Binding) -> None:
        """Fills all targets and installs. Raises StateMismatch, and changes nothing, when there are mismatches."""
        if binding.mismatches:
            raise StateMismatch("\n".join(str(mismatch) for mismatch in binding.mismatches))
        with torch.no_grad():
            for held in binding.targets:
                held.tensor.copy_(_part(self.arrays[held.spec.id], held.box))
            for many in binding.columns:
                for place, box, tensor in zip(many.places.tolist(), many.box.tolist(), many.tensors, strict=True):
                    own = _part(self.arrays[self.columns.id(place)], many.boxes[box])
                    tensor.copy_(own.view(tensor.shape))  # an empty shard may have other extents
        binding.install()


def known(listing: Listing, binding: Binding) -> frozenset[ArrayId]:
    """The arrays of a listing that a Binding has a place for."""
    return binding.arrays | {listing.columns.id(place) for many in binding.columns for place in many.places.tolist()}


def _attributes(ranks: Sequence[LiveState]) -> dict[ArrayId, dict[str, Value]]:
    found: dict[ArrayId, dict[str, Value]] = {}
    for held in (held for live in ranks for held in live.arrays):
        own = dict(held.attributes) | ({"axis_order": list(held.order)} if held.order else {})
        if own:
            found.setdefault(held.spec.id, {}).update(own)
    return found


def _columns(specs: Mapping[ArrayId, ArraySpec], attributes: Mapping[ArrayId, Mapping[str, Value]]) -> ArrayColumns:
    records = [
        ArrayRecord(
            spec, str(id_), tuple(max(extent, 1) for extent in spec.shape), None, (0,), tuple(attributes.get(id_, {}).items())
        )
        for id_, spec in specs.items()
    ]
    return ArrayColumns.of(sorted(records, key=lambda record: record.key))


def _part(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]


def _whole(ranks: Sequence[LiveState]) -> dict[ArrayId, torch.Tensor]:
    arrays: dict[ArrayId, torch.Tensor] = {}
    covered: dict[ArrayId, torch.Tensor] = {}
    for held in (held for live in ranks for held in live.arrays):
        id_ = held.spec.id
        if id_ not in arrays:
            arrays[id_] = torch.zeros(held.spec.shape, dtype=torch_dtype(held.spec.dtype))
            covered[id_] = torch.zeros(held.spec.shape, dtype=torch.bool)
        there, new = _part(arrays[id_], held.box), held.tensor.cpu()
        known = _part(covered[id_], held.box)
        if bool(known.any()) and not _same_bits(there[known], new[known]):
            raise ReplicaConflict(f"array {id_}: two ranks hold different contents of {held.box}")
        there.copy_(new)
        known.fill_(True)
    for id_, mask in covered.items():
        if not bool(mask.all()):
            raise CoverageGap(f"array {id_}: {int((~mask).sum())} elements are held by no rank")
    return arrays


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def _merged(tables: Sequence[OptimizerTable]) -> tuple[OptimizerTable, ...]:
    builders: dict[str, TableBuilder] = {}
    rows: dict[tuple[str, TableName], int] = {}
    for table in tables:
        builder = builders.setdefault(table.item, TableBuilder(table.item))
        view = TableView(table)
        for name in table.parameters:
            if (table.item, name) not in rows:
                rows[table.item, name] = builder.row(name)
            for kind in _KINDS:
                for key, value in view.of(kind, name).items():
                    builder.put(kind, key, value, rows=(rows[table.item, name],))
    return tuple(builder.finished() for builder in builders.values())


def _same(values: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for own in values:
        for place, value in own.items():
            if typed_key(found.setdefault(place, value)) != typed_key(value):
                raise ReplicaConflict(f"value {place}: ranks have different ones")
    return found
