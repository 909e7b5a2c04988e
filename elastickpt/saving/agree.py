"""The rounds before a save begins: what each rank holds, what the others must know of it, and each rank's plan. [SAVE-30..32]

prepare     every rank: hashes of its structure and of its values, where it means to save
seats       only if a writer does not know yet where the others meet (saves beside training)
structure   only if the job's structure is new: one rank for each distinct table sends it
values      only if a dict of the state names other tensors on other ranks: the dicts
replicas    only if something is to be compared, and not all ranks knew it in the first round: as `drift` has it
drift       only if something differs: what
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType

from elastickpt.commit.attempt import Located
from elastickpt.format.canonical_json import dump
from elastickpt.format.encode_values import encode_value
from elastickpt.format.long_texts import decode_text
from elastickpt.format.records import Placement
from elastickpt.format.values import Value
from elastickpt.format.version import RELEASE
from elastickpt.ranks.process_group import torch_version
from elastickpt.ranks.team import Question, Team
from elastickpt.saving.drift import Hashed, compare_sets, differing_keys, looks_of, name_drift
from elastickpt.saving.merge import MergedStructure, merge
from elastickpt.saving.messages import (
    TABLE_PREFIX,
    Intention,
    Next,
    OpenedAttempt,
    SharedTable,
    differing_values,
    merge_trees,
    require_same_intention,
    require_same_tables,
    require_staged_alike,
    structure_id,
)
from elastickpt.saving.plan import plan_packs, plan_writes, records_of
from elastickpt.saving.request import PLAIN, Request, choose
from elastickpt.saving.structure import StructureTable, decode_table
from elastickpt.saving.structures import KNOWN, KnownStructure, Proposal
from elastickpt.training.held import HeldArray, LiveState
from elastickpt.writer.plans import documents_of

PREPARE = Question("prepare", Intention, Next)
VALUES = Question("values", dict[str, str], NoneType)  # typed JSON by pointer
STRUCTURE = Question("structure", bytes, SharedTable)  # an encoded table from one rank of each; b"" from the others


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What a rank comes with, and where it goes. `staged` and `seated`: see `messages.Intention`. `hashed`: what it compares
    with others, hashed when it staged; None if that is as it was."""

    proposal: Proposal
    located: Located
    staged: str = ""
    seated: bool = True
    hashed: Hashed | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What the ranks agreed to save. On the committer only: `intentions`, by member, `merged`, values of which ranks hold
    different parts, `notes`, what is to be said of this save, and `placed`, why its files are packs, and what readers of zarr
    will not find. `opened`: see `agree`."""

    located: Located
    live: LiveState
    structure: KnownStructure
    intentions: tuple[Intention, ...]
    merged: Mapping[str, Value]
    notes: tuple[str, ...] = ()
    placed: tuple[str, ...] = ()
    opened: OpenedAttempt | None = None


Open = Callable[[Sequence[Intention], Placement], Sequence[OpenedAttempt | None]]


def _not_at_once(intentions: Sequence[Intention], _: Placement = "plain") -> Sequence[OpenedAttempt | None]:
    return [None] * len(intentions)


def _no_seats() -> None:
    return None


@dataclass(frozen=True, slots=True)
class RoundHooks:
    """What happens within the rounds. `open_at_once` runs on member 0 when nothing more has to be asked: it returns each
    member's share of the attempt that it opened, or None where it opened none. `take_seats` is called on all members or on
    none."""

    open_at_once: Open = _not_at_once
    take_seats: Callable[[], None] = _no_seats


def agree(team: Team, request: Request, offer: Callable[[], Offer], hooks: RoundHooks) -> Agreed:
    """Agrees with all ranks on what is saved, and where; blocking. The offer is made, or fails, within the first round. Nothing
    is written but what `open_at_once` does.

    Raises, on every rank the same: Refused kinds for what cannot be saved, RanksFailed kinds.
    """
    return _Agreement(team, request, hooks).reach(offer)


class _Agreement:
    offer: Offer  # these three from the first round on
    known: Mapping[str, KnownStructure]
    hashed: Hashed | None

    def __init__(self, team: Team, request: Request, hooks: RoundHooks) -> None:
        self.team, self.request, self.hooks = team, request, hooks
        self.rank = team.ranks[team.member]
        self.intentions: list[Intention] = []
        self.choice = PLAIN  # on member 0 by what was asked for, once all ranks have said it

    def reach(self, make: Callable[[], Offer]) -> Agreed:
        then = PREPARE.ask_each(self.team, lambda: self._prepare(make), self._decide)
        offer = self.offer
        live = offer.proposal.live
        if then.seats:
            self.hooks.take_seats()
        if then.known_to_all:
            structure = self.known[then.structure]
        else:
            structure = self._exchange(offer.proposal, then)
        KNOWN.remember(structure, offer.proposal.table)
        merged = self._merge_values(live, then.differing) if then.differing else {}
        notes = self._compare(then, live.arrays, structure) if self._compares(structure) else ()
        why = "" if self.team.member else self.choice.note(structure.file_parts)
        placed = (*([why] if why else []), *structure.notes)
        return Agreed(offer.located, live, structure, tuple(self.intentions), merged, notes, placed, then.opened)

    def _compares(self, structure: KnownStructure) -> bool:
        return len(self.team.ranks) > 1 and (structure.compares or self.request.compares_replicas)

    def _prepare(self, make: Callable[[], Offer]) -> Intention:
        self.offer = offer = make()
        values = offer.proposal.value_digests()
        self.known = KNOWN.to_rank(self.rank)
        request, digest = self.request, offer.proposal.table.digest
        self.hashed = offer.hashed or self._hash_by_the_last(offer.proposal)
        hashed = ("", ()) if self.hashed is None else (self.hashed.structure, self.hashed.summary())
        looks = f"replicas {request.replicas}" + (f", share {request.share}" if request.replicas == "sample" else "")
        here, options = (offer.located.store.url, offer.located.name), (request.placement, request.durability, looks)
        known = tuple(self.known)
        return Intention(here, request.step, options, digest, values, known, offer.staged, offer.seated, *hashed)

    def _hash_by_the_last(self, proposal: Proposal) -> Hashed | None:
        """By the structure of the job of which this table was a part last: it most likely is that again."""
        for id in reversed(tuple(self.known)):
            if (structure := self.known[id]).table.digest == proposal.table.digest:
                return structure.hashed(proposal.live.arrays, self.request)
        return None

    def _decide(self, said: Sequence[Intention]) -> Sequence[Next]:
        team, offer = self.team, self.offer
        intentions = self.intentions
        intentions.extend(said)
        require_same_intention(intentions, team.ranks)
        differing = differing_values(intentions)
        self.choice = choose(self.request.placement, offer.located.store, ranks=len(team.ranks), hosts=len(set(team.hosts)))
        offer.located.require_free()
        structure = structure_id(team.ranks, [intention.table for intention in intentions], self.choice.rule)
        require_staged_alike(intentions, team.ranks, structure)
        known = all(structure in intention.known for intention in intentions)
        first = {intention.table: member for member, intention in reversed(list(enumerate(intentions)))}
        seats = not all(intention.seated for intention in intentions)
        compared = all(intention.hashed == structure for intention in intentions)
        drifted = differing_keys(intention.replicas for intention in intentions) if compared else ()
        asks = drifted or (known and not compared and self._compares(self.known[structure]))
        at_once = known and not (differing or seats or asks)
        opened = self.hooks.open_at_once(intentions, self.known[structure].placement) if at_once else _not_at_once(intentions)
        alike = (differing, seats, compared, drifted)
        return [
            Next(structure, known, first[one.table] == member, *alike, opened[member]) for member, one in enumerate(intentions)
        ]

    def _merge_values(self, live: LiveState, differing: Sequence[str]) -> Mapping[str, Value]:
        merged: dict[str, Value] = {}

        def own() -> dict[str, str]:
            held = {**live.values, **self.offer.proposal.tables}
            return {p: dump(encode_value(held[p], where=p)) for p in differing if p in held}

        def join(said: Sequence[dict[str, str]]) -> None:
            trees = {
                rank: {pointer: decode_text(text, where=pointer) for pointer, text in texts.items()}
                for rank, texts in zip(self.team.ranks, said, strict=True)
            }
            require_same_tables(trees)
            merged.update(merge_trees([pointer for pointer in differing if not pointer.startswith(TABLE_PREFIX)], trees))

        VALUES.ask(self.team, own, join)
        return merged

    def _exchange(self, proposal: Proposal, then: Next) -> KnownStructure:
        merged: list[MergedStructure] = []

        def join(said: Sequence[bytes]) -> Sequence[SharedTable]:
            tables: dict[str, StructureTable] = {}
            ranks: dict[str, list[int]] = {}
            for rank, intention, table in zip(self.team.ranks, self.intentions, said, strict=True):
                ranks.setdefault(intention.table, []).append(rank)
                if table and intention.table == proposal.table.digest:
                    tables[intention.table] = proposal.table.table
                elif table:
                    tables[intention.table] = decode_table(table)
            digests = list(tables)
            whose = [tuple(ranks[d]) for d in digests]
            joined = merge([tables[d] for d in digests], whose, choice=self.choice, versions=_versions())
            merged.append(joined)
            replies = {
                digest: SharedTable.of(shared, placement=joined.placement, compares=joined.compares)
                for digest, shared in zip(digests, joined.shared, strict=True)
            }
            return [replies[intention.table] for intention in self.intentions]

        own = proposal.table.encoded if then.sends else b""
        told = STRUCTURE.ask_each(self.team, lambda: own, join)
        shared, arrays = told.arrays(), proposal.live.arrays
        plan = (plan_packs if told.placement == "packed" else plan_writes)(arrays, shared, rank=self.rank)
        whole = merged[0] if merged else None
        return KnownStructure(
            then.structure,
            self.rank,
            proposal.table,
            shared,
            plan,
            documents_of(plan, records_of(arrays, shared)) if plan.documents else (),
            looks_of(arrays, shared, rank=self.rank),
            told.compares,
            told.placement,
            None if whole is None else whole.outline,
            0 if whole is None else whole.file_parts,
            () if whole is None else whole.notes,
        )

    def _compare(self, then: Next, arrays: Sequence[HeldArray], structure: KnownStructure) -> tuple[str, ...]:
        """Compares replicas with the other ranks; member 0 returns what to say of them. Raises ReplicaConflict."""
        hashed = self.hashed
        if then.compared and hashed is not None:
            keys: Sequence[int] = then.drifted
        else:
            if hashed is None or hashed.structure != then.structure:  # not staged yet, so this is as it was
                hashed = structure.hashed(arrays, self.request)
            keys = compare_sets(self.team, hashed)
        return name_drift(self.team, hashed, keys) if keys else ()


def _versions() -> tuple[tuple[str, str], ...]:
    return (("elastickpt", RELEASE), ("torch", torch_version()), ("python", platform.python_version()))
