"""A save of one rank whose bytes go through an arena and a writer process, and everything else through the blocking path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import DraftContents
from elastickpt.commit.draft import Draft, begin, new_draft
from elastickpt.commit.outcome import commit as commit_attempt
from elastickpt.format.records import FileDigest
from elastickpt.format.typed_values import typed_values
from elastickpt.saving.merge import MergedStructure, SharedArray, merge
from elastickpt.saving.plan import own_tables, plan_writes, records_of
from elastickpt.saving.staging import Stager
from elastickpt.saving.structure import table_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Durability
from elastickpt.training.capture import capture
from elastickpt.training.held import LiveState
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import ArenaPlan, WriterStructure, prepare
from elastickpt.writer.plans import documents_of
from elastickpt.writer.share import Share
from elastickpt.writer.submissions import StagedPortion
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter


def big_state(mb: int = 6, *, seed: int = 0) -> dict[str, object]:
    """A model with matrices, vectors, a scalar, something strided and empty, stepped by AdamW."""
    torch.manual_seed(seed)
    width = 256 * mb
    model = torch.nn.Sequential(torch.nn.Linear(1024, width), torch.nn.LayerNorm(width), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW([*model[1].parameters(), *model[2].parameters()])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {
        "m": model,
        "o": optimizer,
        "t": {"strided": torch.randn(64, 700).t(), "scalar": torch.tensor(seed), "empty": torch.zeros(0, 3)},
        "n": seed,
    }


@dataclass
class Rank:
    """What one rank knows once it has agreed with itself."""

    live: LiveState
    shared: tuple[SharedArray, ...]
    merged: MergedStructure
    prepared: ArenaPlan

    @classmethod
    def of(cls, state: Mapping[str, object], *, arena_nbytes: int | None = None) -> Rank:
        live = capture(state, rank=0, world_size=1, declared=None)
        merged = merge([table_of(live)], [(0,)])
        shared = merged.shared[0]
        plan = plan_writes(live.arrays, shared, rank=0)
        documents = documents_of(plan, records_of(live.arrays, shared))
        return cls(live, shared, merged, prepare(plan, documents, arena_nbytes=arena_nbytes))

    def arena(self) -> Arena:
        return Arena.create(self.prepared.arena_nbytes)

    def contents(self) -> DraftContents:
        return DraftContents(self.merged.outline, typed_values(self.live.values))

    def share(self, draft: Draft, store: LocalStore, durability: Durability) -> Share:
        tables = own_tables(self.live, self.shared, rank=0)
        return Share(Attempt(store.url, draft, durability), 0, WriterStructure(self.prepared), tables, dict(self.live.per_rank))

    def staged(self, draft: Draft, store: LocalStore, number: int, known: bytes, durability: Durability) -> StagedPortion:
        return StagedPortion(self.share(draft, store, durability), number, known)


def begun(folder: Path, name: str) -> tuple[LocalStore, Draft]:
    store = LocalStore(folder)
    draft = new_draft(name, pid=os.getpid())
    begin(store, draft)
    return store, draft


def save_through(
    writer: Supervisor | ThreadWriter,
    rank: Rank,
    arena: Arena,
    path: Path,
    *,
    durability: Durability = "process",
    timeout_s: float = 60,
) -> FileDigest:
    """Stages every round, has it written, and commits; returns the attestation."""
    store, draft = begun(path.parent, path.name)
    stager = Stager(rank.prepared)
    known = b""
    file = None
    for number in range(len(rank.prepared.portions)):
        arena.empty()
        stager.stage(arena, number, rank.live.arrays)
        outcome = writer.submit(rank.staged(draft, store, number, known, durability), arena).result(timeout_s)
        known += outcome.checksums
        file = outcome.file
    assert file is not None
    commit(rank, store, draft, file, durability)
    return file


def commit(rank: Rank, store: LocalStore, draft: Draft, file: FileDigest, durability: Durability = "process") -> None:
    commit_attempt(store, Attempt(store.url, draft, durability), rank.contents(), [file])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, but for those that name the attempt and the time."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: (folder / name).read_bytes() for name in names if name != "checkpoint.json"}
