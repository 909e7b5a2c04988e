"""What one rank writes: derived from what it holds and what it learned of the others. No I/O, no torch operations. [SAVE-33]

held arrays + shared facts --> own boxes (replicas split) --> runs in chunks --> pieces, grouped by file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from elastickpt.format.arrays import Box
from elastickpt.format.digest import block_checksum
from elastickpt.format.records import ArrayRecord, OptimizerTable
from elastickpt.format.tables import without
from elastickpt.layout.algebra import relative
from elastickpt.layout.packs import Cutting, PackSlot, Shared, place_slots, share_out, slots_of
from elastickpt.layout.placement import replica_ranks, share_of
from elastickpt.saving.merge import SharedArray, with_order
from elastickpt.writer.plans import PlannedDocument, PlannedFile, PlannedPack, PlannedPiece, WritePlan, files_of

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


def plan_packs(held: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> WritePlan:
    """The same in placement packed: all in one file, without documents. [FRAG-61..63]"""
    boxes = _packed_boxes(held, shared, rank=rank)
    known: dict[object, tuple[PackSlot, ...]] = {}  # many arrays are cut alike
    local: dict[object, tuple[Box, ...]] = {}  # and held alike: of each run of a slot its box in a local tensor
    slots: list[tuple[int, PackSlot, tuple[Box, ...]]] = []
    for number, box in boxes.items():
        array, fact = held[number], shared[number]
        alike = box.start, box.stop, array.box.start, array.spec.shape, fact.chunk_shape, array.spec.dtype
        if alike not in known:
            itemsize = array.spec.type.itemsize
            known[alike] = tuple(slots_of(box, shape=array.spec.shape, chunk_shape=fact.chunk_shape, itemsize=itemsize))
            local.update((id(slot), tuple(relative(run.box, array.box) for run in slot.runs)) for slot in known[alike])
        slots += [(number, slot, local[id(slot)]) for slot in known[alike]]
    offsets, nbytes = place_slots(slot.nbytes for _, slot, _ in slots)
    pieces = tuple(
        PlannedPiece(number, box, run.moved(offset))
        for (number, slot, own), offset in zip(slots, offsets, strict=True)
        for run, box in zip(slot.runs, own, strict=True)
    )
    files = (PlannedPack("", nbytes, pieces),) if pieces else ()
    return WritePlan(tuple(fact.key for fact in shared), files, ())


def _packed_boxes(held: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> Mapping[int, Box]:
    """By number of the array, in their order, the box of it that `rank` stores. [SAVE-33, SAVE-116, SAVE-117]"""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, (array, fact, group) in enumerate(zip(held, shared, replicas_of(held, shared, rank=rank), strict=True)):
        if fact.writes and not array.box.is_empty:
            alike.setdefault(group, []).append(number)
    found: dict[int, Box] = {}
    for group, numbers in alike.items():
        if len(group) == 1:
            found.update((number, held[number].box) for number in numbers)
            continue
        boxes = [_shared_box(held[number], shared[number], len(group)) for number in numbers]
        mine = share_out(boxes, len(group), group.index(rank))
        found.update((number, box) for number, box in zip(numbers, mine, strict=True) if box is not None)
    return dict(sorted(found.items()))


def _shared_box(array: HeldArray, fact: SharedArray, replicas: int) -> Shared:
    itemsize = array.spec.type.itemsize
    if array.role != "parameter" or replicas == 1:
        return Shared(fact.key, array.box, itemsize, by_first=True)
    sizes = None if array.mesh is None else array.mesh.sizes
    cutting = Cutting.of(array.spec.shape, itemsize, sizes, array.placements, array.box)
    return Shared(fact.key, array.box, itemsize, cutting.division(replicas))


def records_of(arrays: Sequence[HeldArray], shared: Sequence[SharedArray]) -> tuple[ArrayRecord, ...]:
    """The held arrays as the index will list them, as far as their documents need it (writers and layout are not in those)."""
    return tuple(
        ArrayRecord(held.spec, fact.key, fact.chunk_shape, None, (), with_order(held.attributes, fact.order))
        for held, fact in zip(arrays, shared, strict=True)
    )


def replicas_of(held: Sequence[HeldArray], shared: Sequence[SharedArray], *, rank: int) -> tuple[tuple[int, ...], ...]:
    """For each array the ranks that hold the same box of it as `rank`, itself among them, as it is known on all of them."""
    groups_by_layout: dict[tuple[int, tuple[str, ...]], tuple[int, ...]] = {}
    groups = []
    for array, fact in zip(held, shared, strict=True):
        group = fact.group
        if array.mesh is not None:
            laid = (id(array.mesh), array.placements)  # as a comparison goes through all of its ranks
            if laid not in groups_by_layout:
                groups_by_layout[laid] = replica_ranks(array.mesh, array.placements, rank)
            group = groups_by_layout[laid]
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
    if not live.tables:
        return ()
    others = {
        (held.spec.id.item, held.spec.id.name)
        for held, fact in zip(live.arrays, shared, strict=True)
        if held.spec.id.state == "value" and fact.documents != rank
    }
    return tuple(found for table in live.tables if (found := without(table, others)).parameters)
