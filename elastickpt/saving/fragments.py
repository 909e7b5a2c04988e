"""What a rank contributes to its fragment map beside pieces. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from elastickpt.format.records import OptimizerTable
from elastickpt.format.tables import without
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
    return tuple(found for table in live.tables if (found := without(table, others)).parameters)
