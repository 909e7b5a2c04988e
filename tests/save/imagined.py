"""Jobs of ranks that do not exist: what each would hold, plan and write, through the library, without a process group."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import DraftContents
from elastickpt.commit.draft import Draft, begin, new_draft
from elastickpt.commit.outcome import commit
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.format.encode_fragments import decode_columns, encode_fragments
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, FileDigest, Item
from elastickpt.layout.placement import physical_box
from elastickpt.saving.merge import MergedStructure, merge
from elastickpt.saving.plan import plan_packs, plan_writes, records_of
from elastickpt.saving.request import PLAIN, Placing
from elastickpt.saving.save import LiveTensors
from elastickpt.saving.structure import StructureTable, table_of
from elastickpt.storage.store import Store
from elastickpt.training.held import HeldArray, LiveState, Sharing
from elastickpt.writer.arena_plan import WriterStructure, prepare
from elastickpt.writer.plans import WritePlan, blocks_of, documents_of
from elastickpt.writer.share import Share, fragments_of, write_whole_share


def identity(name: str) -> ArrayId:
    return ArrayId("params", "model", name, "value")


def held(name: str, shape: tuple[int, ...], rank: int, mesh: Mesh, placements: tuple[str, ...]) -> HeldArray:
    """What a rank of a mesh holds of one array, without memory for it."""
    box = physical_box(shape, sizes=mesh.sizes, coordinate=mesh.coordinate(rank), placements=placements)
    spec = ArraySpec(identity(name), shape, "float32")
    return HeldArray(spec, box, torch.empty(box.shape, device="meta"), "parameter", "placed", mesh, placements)


def plain(name: str, shape: tuple[int, ...], sharing: Sharing, ranks: tuple[int, ...] = ()) -> HeldArray:
    """An unsharded array."""
    spec = ArraySpec(identity(name), shape, "float32")
    tensor = torch.empty(shape, device="meta")
    whole = physical_box(shape, sizes=(), coordinate=(), placements=())
    return HeldArray(spec, whole, tensor, "parameter", sharing, replicas=ranks)


def live(*arrays: HeldArray) -> LiveState:
    return LiveState(arrays, (Item("model", "module", "Model"),))


def records(merged: MergedStructure) -> list[ArrayRecord]:
    return list(merged.outline.arrays)


def part_of(whole: np.ndarray, box: Box) -> np.ndarray:
    return whole[tuple(map(slice, box.start, box.stop))]


@dataclass(frozen=True)
class Job:
    """Simulated ranks after their structures were exchanged."""

    states: Sequence[LiveState]
    merged: MergedStructure
    place: Mapping[int, int]  # rank -> its structure table

    def plan(self, rank: int) -> WritePlan:
        plan = plan_writes if self.merged.placement == "plain" else plan_packs
        return plan(self.states[rank].arrays, self.merged.shared[self.place[rank]], rank=rank)

    def maps(self) -> list[FragmentColumns]:
        """The fragment map that each rank would write, with checksums of nothing."""
        found = []
        for rank in range(len(self.states)):
            plan = self.plan(rank)
            written = np.zeros(
                sum(blocks_of(p.run.nbytes, plan.block_nbytes) for file in plan.files for p in file.pieces), dtype=np.uint64
            )
            share = Share(Attempt("", Draft("", "", "00" * 8), "process"), rank, WriterStructure(prepare(plan, ())))
            data = encode_fragments(fragments_of(share, written))
            found.append(decode_columns(data, path=f"writer {rank}"))
        return found

    def draft(self, store: Store, name: str) -> Draft:
        """A new draft that ranks can write into."""
        draft = new_draft(name, pid=os.getpid())
        begin(store, draft)
        return draft

    def write(self, store: Store, draft: Draft, rank: int, wholes: Mapping[str, np.ndarray]) -> FileDigest:
        """Writes and attests one rank's share of the whole arrays, which it holds parts of in memory of its own."""
        plan, arrays = self.plan(rank), self.states[rank].arrays
        sources = [part_of(wholes[one.spec.id.name], one.box).copy() for one in arrays]
        documents = documents_of(plan, records_of(arrays, self.merged.shared[self.place[rank]]))
        share = Share(Attempt(store.url, draft, "process"), rank, WriterStructure(prepare(plan, documents)))
        return write_whole_share(store, share, LiveTensors(plan, sources.__getitem__, store))

    def commit(self, store: Store, draft: Draft, attested: Sequence[FileDigest]) -> None:
        contents = DraftContents(self.merged.outline, {})
        commit(store, Attempt(store.url, draft, "process"), contents, attested)


def job_of(states: Sequence[LiveState], choice: Placing = PLAIN) -> Job:
    tables: dict[StructureTable, list[int]] = {}
    for rank, state in enumerate(states):
        tables.setdefault(table_of(state), []).append(rank)
    merged = merge(list(tables), [tuple(ranks) for ranks in tables.values()], choice=choice)
    return Job(states, merged, {rank: t for t, ranks in enumerate(tables.values()) for rank in ranks})


def job(states: Sequence[LiveState], choice: Placing = PLAIN) -> tuple[MergedStructure, list[FragmentColumns]]:
    """The merged structure of these ranks, and the fragment map that each would write."""
    found = job_of(states, choice)
    return found.merged, found.maps()
