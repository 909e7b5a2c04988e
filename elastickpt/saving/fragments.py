"""What a rank contributes to its fragment map beside pieces. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from elastickpt.format.records import Field, OptimizerTable
from elastickpt.saving.merge import SharedArray
from elastickpt.training.held import LiveState


def own_tables(live: LiveState, shared: Sequence[SharedArray], *, rank: int) -> tuple[OptimizerTable, ...]:
    """The rows of the optimizer tables that this rank contributes: those of the parameters whose documents it writes.

    Every parameter is held by someone, so every row arrives; ranks that hold the same rows do not all send them.
    """
    others = {
        (held.spec.id.item, held.spec.id.name)
        for held, fact in zip(live.arrays, shared, strict=True)
        if held.spec.id.state == "value" and fact.documents != rank
    }
    return tuple(found for table in live.tables if (found := _without(table, others)).parameters)


def _without(table: OptimizerTable, others: set[tuple[str, str]]) -> OptimizerTable:
    kept = [place for place, parameter in enumerate(table.parameters) if parameter not in others]
    fields = []
    for field in table.fields:
        which = tuple(field.which[place] for place in kept)
        used = sorted({value for value in which if value >= 0})
        number = {old: new for new, old in enumerate(used)}
        values = tuple(field.values[old] for old in used)
        fields.append(Field(field.kind, field.key, values, tuple(number.get(value, -1) for value in which)))
    return OptimizerTable(table.item, tuple(table.parameters[place] for place in kept), tuple(fields))
