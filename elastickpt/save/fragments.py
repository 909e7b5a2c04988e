"""From what a rank wrote to its fragment map. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastickpt.format.records import Field, FragmentMap, OptimizerTable, StoredFile, StoredPiece
from elastickpt.format.values import Value
from elastickpt.save.merge import SharedArray
from elastickpt.save.plan import WritePlan
from elastickpt.save.write import BLOCK_NBYTES, WrittenPiece
from elastickpt.training.held import LiveState


def fragments_of(
    plan: WritePlan,
    written: Sequence[WrittenPiece],
    *,
    writer: int,
    attempt: str,
    tables: tuple[OptimizerTable, ...],
    values: Mapping[str, Value],
) -> FragmentMap:
    """The fragment map of this writer: every piece with its place and checksums."""
    pieces = tuple(
        StoredPiece(
            array=plan.keys[w.piece.array],
            box=w.piece.run.box,
            file=w.file,
            offset=w.piece.run.offset,
            nbytes=w.piece.run.nbytes,
            row_nbytes=w.piece.run.row_nbytes,
            row_stride=w.piece.run.row_stride,
            checksums=tuple(w.checksums.tolist()),
        )
        for w in written
    )
    files = tuple(StoredFile(0, file.path, file.nbytes) for file in plan.files)
    return FragmentMap(writer, attempt, BLOCK_NBYTES, files, pieces, tables, dict(values) if values else None)


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
