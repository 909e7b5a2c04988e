"""What one rank writes: derived from what it holds and what it learned of the others. No I/O, no torch operations. [SAVE-33]

held arrays + shared facts --> own boxes (replicas split) --> runs in chunks --> pieces, grouped by file
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastickpt.format.arrays import Box, Mesh
from elastickpt.format.digest import block_checksum
from elastickpt.format.records import ArrayRecord, OptimizerTable
from elastickpt.format.tables import without
from elastickpt.layout.partition import share_of
from elastickpt.layout.placement import replica_ranks
from elastickpt.saving.merge import SharedArray, with_order
from elastickpt.writer.plans import PlannedDocument, PlannedFile, WritePlan, files_of

if TYPE_CHECKING:
    from elastickpt.training.held import HeldArray, LiveState


def plan_writes(held: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> WritePlan:
    """The plan of `rank`; `shared[i]` belongs to `held[i]`. Every element of every array is in exactly one rank's plan."""
    files: list[PlannedFile] = []
    documents: list[PlannedDocument] = []
    groups = replicas_of(held, shared, rank=rank)
    for number, (array, fact, group) in enumerate(zip(held, shared, groups, strict=True)):
        if fact.documents == rank:
            documents.append(PlannedDocument(number, fact.heads_group))
        if fact.writes:
            boxes = own_boxes(array, group, rank=rank)
            files.extend(files_of(number, array.spec, fact.key, fact.chunk_shape, boxes, held=array.box))
    return WritePlan(tuple(fact.key for fact in shared), tuple(files), tuple(documents))


def records_of(arrays: Sequence[HeldArray], shared: Sequence[SharedArray]) -> tuple[ArrayRecord, ...]:
    """The held arrays as the index will list them, as far as their documents need it (writers and layout are not in those)."""
    return tuple(
        ArrayRecord(held.spec, fact.key, fact.chunk_shape, None, (), with_order(held.attributes, fact.order))
        for held, fact in zip(arrays, shared, strict=True)
    )


def replicas_of(held: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> tuple[tuple[int, ...], ...]:
    """For each array the ranks that hold the same box of it as `rank`, itself among them, as it is known on all of them."""
    ways: dict[tuple[Mesh, tuple[str, ...]], tuple[int, ...]] = {}
    groups = []
    for array, fact in zip(held, shared, strict=True):
        group = fact.group
        if array.mesh is not None:
            way = (array.mesh, array.placements)
            if way not in ways:
                ways[way] = replica_ranks(array.mesh, array.placements, rank)
            group = ways[way]
        groups.append(group)
    return tuple(groups)


def own_boxes(array: HeldArray, group: tuple[int, ...], *, rank: int) -> tuple[Box, ...]:
    """The boxes, in global coordinates, that `rank` writes of what it and the other ranks of `group` hold alike."""
    if array.box.count == 0:
        return ()
    index, count = group.index(rank), len(group)
    if array.role != "parameter":
        return (array.box,) if index == 0 else ()
    salt = block_checksum(str(array.spec.id).encode())  # small arrays go whole to one replica: another one for each name
    return share_of(array.box, itemsize=array.spec.type.itemsize, index=index, count=count, salt=salt)


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
