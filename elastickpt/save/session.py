"""`save`: plan, write, attest, commit; whole or absent, on all ranks together."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import msgpack

from elastickpt.commit.attest import attest
from elastickpt.commit.draft import Draft, abort, begin, new_draft, require_free, require_token, sweep
from elastickpt.commit.finish import Contents, finish
from elastickpt.commit.states import Attempt, Event, State
from elastickpt.commit.teams import team_of
from elastickpt.comms.team import Team
from elastickpt.errors import PlacementUnsupported, Refused
from elastickpt.format.canonical_json import dump
from elastickpt.format.records import ArrayRecord, Manifest
from elastickpt.format.release import RELEASE
from elastickpt.format.values import decode_text, encode_value, value_digest
from elastickpt.save.agreement import (
    TABLE_PREFIX,
    Attested,
    ContentDigest,
    Intention,
    decode_digests,
    encode_digests,
    require_equal_contents,
    require_equal_values,
    require_same_intention,
    structure_id,
    values_wanted,
)
from elastickpt.save.fragments import fragments_of, own_tables
from elastickpt.save.gather import content_digest
from elastickpt.save.merge import MergedStructure, SharedArray, decode_shared, encode_shared, merge
from elastickpt.save.plan import WritePlan, plan_writes
from elastickpt.save.structure import StructureTable, decode_table, encode_table, table_digest, table_of
from elastickpt.save.write import write_plan
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.store import Durability, Store
from elastickpt.training.capture import capture
from elastickpt.training.group import Group, job_group, torch_version
from elastickpt.training.held import LiveState
from elastickpt.training.memory import host_elements
from elastickpt.training.meshes import mesh_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

PlacementChoice = Literal["auto", "plain"]
KNOWN_STRUCTURES = 4  # jobs alternate between few: with and without optimizer state, model only, ...


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint. `nbytes` counts array bytes of all ranks; times in seconds, of this rank.

    `attempt` identifies this try to write it; `notes` say what else was found or done (drafts swept or left).
    """

    path: str
    step: int | None
    attempt: str
    nbytes: int
    arrays: int
    plan_s: float
    write_s: float
    commit_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Structure:
    """A job's structure as one rank knows it; `merged` on the committer only."""

    shared: tuple[SharedArray, ...]
    plan: WritePlan
    merged: MergedStructure | None


# What a structure hash says, plans included, is a function of the hash and the rank alone, so it may outlive any one save.
_STRUCTURES: OrderedDict[tuple[int, str], _Structure] = OrderedDict()


def save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: PlacementChoice = "auto",
    durability: Durability = "power",
) -> CheckpointInfo:
    """Saves `state` at `path`; on return the checkpoint exists there, whole and as durable as asked. Blocking.

    Every rank of the process group (default: all) must call it with the same path, step and options. `state` maps names to
    modules, optimizers, schedulers, tensors, nested containers and plain values; it is not changed, and no training code
    runs. `step` is the number of completed optimizer steps. `mesh` declares plain tensors to be replicas over its ranks.
    `durability`: "power" survives a power cut, "process" only the end of processes.

    Raises, the same on every rank, with a `report` of all ranks that failed: Refused kinds (nothing was written),
    StorageFailed kinds, RankLost, DeadlineExceeded. Unless the message says that it is committed, nothing stands at `path`.
    """
    group = job_group(process_group)
    team = team_of(group)
    return _Save(group, team, _Options(os.fspath(path), step, placement, durability)).run(state, mesh)


@dataclass(frozen=True, slots=True)
class _Options:
    """What the caller asked for beside the state."""

    path: str
    step: int | None
    placement: PlacementChoice
    durability: Durability

    def require_known(self) -> None:
        """Raises Refused kinds for what no caller that passes a type checker asks for, by name."""
        if self.placement not in get_args(PlacementChoice):
            raise PlacementUnsupported(f"placement {self.placement!r}: expected 'auto' or 'plain'; 'packed' is not built yet")
        if self.durability not in get_args(Durability):
            raise Refused(f"durability {self.durability!r}: expected one of {', '.join(get_args(Durability))}")
        if self.step is not None and (type(self.step) is not int or not 0 <= self.step < 1 << 63):
            raise Refused(f"step {self.step!r}: expected None or the number of completed steps, an int from 0 on")


class _Save:
    """One call of `save` on one rank: the rounds in their order. Member 0 is the committer."""

    store: Store  # these two from the first round on: a path that is wrong on one rank is a failure for all to see
    name: str

    def __init__(self, group: Group, team: Team, options: _Options) -> None:
        self.group, self.team, self.options = group, team, options
        self.attempt = Attempt()
        self.draft: Draft | None = None
        self.notes: list[str] = []
        self.nbytes = 0

    def run(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> CheckpointInfo:
        begun = time.perf_counter()
        try:
            live, structure, intentions = self._agree(state, mesh)
            draft, wanted = self._draft(intentions)
            planned = time.perf_counter()
            manifest_bytes, written = self._write(live, structure, draft, wanted)
        except BaseException:
            if self.draft is not None and self.attempt.state is not State.COMMITTED:
                self.attempt.advance(Event.FAIL)
                abort(self.store, self.draft)
            raise
        ended = time.perf_counter()
        nbytes, arrays = msgpack.unpackb(manifest_bytes)
        info = CheckpointInfo(
            path=f"{self.store.url}/{self.name}",
            step=self.options.step,
            attempt=draft.attempt,
            nbytes=nbytes,
            arrays=arrays,
            plan_s=planned - begun,
            write_s=written - planned,
            commit_s=ended - written,
            notes=tuple(self.notes),
        )
        rate = nbytes / 1e9 / max(ended - begun, 1e-9)
        log.info("saved %s: %d arrays, %.3f GB in %.2f s (%.2f GB/s)", info.path, arrays, nbytes / 1e9, ended - begun, rate)
        return info

    # -- agreeing on what is saved -------------------------------------------------------------------------------------

    def _agree(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> tuple[LiveState, _Structure, list[Intention]]:
        captured: list[tuple[LiveState, StructureTable, bytes]] = []
        intentions: list[Intention] = []

        def prepare() -> bytes:
            self.options.require_known()
            declared = None if mesh is None else mesh_of(mesh, world_size=self.group.world_size)
            live = capture(state, rank=self.group.rank, world_size=self.group.world_size, declared=declared)
            table = table_of(live)
            encoded = encode_table(table)
            captured.append((live, table, encoded))
            digest = table_digest(encoded)
            values = [(pointer, value_digest(value, where=pointer)) for pointer, value in live.values.items()]
            values.append((TABLE_PREFIX + digest, _tables_digest(live)))
            known = tuple(structure for rank, structure in _STRUCTURES if rank == self.group.rank)
            self.store, self.name = locate_for_saving(self.options.path)  # last, as it makes missing parents
            return Intention(
                (self.store.url, self.name),
                self.options.step,
                (self.options.placement, self.options.durability),
                digest,
                tuple(values),
                known,
            ).encode()

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            intentions.extend(Intention.decode(payload) for payload in payloads)
            require_same_intention(intentions, self.team.ranks)
            require_equal_values(intentions, self.team.ranks)
            self._require_plain()
            require_free(self.store, self.name)
            structure = structure_id(self.team.ranks, [intention.table for intention in intentions])
            known = all(structure in intention.known for intention in intentions)
            first = {intention.table: member for member, intention in reversed(list(enumerate(intentions)))}
            return [
                bytes(msgpack.packb((structure, known, first[intention.table] == member)))
                for member, intention in enumerate(intentions)
            ]

        structure_key, known, sends = msgpack.unpackb(self.team.round("prepare", prepare, decide))
        live, _, encoded = captured[0]
        key = (self.group.rank, structure_key)
        if known:
            _STRUCTURES.move_to_end(key)
            return live, _STRUCTURES[key], intentions
        structure = self._exchange(live, encoded if sends else b"", intentions)
        _STRUCTURES[key] = structure
        while len(_STRUCTURES) > KNOWN_STRUCTURES:
            _STRUCTURES.popitem(last=False)
        return live, structure, intentions

    def _require_plain(self) -> None:
        """Raises PlacementUnsupported, naming what `auto` would choose, where plain placement is not safe."""
        able = self.store.capabilities
        hosts = len(set(self.team.hosts))
        if len(self.team.ranks) > 1 and not able.ranged_writes:
            raise PlacementUnsupported(
                f"{self.store.url} ({able.name}): {len(self.team.ranks)} ranks cannot fill one file there; "
                "this needs placement 'packed', which is not built yet"
            )
        if hosts > 1 and not able.shared_by_hosts:
            raise PlacementUnsupported(
                f"{self.store.url}: ranks on {hosts} hosts over file system {able.name!r}, which is not on the list of those "
                "where hosts may fill one file together (lustre, gpfs); this needs placement 'packed', which is not built yet"
            )
        if not (able.ranged_writes and able.no_replace_rename):
            raise PlacementUnsupported(
                f"{self.store.url} ({able.name}): expected a store with ranged writes and a rename that replaces nothing; "
                "this needs placement 'packed', which is not built yet"
            )

    def _exchange(self, live: LiveState, table: bytes, intentions: Sequence[Intention]) -> _Structure:
        merged: list[MergedStructure] = []

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            tables: dict[str, StructureTable] = {}
            ranks: dict[str, list[int]] = {}
            for rank, intention, payload in zip(self.team.ranks, intentions, payloads, strict=True):
                ranks.setdefault(intention.table, []).append(rank)
                if payload:
                    tables[intention.table] = decode_table(payload)
            digests = list(tables)
            joined = merge([tables[d] for d in digests], [tuple(ranks[d]) for d in digests])
            merged.append(joined)
            replies = {
                digest: bytes(msgpack.packb((joined.compares, encode_shared(shared))))
                for digest, shared in zip(digests, joined.shared, strict=True)
            }
            return [replies[intention.table] for intention in intentions]

        compares, encoded = msgpack.unpackb(self.team.round("structure", lambda: table, decide))
        shared = decode_shared(encoded)
        if compares:
            self._compare(live, shared)
        plan = plan_writes(live.arrays, shared, rank=self.group.rank)
        return _Structure(shared, plan, merged[0] if merged else None)

    def _compare(self, live: LiveState, shared: Sequence[SharedArray]) -> None:
        def digests() -> bytes:
            return encode_digests(
                [
                    ContentDigest(held.spec.id, held.box, content_digest(host_elements(held.tensor)))
                    for held, fact in zip(live.arrays, shared, strict=True)
                    if fact.compare
                ]
            )

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            require_equal_contents({rank: decode_digests(data) for rank, data in zip(self.team.ranks, payloads, strict=True)})
            return [b""] * len(payloads)

        self.team.round("compare", digests, decide)

    # -- writing and committing ----------------------------------------------------------------------------------------

    def _draft(self, intentions: Sequence[Intention]) -> tuple[Draft, tuple[str, ...]]:
        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            swept = sweep(self.store, self.name)
            self.notes += [f"swept {folder}, left by a process that is gone" for folder in swept.removed]
            self.notes += [f"left {folder}: {why}" for folder, why in swept.left]
            for note in self.notes:
                log.warning("%s/%s: %s", self.store.url, self.name, note)
            self.draft = new_draft(self.name, pid=os.getpid())
            begin(self.store, self.draft)
            self.attempt.advance(Event.DRAFT)
            wanted = values_wanted(intentions)
            return [bytes(msgpack.packb((self.draft.folder, self.draft.attempt, mine))) for mine in wanted]

        folder, attempt, wanted = msgpack.unpackb(self.team.round("draft", lambda: b"", decide), use_list=False)
        return Draft(self.name, folder, attempt), wanted

    def _write(self, live: LiveState, structure: _Structure, draft: Draft, wanted: Sequence[str]) -> tuple[bytes, float]:
        times: list[float] = []

        def write() -> bytes:
            require_token(self.store, draft)
            plan = structure.plan
            written = write_plan(
                self.store,
                draft.folder,
                plan,
                _records(live, structure),
                [host_elements(held.tensor) for held in live.arrays],
                durability=self.options.durability,
            )
            tables = own_tables(live, structure.shared, rank=self.group.rank)
            fragments = fragments_of(
                plan, written, writer=self.team.member, attempt=draft.attempt, tables=tables, values=live.per_rank
            )
            file = attest(self.store, draft, fragments, durability=self.options.durability)
            values = tuple((pointer, dump(encode_value(live.values[pointer], where=pointer))) for pointer in wanted)
            times.append(time.perf_counter())
            return Attested(file, plan.nbytes, values).encode()

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            attested = [Attested.decode(payload) for payload in payloads]
            values = {pointer: decode_text(text, where=pointer) for a in attested for pointer, text in a.values}
            contents = self._contents(structure, values)
            manifest: Manifest = finish(
                self.store,
                draft,
                contents,
                [a.file for a in attested],
                durability=self.options.durability,
                attempt=self.attempt,
            )
            del manifest
            reply = bytes(msgpack.packb((sum(a.nbytes for a in attested), len(contents.arrays))))
            return [reply] * len(payloads)

        reply = self.team.round("write", write, decide)
        return reply, times[0]

    def _contents(self, structure: _Structure, values: Mapping[str, object]) -> Contents:
        merged = structure.merged
        if merged is None:
            raise Refused("the committer has no structure of the whole job")
        return Contents(
            step=self.options.step,
            time=time.time(),
            world_size=len(self.team.ranks),
            placement="plain",
            versions=_versions(),
            items=merged.items,
            meshes=merged.meshes,
            layouts=merged.layouts,
            arrays=tuple(
                ArrayRecord(a.entry.spec, a.key, a.chunk_shape, a.layout, (), a.entry.attributes)
                for a in merged.arrays.values()
            ),
            tied=merged.tied,
            values=dict(values),
        )


def _records(live: LiveState, structure: _Structure) -> tuple[ArrayRecord, ...]:
    """The held arrays as the index will list them, as far as their documents need it (writers and layout are not in those)."""
    return tuple(
        ArrayRecord(held.spec, fact.key, fact.chunk_shape, None, (), held.attributes)
        for held, fact in zip(live.arrays, structure.shared, strict=True)
    )


def _tables_digest(live: LiveState) -> str:
    return value_digest(
        [
            (table.item, list(table.parameters), [(f.kind, f.key, list(f.values), list(f.which)) for f in table.fields])
            for table in live.tables
        ],
        where="optimizer settings",
    )


def _versions() -> tuple[tuple[str, str], ...]:
    return (
        ("elastickpt", RELEASE),
        ("torch", torch_version()),
        ("python", platform.python_version()),
    )
