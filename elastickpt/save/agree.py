"""The rounds before a save begins: what each rank holds, what the others must know of it, and each rank's plan. [SAVE-30..32]

prepare     every rank: hashes of its structure and of its values, where it means to save
structure   only if the job's structure is new: one rank for each distinct table sends it
values      only if a dict of the state names other tensors on other ranks: the dicts
compare     only if arrays have one name on ranks that nothing declares to be replicas: digests of their contents
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import msgpack

from elastickpt.commit.draft import require_free
from elastickpt.comms.team import Team
from elastickpt.errors import PlacementUnsupported, Refused
from elastickpt.format.canonical_json import dump
from elastickpt.format.values import Value, decode_text, encode_value, value_digest
from elastickpt.save.gather import content_digest
from elastickpt.save.merge import MergedStructure, SharedArray, decode_shared, encode_shared, merge
from elastickpt.save.merge_values import merge_trees
from elastickpt.save.messages import (
    TABLE_PREFIX,
    ContentDigest,
    Intention,
    decode_digests,
    differing_values,
    encode_digests,
    require_equal_contents,
    require_same_intention,
    structure_id,
)
from elastickpt.save.plan import plan_writes
from elastickpt.save.structure import StructureTable, decode_table, encode_table, table_digest, table_of
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.store import Durability, Store
from elastickpt.training.capture import capture
from elastickpt.training.group import Group
from elastickpt.training.held import LiveState
from elastickpt.training.memory import host_elements
from elastickpt.training.meshes import mesh_of
from elastickpt.writer.plans import WritePlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PlacementChoice = Literal["auto", "plain"]
KNOWN_STRUCTURES = 4  # jobs alternate between few: with and without optimizer state, model only, ...


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked for beside the state."""

    path: str
    step: int | None
    placement: PlacementChoice
    durability: Durability

    def require_known(self) -> None:
        """Raises Refused kinds for what no caller that passes a type checker asks for, by name."""
        if not self.path:
            raise Refused("path '': expected a folder to be made, found an empty text")
        if self.placement not in get_args(PlacementChoice):
            raise PlacementUnsupported(f"placement {self.placement!r}: expected 'auto' or 'plain'; 'packed' is not built yet")
        if self.durability not in get_args(Durability):
            raise Refused(f"durability {self.durability!r}: expected one of {', '.join(get_args(Durability))}")
        if self.step is not None and (type(self.step) is not int or not 0 <= self.step < 1 << 63):
            raise Refused(f"step {self.step!r}: expected None or the number of completed steps, an int from 0 on")


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A job's structure as one rank knows it; `merged` on the committer only."""

    shared: tuple[SharedArray, ...]
    plan: WritePlan
    merged: MergedStructure | None


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What the ranks agreed to save, as a folder `name` in the store's root.

    On the committer only: `intentions`, by member, and `merged`, values of which ranks hold different parts.
    """

    store: Store
    name: str
    live: LiveState
    structure: Structure
    intentions: tuple[Intention, ...]
    merged: Mapping[str, Value]


# What a structure hash says, plans included, is a function of the hash and the rank alone, so it may outlive any one save.
_KNOWN: OrderedDict[tuple[int, str], Structure] = OrderedDict()


def agree(group: Group, team: Team, request: Request, state: Mapping[str, object], mesh: DeviceMesh | None) -> Agreed:
    """Agrees with all ranks on what is saved, and where; blocking. Nothing is written.

    Raises, on every rank the same: Refused kinds for what cannot be saved, RanksFailed kinds.
    """
    return _Agreement(group, team, request).reach(state, mesh)


class _Agreement:
    store: Store
    name: str

    def __init__(self, group: Group, team: Team, request: Request) -> None:
        self.group, self.team, self.request = group, team, request

    def reach(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> Agreed:
        request = self.request
        captured: list[tuple[LiveState, bytes]] = []
        intentions: list[Intention] = []

        def prepare() -> bytes:
            request.require_known()
            declared = None if mesh is None else mesh_of(mesh, world_size=self.group.world_size)
            live = capture(state, rank=self.group.rank, world_size=self.group.world_size, declared=declared)
            encoded = encode_table(table_of(live))
            captured.append((live, encoded))
            digest = table_digest(encoded)
            values = [(pointer, value_digest(value, where=pointer)) for pointer, value in live.values.items()]
            values.append((TABLE_PREFIX + digest, _tables_digest(live)))
            known = tuple(structure for rank, structure in _KNOWN if rank == self.group.rank)
            self.store, self.name = locate_for_saving(request.path)  # last, as it makes missing parents
            here, options = (self.store.url, self.name), (request.placement, request.durability)
            return Intention(here, request.step, options, digest, tuple(values), known).encode()

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            intentions.extend(Intention.decode(payload) for payload in payloads)
            require_same_intention(intentions, self.team.ranks)
            differing = differing_values(intentions, self.team.ranks)
            require_plain(self.store, self.team)
            require_free(self.store, self.name)
            structure = structure_id(self.team.ranks, [intention.table for intention in intentions])
            known = all(structure in intention.known for intention in intentions)
            first = {intention.table: member for member, intention in reversed(list(enumerate(intentions)))}
            return [
                bytes(msgpack.packb((structure, known, first[intention.table] == member, differing)))
                for member, intention in enumerate(intentions)
            ]

        structure_key, known, sends, differing = msgpack.unpackb(self.team.round("prepare", prepare, decide))
        live, encoded = captured[0]
        key = (self.group.rank, structure_key)
        if known:
            _KNOWN.move_to_end(key)
        else:
            _KNOWN[key] = self._exchange(live, encoded if sends else b"", intentions)
            while len(_KNOWN) > KNOWN_STRUCTURES:
                _KNOWN.popitem(last=False)
        merged = self._merge_values(live, differing) if differing else {}
        return Agreed(self.store, self.name, live, _KNOWN[key], tuple(intentions), merged)

    def _merge_values(self, live: LiveState, differing: Sequence[str]) -> Mapping[str, Value]:
        merged: dict[str, Value] = {}

        def own() -> bytes:
            mine = {p: dump(encode_value(live.values[p], where=p)) for p in differing if p in live.values}
            return bytes(msgpack.packb(mine))

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            trees = {
                rank: {pointer: decode_text(text, where=pointer) for pointer, text in msgpack.unpackb(payload).items()}
                for rank, payload in zip(self.team.ranks, payloads, strict=True)
            }
            merged.update(merge_trees(differing, trees))
            return [b""] * len(payloads)

        self.team.round("values", own, decide)
        return merged

    def _exchange(self, live: LiveState, table: bytes, intentions: Sequence[Intention]) -> Structure:
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
        return Structure(shared, plan, merged[0] if merged else None)

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


def require_plain(store: Store, team: Team) -> None:
    """Raises PlacementUnsupported, naming what `auto` would choose, where plain placement is not safe."""
    able = store.capabilities
    hosts = len(set(team.hosts))
    if len(team.ranks) > 1 and not able.ranged_writes:
        raise PlacementUnsupported(
            f"{store.url} ({able.name}): {len(team.ranks)} ranks cannot fill one file there; "
            "this needs placement 'packed', which is not built yet"
        )
    if hosts > 1 and not able.shared_by_hosts:
        raise PlacementUnsupported(
            f"{store.url}: ranks on {hosts} hosts over file system {able.name!r}, which is not on the list of those "
            "where hosts may fill one file together (lustre, gpfs); this needs placement 'packed', which is not built yet"
        )
    if not (able.ranged_writes and able.no_replace_rename):
        raise PlacementUnsupported(
            f"{store.url} ({able.name}): expected a store with ranged writes and a rename that replaces nothing; "
            "this needs placement 'packed', which is not built yet"
        )


def _tables_digest(live: LiveState) -> str:
    return value_digest(
        [
            (table.item, list(table.parameters), [(f.kind, f.key, list(f.values), list(f.which)) for f in table.fields])
            for table in live.tables
        ],
        where="optimizer settings",
    )
