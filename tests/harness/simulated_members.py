"""Attempts of several members whose trainers are all this process: for writers that commit by themselves."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import EncodedContents, decode_contents, encode_outline, encode_values
from elastickpt.commit.draft import Draft, begin, new_draft
from elastickpt.commit.links import CANDIDATES, CommitLimits, Seat, new_secret
from elastickpt.format.records import FileDigest, OptimizerTable
from elastickpt.format.typed_values import typed_values
from elastickpt.ledger.names import AttemptId
from elastickpt.ranks.addresses import listen
from elastickpt.saving.merge import MergedStructure, merge
from elastickpt.saving.plan import own_tables, plan_writes, records_of
from elastickpt.saving.staging import Stager
from elastickpt.saving.structure import table_of
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import Store
from elastickpt.training.capture import capture
from elastickpt.training.held import LiveState
from elastickpt.writer.arena import Arena, ArenaSource
from elastickpt.writer.arena_plan import ArenaPlan, WriterStructure, prepare
from elastickpt.writer.plans import documents_of
from elastickpt.writer.share import Share, write_whole_share
from elastickpt.writer.submissions import StagedPortion, Submission
from elastickpt.writer.supervisor import Supervisor
from elastickpt.writer.thread import ThreadWriter
from elastickpt.writer.write_files import unwatched

Writer = Supervisor | ThreadWriter
PATIENT = CommitLimits(succession_s=600.0, silence_s=600.0, missing_s=600.0, adopt_s=1.0)  # however busy the host is


def seats(world: int, limits: CommitLimits = PATIENT) -> list[tuple[Seat, socket.socket | None]]:
    """A seat for each member, and its listener."""
    secret = new_secret()
    listening = [listen(host=None) for _ in range(min(world, CANDIDATES))]
    addresses = tuple(address for _, address in listening)
    sockets = [*(sock for sock, _ in listening), *[None] * (world - len(listening))]
    return [(Seat(m, tuple(range(world)), addresses, secret, limits), sockets[m]) for m in range(world)]


_STARTED: list[ThreadWriter] = []


def threads(store: Store, world: int, limits: CommitLimits = PATIENT) -> list[Writer]:
    """A writer for each member, each a thread of this process, until `close_threads`."""
    writers = [ThreadWriter(store, seat=seat, listener=listener) for seat, listener in seats(world, limits)]
    _STARTED.extend(writers)
    return list(writers)


def close_threads() -> None:
    """Ends the writers of `threads`, with their sockets."""
    while _STARTED:
        _STARTED.pop().close(limit_s=5.0)


@dataclass
class Member:
    """What one member's trainer knows once all have agreed."""

    number: int
    live: LiveState
    prepared: ArenaPlan
    tables: tuple[OptimizerTable, ...]
    arena: Arena

    def staged(self, open: OpenAttempt) -> StagedPortion:
        """Its portion of the attempt, staged."""
        self.arena.empty()
        Stager(self.prepared).stage(self.arena, 0, self.live.arrays)
        contents = decode_contents(open.contents) if self.number == 0 else None
        structure = WriterStructure(self.prepared, None if contents is None else contents.outline)
        values = {} if contents is None else contents.values
        return StagedPortion(Share(open.attempt, self.number, structure, self.tables, {}, values), 0)


@dataclass(frozen=True)
class OpenAttempt:
    """An attempt with its store, and what its first committer knows beside."""

    store: Store
    attempt: Attempt
    contents: EncodedContents

    @property
    def draft(self) -> Draft:
        return self.attempt.draft


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
            prepared = prepare(plan, documents_of(plan, records_of(live.arrays, shared)))
            tables = own_tables(live, shared, rank=m)
            self.members.append(Member(m, live, prepared, tables, Arena.create(prepared.arena_nbytes)))

    def contents(self) -> EncodedContents:
        return EncodedContents(encode_outline(self.merged.outline), encode_values(typed_values(self.values)))

    def attempt(self, path: Path, *, step: int = 1) -> OpenAttempt:
        """A draft beside the path."""
        store = LocalStore(path.parent)
        draft = new_draft(path.name, pid=os.getpid())
        begin(store, draft)
        return OpenAttempt(store, Attempt(store.url, draft, "process", step=step, time=1.5), self.contents())

    def attempt_in_run(self, store: Store, register: AttemptId) -> OpenAttempt:
        draft = Draft(register.folder, register.folder, secrets.token_hex(8))
        begin(store, draft)
        attempt = Attempt(store.url, draft, "process", register, (), register.step, 1.5)
        return OpenAttempt(store, attempt, self.contents())

    def write(self, open: OpenAttempt) -> tuple[FileDigest, ...]:
        """Every member's share, written and attested here; the attestations."""
        return tuple(
            write_whole_share(open.store, member.staged(open).share, ArenaSource(member.arena, unwatched))
            for member in self.members
        )

    def submit(self, open: OpenAttempt, writers: Sequence[Writer]) -> list[Submission]:
        """Every member's share, staged and handed to its writer."""
        return [writer.submit(member.staged(open), member.arena) for member, writer in zip(self.members, writers, strict=True)]
