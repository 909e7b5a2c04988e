"""What one rank proposes to save, and the structures of jobs that this process knows, with all that was found out about each:
the one cache of its kind.

    known by                     gives                                       asked by
    the keys of a state          how its tensors lay, one by one             `propose`
    the very arrays of a state   the encoded table of this rank              `propose`
    rank and id                  shared facts, plan, looks, outline          `agree`, which says to others which ids it knows
    table, for one saver         the structure by which it may stage         `Saver`, which then asks nobody
    a structure and an arena     the plan in portions, who stages it, and    `Pipeline`, `Saver`
                                 what of a pack is written at once

What a structure says is a function of its id and of the rank alone, so it may outlive any one save. To propose does no I/O, and
asks nothing of other ranks.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from elastickpt.commit.attest import Outline
from elastickpt.format.encode_values import value_digest
from elastickpt.format.records import Placement
from elastickpt.format.typed_values import TypedValue
from elastickpt.format.values import Value
from elastickpt.saving.drift import Hashed, Look, looks_asked_for
from elastickpt.saving.merge import SharedArray
from elastickpt.saving.messages import TABLE_PREFIX, settings_of
from elastickpt.saving.request import Request
from elastickpt.saving.staging import PiecePlace, Stager, places_of
from elastickpt.saving.structure import StructureTable, encode_table, table_digest, table_of
from elastickpt.training.capture import capture
from elastickpt.training.held import HeldArray, LiveState, Memos
from elastickpt.training.parallel import mesh_of
from elastickpt.writer.arena_plan import WriterStructure, prepare
from elastickpt.writer.plans import Document, WritePlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


KNOWN_STRUCTURES = 8  # jobs alternate between few: with and without optimizer state, model only, an average of it, ...


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTable:
    """A rank's structure table, also encoded; `digest` identifies it. Arrays that a capture found as the one before have the
    same `spec` objects, each of which was made for one array lying in one way: states that have them all, and the same items
    and ties, have one table."""

    encoded: bytes
    digest: str
    table: StructureTable
    values: dict[str, TypedValue] = field(default_factory=dict)  # of the newest state with it, by JSON pointer

    def is_that_of(self, live: LiveState) -> bool:
        """Whether it is certain to be."""
        table = self.table
        if (table.items, table.tied) != (live.items, live.tied) or len(table.specs) != len(live.arrays):
            return False
        return all(held.spec is spec for held, spec in zip(live.arrays, table.specs, strict=True))


def encoded_table(live: LiveState) -> EncodedTable:
    """Of a state that is not known. Raises ValueNotCarried for a name that no checkpoint carries."""
    encoded = encode_table(table := table_of(live))
    return EncodedTable(encoded, table_digest(encoded), table)


@dataclass(eq=False)
class KnownStructure:
    """A job's structure, `id`, as one rank knows it, whose own table is `table`, of the newest state with it. `looks`: what
    this rank compares with others in every save; `compares`: some rank does. On the committer only: `outline`, one object for
    all saves, so that what was proven of its arrays is known again; `file_parts` and `notes` as in `MergedStructure`."""

    id: str
    rank: int
    table: EncodedTable
    shared: tuple[SharedArray, ...]
    plan: WritePlan
    documents: tuple[Document, ...]
    looks: tuple[Look, ...]
    compares: bool
    placement: Placement
    outline: Outline | None
    file_parts: int = 0
    notes: tuple[str, ...] = ()
    _places: tuple[PiecePlace, ...] | None = None

    def hashed(self, arrays: Sequence[HeldArray], request: Request) -> Hashed:
        """Digests of what this rank compares in a save of this structure, and what was asked for beside. Blocking for a pass
        over that memory."""
        asked = looks_asked_for(arrays, self.shared, request, rank=self.rank)
        return Hashed(self.id, (*self.looks, *asked), arrays, share=request.share)

    def for_writer(self, arena_nbytes: int | None = None) -> WriterStructure:
        """With the plan in portions through an arena of at most so many bytes. Raises LimitExceeded where it cannot go in
        one."""
        if arena_nbytes not in self._for_writer:
            prepared = prepare(self.plan, self.documents, arena_nbytes=arena_nbytes)
            self._for_writer[arena_nbytes] = WriterStructure(prepared, self.outline)
        return self._for_writer[arena_nbytes]

    def stager(self, arena_nbytes: int | None) -> Stager:
        """Who stages it for that. Raises likewise."""
        if arena_nbytes not in self._stagers:
            self._stagers[arena_nbytes] = Stager(self.for_writer(arena_nbytes).prepared)
        return self._stagers[arena_nbytes]

    def places(self, arrays: Sequence[HeldArray]) -> tuple[PiecePlace, ...]:
        """Where the pieces of its pack lie in these arrays, which are those of a state with it; () without one."""
        if self._places is None:
            self._places = () if self.plan.pack is None else places_of(self.plan.pack, arrays)
        return self._places

    @cached_property
    def _for_writer(self) -> dict[int | None, WriterStructure]:
        return {}

    @cached_property
    def _stagers(self) -> dict[int | None, Stager]:
        return {}

    @cached_property
    def savers(self) -> weakref.WeakKeyDictionary[object, set[tuple[str, str]]]:
        """Those whose ranks have agreed on it: they may stage by it before they ask again. And for what: the placement that was
        asked for, and the folder."""
        return weakref.WeakKeyDictionary()

    def agreed_by(self, saver: object, request: Request) -> None:
        """The ranks of this saver have agreed on it for this request."""
        self.savers.setdefault(saver, set()).add(_meant(request))


def _meant(request: Request) -> tuple[str, str]:
    """What was asked for; and where, if the place has a say in it."""
    return request.placement, request.path.rpartition("/")[0] if request.placement == "auto" else ""


class KnownStructures:
    """The newest ones; `memos` are of their tensors. Safe from any thread."""

    def __init__(self) -> None:
        self.memos = Memos()
        self._known: OrderedDict[tuple[int, str], KnownStructure] = OrderedDict()
        self._changing = threading.Lock()

    def to_rank(self, rank: int) -> Mapping[str, KnownStructure]:
        """Those that this rank knows, by id, the newest last. A snapshot: another save may evict some before this one
        agrees."""
        with self._changing:
            return {id: found for (of, id), found in self._known.items() if of == rank}

    def remember(self, structure: KnownStructure, table: EncodedTable) -> None:
        """It is the newest one, by a state with this table."""
        key = structure.rank, structure.id
        with self._changing:
            structure.table = table
            self._known[key] = structure
            self._known.move_to_end(key)
            while len(self._known) > KNOWN_STRUCTURES:
                self._known.popitem(last=False)

    def table_of(self, live: LiveState) -> EncodedTable:
        """The encoded table of a state, without encoding it again if it is known. Raises ValueNotCarried."""
        found = next((one.table for one in self._all() if one.table.is_that_of(live)), None)
        return found or encoded_table(live)

    def to_stage_by(self, saver: object, table: str, request: Request) -> KnownStructure | None:
        """The structure of which this table was a part when the ranks of this saver agreed last on what was asked for like
        this; None: they must be asked, as in a folder to which nobody saved yet files may be placed otherwise."""
        meant = _meant(request)
        agreed = (one for one in self._all() if one.table.digest == table and saver in one.savers)
        return next((one for one in agreed if meant in one.savers[saver]), None)

    def forget(self, saver: object, table: str) -> None:
        """The job has another structure by now: the next save with this table asks."""
        for one in self._all():
            if one.table.digest == table:
                one.savers.pop(saver, None)

    def _all(self) -> list[KnownStructure]:
        """The newest first."""
        with self._changing:
            return list(reversed(self._known.values()))


KNOWN = KnownStructures()


def _typed(value: Value, pointer: str, known: TypedValue | None) -> TypedValue:
    return known if known is not None and known.value is value else TypedValue.of(value, pointer)


@dataclass(frozen=True, eq=False)
class Proposal:
    """`live` shares memory with training in its arrays only: all else is a copy. `table` is its structure table."""

    live: LiveState
    table: EncodedTable

    @cached_property
    def values(self) -> Mapping[str, TypedValue]:
        """The replicated ones, by JSON pointer. What a capture returned once more is known from the save before."""
        known = self.table.values
        found = {pointer: _typed(value, pointer, known.get(pointer)) for pointer, value in self.live.values.items()}
        known.clear()
        known.update(found)
        return found

    def value_digests(self) -> tuple[tuple[str, str], ...]:
        """A digest of each replicated value, and one of the optimizer tables. Raises ValueNotCarried."""
        return (
            *((pointer, value.digest) for pointer, value in self.values.items()),
            *((pointer, value_digest(table, where="optimizer settings")) for pointer, table in self.tables.items()),
        )

    @property
    def tables(self) -> Mapping[str, Value]:
        """The optimizer tables as a value, compared like one by ranks with one structure: by item, parameter and setting."""
        return {TABLE_PREFIX + self.table.digest: {table.item: settings_of(table) for table in self.live.tables}}


def propose(state: Mapping[str, object], mesh: DeviceMesh | None, *, rank: int, world_size: int) -> Proposal:
    """Captures the state as it is now. Raises what `capture` raises, and ValueNotCarried for a name that cannot be carried."""
    declared = None if mesh is None else mesh_of(mesh, world_size=world_size)
    live = capture(state, rank=rank, world_size=world_size, declared=declared, memos=KNOWN.memos)
    return Proposal(live, KNOWN.table_of(live))
