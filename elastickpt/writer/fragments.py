"""From what a rank wrote to its fragment map. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.format.records import FragmentMap, OptimizerTable, StoredFile, StoredPiece
from elastickpt.format.values import Value
from elastickpt.writer.carry import Checksums, blocks_of
from elastickpt.writer.plans import WritePlan
from elastickpt.writer.rounds import BLOCK_NBYTES


def fragments_of(
    plan: WritePlan,
    checksums: Checksums,
    *,
    writer: int,
    attempt: str,
    tables: tuple[OptimizerTable, ...],
    values: Mapping[str, Value],
) -> FragmentMap:
    """The fragment map of this writer: every piece with its place and checksums, which are those of all pieces in order."""
    pieces = []
    every = checksums.tolist()
    first = 0
    for number, file in enumerate(plan.files):
        for piece in file.pieces:
            run = piece.run
            stop = first + blocks_of(run.nbytes)
            pieces.append(
                StoredPiece(
                    array=plan.keys[piece.array],
                    box=run.box,
                    file=number,
                    offset=run.offset,
                    nbytes=run.nbytes,
                    row_nbytes=run.row_nbytes,
                    row_stride=run.row_stride,
                    checksums=tuple(every[first:stop]),
                )
            )
            first = stop
    files = tuple(StoredFile(0, file.path, file.nbytes) for file in plan.files)
    return FragmentMap(writer, attempt, BLOCK_NBYTES, files, tuple(pieces), tables, dict(values) if values else None)
