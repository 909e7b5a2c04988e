"""Attempts of several members whose trainers are all this process: for writers that commit by themselves."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastickpt.commit.contents import Contents, Outline, encode_outline, encode_rest
from elastickpt.commit.draft import Draft, begin, new_draft
from elastickpt.commit.orders import Order
from elastickpt.format.encode_fragments import encode_fragments
from elastickpt.format.records import ArrayRecord, FileDigest, FragmentMap, OptimizerTable
from elastickpt.ledger.names import AttemptId
from elastickpt.ranks.addresses import listen
from elastickpt.saving.fragments import own_tables
from elastickpt.saving.merge import MergedStructure, merge
from elastickpt.saving.plan import plan_writes
from elastickpt.saving.staging import Stager
from elastickpt.saving.structure import table_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.training.capture import capture
from elastickpt.training.held import LiveState
from elastickpt.writer.arena import Arena
from elastickpt.writer.carry import unwatched
from elastickpt.writer.jobs import perform
from elastickpt.writer.plans import documents_of
from elastickpt.writer.prepared import Prepared, prepare
from elastickpt.writer.rounds import BLOCK_NBYTES
from elastickpt.writer.seats import CANDIDATES, Limits, Seat, new_secret
from elastickpt.writer.submissions import StagedRound, Submission
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter

Writer = Supervisor | ThreadWriter
QUICK = Limits(succession_s=2.0, silence_s=5.0, missing_s=5.0, adopt_s=1.0)


def seats(world: int, limits: Limits = QUICK) -> list[tuple[Seat, socket.socket | None]]:
    """A seat for each member, and its listener."""
    secret = new_secret()
    listening = [listen(host=None) for _ in range(min(world, CANDIDATES))]
    addresses = tuple(address for _, address in listening)
    sockets = [*(sock for sock, _ in listening), *[None] * (world - len(listening))]
    return [(Seat(m, tuple(range(world)), addresses, secret, limits), sockets[m]) for m in range(world)]


@dataclass
class Member:
    """What one member's trainer knows once all have agreed."""

    number: int
    live: LiveState
    prepared: Prepared
    tables: tuple[OptimizerTable, ...]
    arena: Arena

    def staged(self, attempt: Attempt) -> StagedRound:
        """Its round of the attempt, staged."""
        stager = Stager(self.prepared, self.arena)
        self.arena.empty()
        stager.stage(0, self.live.arrays)
        template = FragmentMap(self.number, attempt.draft.attempt, BLOCK_NBYTES, (), (), self.tables, None)
        order = Order(attempt.register, *(attempt.contents if self.number == 0 else (b"", b"")))
        store = attempt.store
        return StagedRound(self.prepared, 0, store.url, attempt.draft, "process", encode_fragments(template), order=order)


@dataclass(frozen=True)
class Attempt:
    store: Store
    draft: Draft
    register: AttemptId | None
    contents: tuple[bytes, bytes]


class Job:
    """Members that hold the same state, which they write in shares."""

    def __init__(self, state: Mapping[str, object], world: int) -> None:
        lives = [capture(state, rank=m, world_size=world, declared=None) for m in range(world)]
        self.merged: MergedStructure = merge([table_of(lives[0])], [tuple(range(world))])
        shared = self.merged.shared[0]
        self.values = dict(lives[0].values)
        self.members = []
        for m, live in enumerate(lives):
            plan = plan_writes(live.arrays, shared, rank=m)
            records = [
                ArrayRecord(held.spec, fact.key, fact.chunk_shape, None, (), held.attributes)
                for held, fact in zip(live.arrays, shared, strict=True)
            ]
            prepared = prepare(plan, documents_of(plan, records))
            tables = own_tables(live, shared, rank=m)
            self.members.append(Member(m, live, prepared, tables, Arena.create(prepared.arena_nbytes)))

    def contents(self, step: int) -> tuple[bytes, bytes]:
        merged = self.merged
        arrays = tuple(
            ArrayRecord(a.entry.spec, a.key, a.chunk_shape, a.layout, (), a.entry.attributes)
            for a in sorted(merged.arrays.values(), key=lambda shared: shared.key)
        )
        outline = Outline(len(self.members), "plain", (), merged.items, merged.meshes, merged.layouts, arrays, merged.tied)
        return encode_outline(outline), encode_rest(Contents(outline, step, 1.5, self.values))

    def attempt(self, path: Path, *, step: int = 1) -> Attempt:
        """A draft beside the path."""
        store = LocalStore(path.parent)
        draft = new_draft(path.name, pid=os.getpid())
        begin(store, draft)
        return Attempt(store, draft, None, self.contents(step))

    def attempt_in_run(self, store: Store, register: AttemptId) -> Attempt:
        draft = Draft(register.folder, register.folder, secrets.token_hex(8))
        begin(store, draft)
        return Attempt(store, draft, register, self.contents(register.step))

    def write(self, attempt: Attempt) -> tuple[FileDigest, ...]:
        """Every member's share, written and attested here; the attestations."""
        files = []
        for member in self.members:
            staged = member.staged(attempt)
            job = Submission(1, staged, member.arena).write()
            files.append(FileDigest(*perform(attempt.store, job, staged.prepared, member.arena, watch=unwatched).file))
        return tuple(files)

    def submit(self, attempt: Attempt, writers: Sequence[Writer]) -> list[Submission]:
        """Every member's share, staged and handed to its writer."""
        return [
            writer.submit(member.staged(attempt), member.arena) for member, writer in zip(self.members, writers, strict=True)
        ]
