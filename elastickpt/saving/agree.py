"""The rounds before a save begins: what each rank holds, what the others must know of it, and each rank's plan. [SAVE-30..32]

prepare     every rank: hashes of its structure and of its values, where it means to save
seats       only if a writer does not know yet where the others meet (saves beside training)
structure   only if the job's structure is new: one rank for each distinct table sends it
values      only if a dict of the state names other tensors on other ranks: the dicts
replicas    only if something is to be compared, and not all ranks knew it in the first round: as `drift` has it
drift       only if something differs: what
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from elastickpt.commit.contents import Outline
from elastickpt.commit.draft import require_free
from elastickpt.errors import PlacementUnsupported
from elastickpt.format.canonical_json import dump
from elastickpt.format.values import Value, decode_text, encode_value
from elastickpt.ranks.process_group import Group
from elastickpt.ranks.team import Team
from elastickpt.saving.drift import Hashed, Look, compare_sets, differing_keys, looks_asked_for, looks_of, name_drift
from elastickpt.saving.merge import MergedStructure, SharedArray, decode_shared, encode_shared, merge
from elastickpt.saving.merge_values import merge_trees
from elastickpt.saving.messages import (
    TABLE_PREFIX,
    Intention,
    Verdict,
    differing_values,
    require_same_intention,
    require_staged_alike,
    structure_id,
)
from elastickpt.saving.outline import outline_of
from elastickpt.saving.plan import plan_writes
from elastickpt.saving.propose import Proposal, propose
from elastickpt.saving.request import Request
from elastickpt.saving.settings import require_same_tables
from elastickpt.saving.structure import StructureTable, decode_table
from elastickpt.saving.under_way import require_idle
from elastickpt.storage.opening import locate_for_saving, place_in
from elastickpt.storage.store import Store
from elastickpt.training.held import LiveState
from elastickpt.writer.plans import WritePlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MAX_AUTO_PARTS = 50_000
KNOWN_STRUCTURES = 4  # jobs alternate between few: with and without optimizer state, model only, ...


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A job's structure as one rank knows it, whose own table is `table`; `outline` on the committer only, one object for all
    saves: what was proven of its arrays is known again; `file_parts`, there too, as in `MergedStructure`. `looks`: what this
    rank compares with others in every save; `compares`: some rank does."""

    table: str
    shared: tuple[SharedArray, ...]
    plan: WritePlan
    looks: tuple[Look, ...]
    compares: bool
    outline: Outline | None
    file_parts: int = 0

    def hashed(self, id: str, live: LiveState, request: Request, *, rank: int) -> Hashed:
        """Digests of what this rank compares in a save of this structure, `id`, and what was asked for beside. Blocking for a
        pass over that memory."""
        asked = looks_asked_for(live.arrays, self.shared, request, rank=rank)
        return Hashed(id, (*self.looks, *asked), live.arrays, share=request.share)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What a rank comes with. `name` is the target in the store, as all ranks must say it; `require_free` raises on member 0
    if something stands there. `staged` and `seated`: see `messages.Intention`. `hashed`: what it compares with others, hashed
    when it staged; None if that is as it was."""

    proposal: Proposal
    store: Store
    name: str
    require_free: Callable[[], None]
    staged: str = ""
    seated: bool = True
    hashed: Hashed | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What the ranks agreed to save, as a folder `name` in the store's root. `id` identifies the structure.

    On the committer only: `intentions`, by member, `merged`, values of which ranks hold different parts, and `notes`, what is
    to be said of this save. `opened`: see `reach`.
    """

    store: Store
    name: str
    live: LiveState
    id: str
    structure: Structure
    intentions: tuple[Intention, ...]
    merged: Mapping[str, Value]
    notes: tuple[str, ...] = ()
    opened: bytes = b""


Open = Callable[[Sequence[Intention]], Sequence[bytes]]


def _not_at_once(intentions: Sequence[Intention]) -> Sequence[bytes]:
    return [b""] * len(intentions)


def _no_seats() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Steps:
    """What a save beside training does within the rounds. `open_at_once` runs on member 0 when nothing more has to be asked:
    it returns each member's share of the attempt that it opened. `take_seats` is called on all members or on none."""

    open_at_once: Open = _not_at_once
    take_seats: Callable[[], None] = _no_seats


BLOCKING = Steps()

# What a structure hash says, plans included, is a function of the hash and the rank alone, so it may outlive any one save.
_KNOWN: OrderedDict[tuple[int, str], Structure] = OrderedDict()
_KNOWING = threading.Lock()


def agree(group: Group, team: Team, request: Request, state: Mapping[str, object], mesh: DeviceMesh | None) -> Agreed:
    """Agrees with all ranks on what is saved, and where; blocking. Nothing is written.

    Raises, on every rank the same: Refused kinds for what cannot be saved, RanksFailed kinds.
    """

    def offer() -> Offer:
        request.require_known()
        proposal = propose(state, mesh, rank=group.rank, world_size=group.world_size)
        store, name = locate_for_saving(request.path)  # last, as it makes missing parents
        require_idle(place_in(store, name))
        return Offer(proposal, store, name, lambda: require_free(store, name))

    return reach(team, request, offer, BLOCKING)


def reach(team: Team, request: Request, offer: Callable[[], Offer], steps: Steps) -> Agreed:
    """The same for an offer that is made, or fails, within the first round."""
    return _Agreement(team, request, steps).reach(offer)


class _Agreement:
    offer: Offer  # these three from the first round on
    known: Mapping[str, Structure]
    hashed: Hashed | None

    def __init__(self, team: Team, request: Request, steps: Steps) -> None:
        self.team, self.request, self.steps = team, request, steps
        self.rank = team.ranks[team.member]
        self.intentions: list[Intention] = []

    def reach(self, make: Callable[[], Offer]) -> Agreed:
        verdict = Verdict.decode(self.team.round("prepare", lambda: self._prepare(make), self._decide))
        offer = self.offer
        live = offer.proposal.live
        if verdict.seats:
            self.steps.take_seats()
        if verdict.known:
            structure = self.known[verdict.structure]
        else:
            structure = self._exchange(offer.proposal, sends=verdict.sends)
        _remember(self.rank, verdict.structure, structure)
        merged = self._merge_values(live, verdict.differing) if verdict.differing else {}
        notes = self._compare(verdict, live, structure) if self._compares(structure) else ()
        found = (offer.store, offer.name, live, verdict.structure, structure)
        return Agreed(*found, tuple(self.intentions), merged, notes, verdict.opened)

    def _compares(self, structure: Structure) -> bool:
        return len(self.team.ranks) > 1 and (structure.compares or self.request.compares_replicas)

    def _prepare(self, make: Callable[[], Offer]) -> bytes:
        self.offer = offer = make()
        values = offer.proposal.value_digests()
        self.known = _known_to(self.rank)
        request, digest = self.request, offer.proposal.digest
        self.hashed = offer.hashed or self._hash_by_the_last(offer.proposal)
        hashed = ("", ()) if self.hashed is None else (self.hashed.structure, self.hashed.summary())
        looks = f"replicas {request.replicas}" + (f", share {request.share}" if request.replicas == "sample" else "")
        here, options = (offer.store.url, offer.name), (request.placement, request.durability, looks)
        known = tuple(self.known)
        return Intention(here, request.step, options, digest, values, known, offer.staged, offer.seated, *hashed).encode()

    def _hash_by_the_last(self, proposal: Proposal) -> Hashed | None:
        """By the structure of the job of which this table was a part last: it most likely is that again."""
        for id in reversed(tuple(self.known)):
            if (structure := self.known[id]).table == proposal.digest:
                return structure.hashed(id, proposal.live, self.request, rank=self.rank)
        return None

    def _decide(self, payloads: Sequence[bytes]) -> Sequence[bytes]:
        team, offer = self.team, self.offer
        intentions = self.intentions
        intentions.extend(Intention.decode(payload) for payload in payloads)
        require_same_intention(intentions, team.ranks)
        differing = differing_values(intentions)
        require_plain(offer.store, team)
        offer.require_free()
        structure = structure_id(team.ranks, [intention.table for intention in intentions])
        require_staged_alike(intentions, team.ranks, structure)
        known = all(structure in intention.known for intention in intentions)
        if known:
            require_few_parts(self.request, self.known[structure].file_parts)
        first = {intention.table: member for member, intention in reversed(list(enumerate(intentions)))}
        seats = not all(intention.seated for intention in intentions)
        compared = all(intention.hashed == structure for intention in intentions)
        drifted = differing_keys(intention.replicas for intention in intentions) if compared else ()
        asks = drifted or (known and not compared and self._compares(self.known[structure]))
        at_once = known and not (differing or seats or asks)
        opened = self.steps.open_at_once(intentions) if at_once else [b""] * len(intentions)
        said = (differing, seats, compared, drifted)
        return [
            Verdict(structure, known, first[one.table] == member, *said, opened[member]).encode()
            for member, one in enumerate(intentions)
        ]

    def _merge_values(self, live: LiveState, differing: Sequence[str]) -> Mapping[str, Value]:
        merged: dict[str, Value] = {}

        def own() -> bytes:
            held = {**live.values, **self.offer.proposal.tables}
            mine = {p: dump(encode_value(held[p], where=p)) for p in differing if p in held}
            return bytes(msgpack.packb(mine))

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            trees = {
                rank: {pointer: decode_text(text, where=pointer) for pointer, text in msgpack.unpackb(payload).items()}
                for rank, payload in zip(self.team.ranks, payloads, strict=True)
            }
            require_same_tables(trees)
            merged.update(merge_trees([pointer for pointer in differing if not pointer.startswith(TABLE_PREFIX)], trees))
            return [b""] * len(payloads)

        self.team.round("values", own, decide)
        return merged

    def _exchange(self, proposal: Proposal, *, sends: bool) -> Structure:
        merged: list[MergedStructure] = []

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            tables: dict[str, StructureTable] = {}
            ranks: dict[str, list[int]] = {}
            for rank, intention, payload in zip(self.team.ranks, self.intentions, payloads, strict=True):
                ranks.setdefault(intention.table, []).append(rank)
                if payload:
                    tables[intention.table] = decode_table(payload)
            digests = list(tables)
            joined = merge([tables[d] for d in digests], [tuple(ranks[d]) for d in digests])
            require_few_parts(self.request, joined.file_parts)
            merged.append(joined)
            replies = {
                digest: bytes(msgpack.packb((joined.compares, encode_shared(shared))))
                for digest, shared in zip(digests, joined.shared, strict=True)
            }
            return [replies[intention.table] for intention in self.intentions]

        own = proposal.table if sends else b""
        compares, encoded = msgpack.unpackb(self.team.round("structure", lambda: own, decide))
        shared, arrays = decode_shared(encoded), proposal.live.arrays
        plan, looks = plan_writes(arrays, shared, rank=self.rank), looks_of(arrays, shared, rank=self.rank)
        found = (proposal.digest, shared, plan, looks, compares)
        if not merged:
            return Structure(*found, None)
        return Structure(*found, outline_of(merged[0], world_size=len(self.team.ranks)), merged[0].file_parts)

    def _compare(self, verdict: Verdict, live: LiveState, structure: Structure) -> tuple[str, ...]:
        """Compares replicas with the other ranks; member 0 returns what to say of them. Raises ReplicaConflict."""
        hashed = self.hashed
        if verdict.compared and hashed is not None:
            keys: Sequence[int] = verdict.drifted
        else:
            if hashed is None or hashed.structure != verdict.structure:  # not staged yet, so this is as it was
                hashed = structure.hashed(verdict.structure, live, self.request, rank=self.rank)
            keys = compare_sets(self.team, hashed)
        return name_drift(self.team, hashed, keys) if keys else ()


def _known_to(rank: int) -> dict[str, Structure]:
    """As it is now: another thread may need the room for others before the ranks have agreed."""
    with _KNOWING:
        return {structure: found for (of, structure), found in _KNOWN.items() if of == rank}


def _remember(rank: int, structure: str, found: Structure) -> None:
    with _KNOWING:
        _KNOWN[rank, structure] = found
        _KNOWN.move_to_end((rank, structure))
        while len(_KNOWN) > KNOWN_STRUCTURES:
            _KNOWN.popitem(last=False)


def require_few_parts(request: Request, file_parts: int) -> None:
    """Raises PlacementUnsupported where `auto` would choose packed placement for the number of files that writers open."""
    if request.placement == "auto" and file_parts > MAX_AUTO_PARTS:
        raise PlacementUnsupported(
            f"placement 'auto': expected at most {MAX_AUTO_PARTS} pairs of a writer and a file, found {file_parts}, for which "
            "it means 'packed', which is not built yet; placement='plain' saves them all the same"
        )


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
