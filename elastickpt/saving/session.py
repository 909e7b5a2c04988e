"""`save`: plan, write, attest, commit; whole or absent, on all ranks together. [SAVE-3, SAVE-54]"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import msgpack

from elastickpt.commit.attest import attest
from elastickpt.commit.contents import Contents
from elastickpt.commit.draft import Draft, abort, begin, new_draft, require_token, sweep
from elastickpt.commit.finish import finish
from elastickpt.commit.states import Attempt, Event, State
from elastickpt.errors import CheckpointError, RanksFailed, Refused
from elastickpt.format.canonical_json import dump
from elastickpt.format.values import decode_text, encode_value
from elastickpt.ranks.process_group import Group, job_group
from elastickpt.ranks.team import Call, Team, require_limit
from elastickpt.ranks.teams import team_of
from elastickpt.saving.agree import Agreed, Structure, agree
from elastickpt.saving.fragments import own_tables
from elastickpt.saving.info import CheckpointInfo
from elastickpt.saving.messages import (
    Attested,
    values_wanted,
)
from elastickpt.saving.outline import records_of
from elastickpt.saving.request import PlacementChoice, Replicas, Request, step_of
from elastickpt.saving.write import write_plan
from elastickpt.storage.opening import place_in
from elastickpt.storage.store import Durability, Store
from elastickpt.training.collection import collection_paused
from elastickpt.training.memory import host_elements
from elastickpt.writer.fragments import fragments_of
from elastickpt.writer.plans import documents_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


def save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: PlacementChoice = "auto",
    durability: Durability = "power",
    replicas: Replicas = "owner",
    wait_limit_s: float | None = None,
) -> CheckpointInfo:
    """Saves `state` at `path`; on return the checkpoint exists there, whole and as durable as asked. Blocking.

    Every rank of the process group (default: all) must call it with the same path, step and options. `state` maps names to
    modules, optimizers, schedulers, tensors, nested containers and plain values; it is not changed, and no training code
    runs. `step` is the number of completed optimizer steps. `mesh` declares plain tensors to be replicas over its ranks.
    Tensors of one name that nothing declares to be replicas (no DDP, placement or `mesh`) are compared in every save, for a
    pass over their memory, and refused if they differ. Buffers of DDP and `fully_shard` may differ: the first rank's are saved;
    where nothing keeps them equal, a note names those that do.
    `durability`: "power" survives a power cut, "process" only the end of processes; a store that cannot promise "power" gives
    "process", and a note says so. `replicas`: of what several ranks are declared to hold alike each byte is written by one of
    them, "owner"; "verify" first compares all of it and refuses the save if some differs; "sample" compares another sixteenth
    in each save, and a note names what differs.
    `placement`: "auto" is "plain" where that is safe and makes at most 50,000 pairs of a writer and a file; else it refuses the
    save by name, as "packed" is not built yet.
    `wait_limit_s`: for how long ranks that come later are waited for while their processes live; without it as long as a
    collective of the process group waits. After 10 s, and again, a warning names them.

    Raises, the same on every rank, with a `report` of all ranks that failed: Refused kinds (nothing was written),
    StorageFailed kinds, RankLost, DeadlineExceeded. Unless the message says that it is committed, nothing stands at `path`.
    """
    with collection_paused():
        require_limit("wait_limit_s", wait_limit_s)
        group = job_group(process_group)
        team = team_of(group)
        team.enter(Call(f"save to {os.fspath(path)}", *group.limit(wait_limit_s)))
        request = Request(os.fspath(path), step_of(step), placement, durability, replicas)
        return _Save(group, team, request).run(state, mesh)


class _Save:
    """One call of `save` on one rank: the rounds in their order. Member 0 is the committer."""

    store: Store  # these once the ranks agreed: a path that is wrong on one rank is a failure for all to see
    name: str
    durability: Durability

    def __init__(self, group: Group, team: Team, request: Request) -> None:
        self.group, self.team, self.request = group, team, request
        self.attempt = Attempt()
        self.draft: Draft | None = None
        self.notes: list[str] = []

    def run(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> CheckpointInfo:
        begun = time.perf_counter()
        try:
            agreed = agree(self.group, self.team, self.request, state, mesh)
            self.store, self.name = agreed.store, agreed.name
            self.notes += agreed.notes
            self.durability = self._promised()
            draft, wanted = self._draft(agreed)
            planned = time.perf_counter()
            manifest_bytes, written = self._write(agreed, draft, wanted)
        except BaseException as error:
            if self.draft is not None and self.attempt.state is not State.COMMITTED:
                self.attempt.advance(Event.FAIL)
                abort(self.store, self.draft)
            if not (isinstance(error, CheckpointError) and error.report):
                self.team.leave(error)  # it happened between rounds, so that the others must be told to wait no longer
            raise
        ended = time.perf_counter()
        nbytes, arrays = msgpack.unpackb(manifest_bytes)
        info = CheckpointInfo(
            path=place_in(self.store, self.name),
            step=self.request.step,
            attempt=draft.attempt,
            nbytes=nbytes,
            arrays=arrays,
            plan_s=planned - begun,
            write_s=written - planned,
            commit_s=ended - written,
            stall_s=ended - begun,
            notes=tuple(self.notes),
        )
        rate = nbytes / 1e9 / max(ended - begun, 1e-9)
        level = logging.INFO if self.team.member == 0 else logging.DEBUG
        log.log(
            level, "saved %s: %d arrays, %.3f GB in %.2f s (%.2f GB/s)", info.path, arrays, nbytes / 1e9, ended - begun, rate
        )
        return info

    def _promised(self) -> Durability:
        """The durability asked for, lowered to what the store can do: it says so, and that is no failure."""
        able = self.store.capabilities
        if self.request.durability == "power" and not able.directory_sync:
            self.notes.append(f"durability 'process' instead of 'power': {able.name} lacks directory_sync")
            return "process"
        return self.request.durability

    # -- writing and committing ----------------------------------------------------------------------------------------

    def _draft(self, agreed: Agreed) -> tuple[Draft, tuple[str, ...]]:
        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            swept = sweep(self.store, self.name)
            self.notes += [f"swept {folder}, which nobody writes any more" for folder in swept.removed]
            self.notes += [f"left {folder}: {why}" for folder, why in swept.left]
            for note in self.notes:
                log.warning("%s: %s", place_in(self.store, self.name), note)
            self.draft = new_draft(self.name, pid=os.getpid())
            begin(self.store, self.draft, sections=agreed.live.sections)
            self.attempt.advance(Event.DRAFT)
            wanted = values_wanted(agreed.intentions)
            return [bytes(msgpack.packb((self.draft.folder, self.draft.attempt, mine))) for mine in wanted]

        folder, attempt, wanted = msgpack.unpackb(self.team.round("draft", lambda: b"", decide), use_list=False)
        return Draft(self.name, folder, attempt), wanted

    def _write(self, agreed: Agreed, draft: Draft, wanted: Sequence[str]) -> tuple[bytes, float]:
        live, structure = agreed.live, agreed.structure
        times: list[float] = []

        def write() -> bytes:
            require_token(self.store, draft)
            plan = structure.plan
            written = write_plan(
                self.store,
                draft.folder,
                plan,
                documents_of(plan, records_of(live.arrays, structure.shared)),
                [host_elements(held.tensor) for held in live.arrays],
                durability=self.durability,
            )
            tables = own_tables(live, structure.shared, rank=self.group.rank)
            fragments = fragments_of(
                plan, written, writer=self.team.member, attempt=draft.attempt, tables=tables, values=live.per_rank
            )
            file = attest(self.store, draft, fragments, durability=self.durability)
            values = tuple((pointer, dump(encode_value(live.values[pointer], where=pointer))) for pointer in wanted)
            times.append(time.perf_counter())
            return Attested(file, plan.nbytes, values).encode()

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            attested = [Attested.decode(payload) for payload in payloads]
            values = {pointer: decode_text(text, where=pointer) for a in attested for pointer, text in a.values}
            values.update(agreed.merged)
            contents = self._contents(structure, values)
            finish(
                self.store,
                draft,
                contents,
                [a.file for a in attested],
                durability=self.durability,
                attempt=self.attempt,
            )
            reply = bytes(msgpack.packb((sum(a.nbytes for a in attested), len(contents.outline.arrays))))
            return [reply] * len(payloads)

        try:
            reply = self.team.round("write", write, decide)
        except RanksFailed as error:
            if any(failure.rank == self.team.ranks[0] for failure in error.report):
                raise type(error)(
                    f"{error.message}; it was the one to commit, so whether {self.name} was committed is not known: "
                    "open it to find out",
                    report=error.report,
                ) from error
            raise
        return reply, times[0]

    def _contents(self, structure: Structure, values: Mapping[str, object]) -> Contents:
        if structure.outline is None:
            raise Refused("the committer has no structure of the whole job")
        return Contents(structure.outline, self.request.step, time.time(), dict(values))
