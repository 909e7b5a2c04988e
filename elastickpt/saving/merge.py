"""From the structure tables of all ranks to what each rank must know of the others: keys, grids, who shares what. [SAVE-30]

No I/O. Runs on one rank, over the distinct tables only; its result for one table is a value of that table's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from operator import attrgetter, itemgetter
from typing import NamedTuple

from elastickpt.commit.attest import Outline
from elastickpt.errors import StructureConflict
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh, dtype_named
from elastickpt.format.keys import REFERENCES, keys_of
from elastickpt.format.many import many
from elastickpt.format.records import ArrayRecord, Item, Layout, ManifestFrame, Placement
from elastickpt.format.values import Value
from elastickpt.layout.grid import chunk_shape
from elastickpt.layout.packs import Cutting
from elastickpt.layout.placement import MIN_SPLIT_NBYTES, cuts_of
from elastickpt.layout.references import within_limits
from elastickpt.saving.request import PLAIN, Placing
from elastickpt.saving.structure import HeldKind, StructureTable

Attributes = tuple[tuple[str, Value], ...]
AXIS_ORDER = "axis_order"


class SharedArray(NamedTuple):
    """What a rank learns of one array it holds.

    `group`: the ranks among which the array's replicas are shared out; empty where the rank's own mesh and placements say it.
    `writes` is False where another group of ranks holds the same array and writes it. `peers`: the ranks of all groups, where
    nobody declared that they hold the same: contents are compared between them in every save; else empty. `documents`: the one
    rank that writes its zarr documents; `heads_group`: that rank writes the parameter's group document too. `order`: of its
    axes, on the first rank on which they lie in another one than their own.
    """

    key: str
    chunk_shape: tuple[int, ...]
    group: tuple[int, ...]
    writes: bool
    peers: tuple[int, ...]
    documents: int
    heads_group: bool
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MergedStructure:
    """The whole job's structure: the outline of its checkpoints. `shared` are what the ranks of each table learn, by table.
    `file_parts`: of how many pairs of a chunk file and a rank that writes into it a save consists, at most. `compares`:
    contents are compared in every save."""

    outline: Outline
    shared: tuple[tuple[SharedArray, ...], ...]
    file_parts: int
    compares: bool
    notes: tuple[str, ...] = ()  # of packs: what readers of zarr will not find

    @property
    def placement(self) -> Placement:
        """Of the files of its checkpoints."""
        return self.outline.frame.placement


class _Holding(NamedTuple):
    """How the ranks that have one table hold an array."""

    table: int
    kind: HeldKind
    mesh: Mesh | None
    ranks: tuple[int, ...]


def merge(
    tables: Sequence[StructureTable],
    ranks: Sequence[tuple[int, ...]],
    *,
    choice: Placing = PLAIN,
    versions: tuple[tuple[str, str], ...] = (),
) -> MergedStructure:
    """Joins distinct tables; `ranks[t]` are the ranks with table t, in order. `versions` of what writes are for people.

    Raises StructureConflict naming the array, what each rank has, and the ranks.
    """
    order = sorted(range(len(tables)), key=lambda t: ranks[t][0])
    together = _Together.of(tables, order)
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    ways: dict[_Held, _Way] = {}
    for spec, held in zip(together.specs, together.held, strict=True):
        if held not in ways:  # how arrays are held says all of them but their names
            ways[held] = _way(spec.id, [_holding(tables, ranks, t, kind) for t, kind in held], meshes, layouts)
    file_parts = sum(ways[held].file_parts for held in together.held)
    placement = choice.placement(file_parts)
    grids = {held: _grid_of(way, placement) for held, way in ways.items()}
    keys = keys_of([spec.id for spec in together.specs])
    heads = _group_heads(together.specs)
    shared = tuple(_shared(together, t, ways, grids, keys, heads) for t in range(len(tables)))
    arrays = _records(together, ways, grids, keys)
    torn = [key for key, held in zip(keys, together.held, strict=True) if not grids[held][1]]
    frame = ManifestFrame(
        world_size=sum(map(len, ranks)),
        placement=placement,
        versions=versions,
        items=_items(tables, ranks, order),
        meshes=tuple(meshes),
        layouts=tuple(layouts),
        tied=_ties(tables, order),
    )
    compares = any(way.compares for way in ways.values())
    outline = Outline(frame, tuple(sorted(arrays, key=attrgetter("key"))))
    return MergedStructure(outline, shared, file_parts, compares, _notes(placement, arrays, torn))


_Held = tuple[tuple[int, int], ...]  # the tables that have an array, and the kind in each


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """The arrays of all tables, each once: what it is, and how it is held. `places[t]` are those of table t."""

    specs: list[ArraySpec]
    held: list[_Held]
    places: list[list[int]]

    @classmethod
    def of(cls, tables: Sequence[StructureTable], order: Sequence[int]) -> _Together:
        known: dict[ArrayId, int] = {}
        specs: list[ArraySpec] = []
        held: list[_Held] = []
        places: list[list[int]] = [[] for _ in tables]
        for t in order:
            kinds = [((t, kind),) for kind in range(len(tables[t].kinds))]
            for spec, which in zip(tables[t].specs, tables[t].which, strict=True):
                place = known.setdefault(spec.id, len(specs))
                if place == len(specs):
                    specs.append(spec)
                    held.append(kinds[which])
                else:
                    held[place] += kinds[which]
                places[t].append(place)
        return cls(specs, held, places)


def _records(
    together: _Together, ways: Mapping[_Held, _Way], grids: Mapping[_Held, tuple[tuple[int, ...], bool]], keys: Sequence[str]
) -> list[ArrayRecord]:
    """The arrays as the index will list them, but for their writers."""
    alike = {held: (grids[held][0], way.layout, (), way.attributes) for held, way in ways.items()}
    rows = list(map(alike.__getitem__, together.held))
    names = ("chunk_shape", "layout", "writers", "attributes")
    columns = {name: map(itemgetter(number), rows) for number, name in enumerate(names)}
    return many(ArrayRecord, len(keys), spec=together.specs, key=keys, **columns)


def _holding(tables: Sequence[StructureTable], ranks: Sequence[tuple[int, ...]], table: int, number: int) -> _Holding:
    kind = tables[table].kinds[number]
    return _Holding(table, kind, None if kind.mesh is None else tables[table].meshes[kind.mesh], ranks[table])


def _shared(
    together: _Together,
    table: int,
    ways: Mapping[_Held, _Way],
    grids: Mapping[_Held, tuple[tuple[int, ...], bool]],
    keys: Sequence[str],
    heads: Set[int],
) -> tuple[SharedArray, ...]:
    """What the ranks of one table learn of its arrays."""
    known = {held: way.of_table(table) for held, way in ways.items() if any(t == table for t, _ in held)}
    found = []
    for place in together.places[table]:
        held, key = together.held[place], keys[place]
        way, (group, writes) = ways[held], known[held]
        writers = way.groups[0].ranks
        writer = writers[sum(key.encode()) % len(writers)] if len(writers) > 1 else writers[0]
        found.append(SharedArray(key, grids[held][0], group, writes, way.peers, writer, place in heads, way.order))
    return tuple(found)


def with_order(attributes: Attributes, order: Sequence[int]) -> Attributes:
    """An array's attributes in the index: its own, and the order of its axes in memory if it is another than their own.
    [UCF-107]"""
    return (*attributes, (AXIS_ORDER, list(order))) if order else attributes


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks that hold one array between them, each element of it at least once; and which of its holdings are theirs."""

    ranks: tuple[int, ...]
    holdings: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """What arrays have in common that are held alike; models have many of few kinds. `attributes` as in the index, `order` of
    axes as in `SharedArray`."""

    holdings: tuple[_Holding, ...]
    groups: tuple[_Group, ...]
    layout: int | None
    file_parts: int
    peers: tuple[int, ...]
    compares: bool
    attributes: Attributes
    order: tuple[int, ...]

    def of_table(self, table: int) -> tuple[tuple[int, ...], bool]:
        """What the ranks of a table learn: `group` and `writes` of a `SharedArray`."""
        own = next(place for place, holding in enumerate(self.holdings) if holding.table == table)
        group = next(group for group in self.groups if own in group.holdings)
        return () if self.holdings[own].mesh is not None else group.ranks, group is self.groups[0]


def _way(identity: ArrayId, found: Sequence[_Holding], meshes: dict[Mesh, int], layouts: dict[Layout, int]) -> _Way:
    """Of arrays held so, of which the first is called so. Raises StructureConflict."""
    _require_agreement(identity, found)
    first, layout = found[0], None
    if first.mesh is not None:
        number = meshes.setdefault(first.mesh, len(meshes))
        layout = layouts.setdefault(Layout(number, first.kind.placements), len(layouts))
    groups = _groups(identity, found)
    inferred = len(groups) > 1 or (first.kind.sharing == "undeclared" and len(groups[0].ranks) > 1)
    peers = tuple(sorted({rank for group in groups for rank in group.ranks})) if inferred else ()
    compares = inferred or any(one.kind.kept == "loose" and len(one.kind.replicas) > 1 for one in found)
    axes = next((one.kind.order for one in found if one.kind.order), ())
    file_parts, attributes = _file_parts(first, replicas=len(groups[0].ranks)), with_order(first.kind.attributes, axes)
    return _Way(tuple(found), tuple(groups), layout, file_parts, peers, compares, attributes, axes)


def _grid_of(way: _Way, placement: Placement) -> tuple[tuple[int, ...], bool]:
    """The extents of chunks, and whether none of them lies in several packs."""
    if placement == "plain":
        return _grid(way.holdings[0]), True
    cutting, replicas = _cutting(way.holdings[0], replicas=len(way.groups[0].ranks))
    return cutting.chunk_shape(replicas=replicas), cutting.keeps_chunks_whole(replicas=replicas)


def _groups(identity: ArrayId, found: Sequence[_Holding]) -> list[_Group]:
    """The groups of ranks that each hold the whole array; more than one only if nobody declared how they belong together."""
    by: dict[tuple[object, ...], list[int]] = {}
    for place, holding in enumerate(found):
        held = holding.kind
        if held.sharing == "placed" and holding.mesh is not None:
            which: tuple[object, ...] = (holding.mesh, held.placements)
        elif held.sharing == "declared":
            which = held.replicas
        else:
            which = ()
        by.setdefault(which, []).append(place)
    groups = []
    for places in by.values():
        holdings = [found[place] for place in places]
        have = sorted(rank for holding in holdings for rank in holding.ranks)
        kind, mesh = holdings[0].kind, holdings[0].mesh
        members = mesh.ranks if mesh is not None else kind.replicas if kind.sharing == "declared" else tuple(have)
        lacking = sorted(set(members) - set(have))
        if lacking:
            raise StructureConflict(
                f"array {identity}: expected on all of the ranks {list(members)} "
                f"(declared by rank {have[0]}), found on {have}; missing on {lacking}"
            )
        # a mesh over other ranks with the same axes is another group (a second pipeline stage, a second replica)
        groups.append(_Group(tuple(members), tuple(places)))
    return sorted(groups, key=lambda group: min(group.ranks))


def _require_agreement(identity: ArrayId, found: Sequence[_Holding]) -> None:
    first = found[0]
    for other in found[1:]:
        for what, mine, theirs in (
            ("shape", first.kind.shape, other.kind.shape),
            ("element type", first.kind.dtype, other.kind.dtype),
            ("attributes", first.kind.attributes, other.kind.attributes),
        ):
            if mine != theirs:
                raise StructureConflict(
                    f"array {identity}: {what} is {mine} on rank {first.ranks[0]} and {theirs} on rank {other.ranks[0]}; "
                    "give different tensors different names"
                )
        if (first.mesh is None) != (other.mesh is None) or (
            first.mesh is not None
            and other.mesh is not None
            and (first.kind.placements, first.mesh.sizes) != (other.kind.placements, other.mesh.sizes)
        ):
            raise StructureConflict(
                f"array {identity}: held in different ways on rank {first.ranks[0]} ({_described(first)}) "
                f"and rank {other.ranks[0]} ({_described(other)}); contents cannot be compared, so give them different names"
            )


def _described(holding: _Holding) -> str:
    if holding.mesh is None:
        return "a plain tensor"
    return f"{', '.join(holding.kind.placements)} on mesh {holding.mesh.name} {holding.mesh.sizes}"


def _grid(holding: _Holding) -> tuple[int, ...]:
    kind = holding.kind
    cuts: tuple[int, ...] = ()
    if holding.mesh is not None:
        cuts = cuts_of(kind.shape, holding.mesh.sizes, kind.placements)
    return chunk_shape(kind.shape, itemsize=dtype_named(kind.dtype).itemsize, cuts=cuts)


def _cutting(holding: _Holding, *, replicas: int) -> tuple[Cutting, int]:
    """How an array is cut in packs, and among how many ranks a box of it is shared out. `replicas`: ranks that hold it as a
    plain tensor."""
    kind = holding.kind
    if holding.mesh is not None:
        replicas = prod(size for size, placement in zip(holding.mesh.sizes, kind.placements, strict=True) if placement == "R")
    whole, itemsize = Box.whole(kind.shape), dtype_named(kind.dtype).itemsize
    sizes = None if holding.mesh is None else holding.mesh.sizes
    cutting = Cutting.of(kind.shape, itemsize, sizes, kind.placements, whole)
    return cutting, replicas if kind.role == "parameter" else 1


def _notes(placement: Placement, arrays: Sequence[ArrayRecord], torn: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of the references to these arrays."""
    if placement == "plain":
        return ()
    if not within_limits(arrays):
        return (f"no {REFERENCES}: there are too many arrays or chunks; `ckpt-convert references` makes it",)
    if not torn:
        return ()
    more = f" and {len(torn) - 3} more" if len(torn) > 3 else ""
    return (f"{REFERENCES} leaves out {', '.join(torn[:3])}{more}: chunks of it lie in the packs of several ranks",)


def _file_parts(holding: _Holding, *, replicas: int) -> int:
    """The most pairs of a chunk file of an array and a rank that writes into it, in placement plain."""
    kind, shards, grid = holding.kind, 1, _grid(holding)
    if holding.mesh is not None:
        split = [size for size, placement in zip(holding.mesh.sizes, kind.placements, strict=True) if placement != "R"]
        shards, replicas = prod(split), prod(holding.mesh.sizes) // max(1, prod(split))
    nbytes = prod(kind.shape) * dtype_named(kind.dtype).itemsize
    shared_out = kind.role == "parameter" and nbytes >= shards * MIN_SPLIT_NBYTES
    chunks = prod(-(-extent // cut) for extent, cut in zip(kind.shape, grid, strict=True) if cut)
    return chunks + shards * (replicas if shared_out else 1) - 1


def _group_heads(specs: Sequence[ArraySpec]) -> Set[int]:
    """Of the arrays of one parameter the one whose document writer also writes the parameter's group document."""
    heads: dict[tuple[str, str], int] = {}
    for place, spec in enumerate(specs):
        identity = spec.id
        if identity.section == "params":
            first = heads.setdefault((identity.item, identity.name), place)
            if identity.state < specs[first].id.state:
                heads[identity.item, identity.name] = place
    return set(heads.values())


def _items(tables: Sequence[StructureTable], ranks: Sequence[tuple[int, ...]], order: Sequence[int]) -> tuple[Item, ...]:
    items: dict[str, tuple[Item, int]] = {}
    for t in order:
        for item in tables[t].items:
            known, rank = items.setdefault(item.name, (item, ranks[t][0]))
            if known.kind != item.kind:
                raise StructureConflict(
                    f"item {item.name!r} of the state is a {known.kind} on rank {rank} and a {item.kind} on rank {ranks[t][0]}"
                )
    return tuple(item for item, _ in items.values())


def _ties(tables: Sequence[StructureTable], order: Sequence[int]) -> tuple[tuple[tuple[str, str], ...], ...]:
    ties: dict[tuple[tuple[str, str], ...], None] = {}
    for t in order:
        ties.update(dict.fromkeys(tables[t].tied))
    return tuple(ties)
