"""From the structure tables of all ranks to what each rank must know of the others: keys, grids, who shares what. [SAVE-30]

No I/O. Runs on one rank, over the distinct tables only; its result for one table is a value of that table's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from elastickpt.commit.attest import Outline
from elastickpt.errors import StructureConflict
from elastickpt.format.arrays import ArrayId, Box, Mesh
from elastickpt.format.keys import REFERENCES, array_keys
from elastickpt.format.records import ArrayRecord, Item, Layout, ManifestFrame, Placement
from elastickpt.format.values import Value
from elastickpt.layout.grid import chunk_shape
from elastickpt.layout.packs import Cutting
from elastickpt.layout.placement import MIN_SPLIT_NBYTES, cuts_of
from elastickpt.layout.references import within_limits
from elastickpt.saving.request import PLAIN, Placing
from elastickpt.saving.structure import HeldEntry, StructureTable

Attributes = tuple[tuple[str, Value], ...]
AXIS_ORDER = "axis_order"


@dataclass(frozen=True, slots=True)
class SharedArray:
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
    """One table's entry for an array, and the ranks that have that table."""

    table: int
    entry: HeldEntry
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
    holdings: dict[ArrayId, list[_Holding]] = {}
    order = sorted(range(len(tables)), key=lambda t: ranks[t][0])
    for t in order:
        for entry in tables[t].entries:
            mesh = None if entry.mesh is None else tables[t].meshes[entry.mesh]
            holdings.setdefault(entry.spec.id, []).append(_Holding(t, entry, mesh, ranks[t]))
    keys = array_keys(holdings)
    heads = _group_heads(holdings)
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    arrays: list[ArrayRecord] = []
    shared: list[dict[ArrayId, SharedArray]] = [{} for _ in tables]
    ways: dict[object, _Way] = {}
    of_arrays: list[_Way] = []
    for identity, found in holdings.items():
        _require_agreement(identity, found)
        alike = _alike(found)
        if alike not in ways:
            ways[alike] = _way(identity, found, meshes, layouts)
        of_arrays.append(ways[alike])
    file_parts = sum(way.file_parts for way in of_arrays)
    placement = choice.placement(file_parts)
    grids = {way: _grid_of(way, placement) for way in ways.values()}
    torn = [keys[identity] for identity, way in zip(holdings, of_arrays, strict=True) if not grids[way][1]]
    for (identity, found), way in zip(holdings.items(), of_arrays, strict=True):
        key, grid = keys[identity], grids[way][0]
        axes = next((holding.entry.order for holding in found if holding.entry.order), ())
        attributes = with_order(found[0].entry.attributes, axes)
        arrays.append(ArrayRecord(found[0].entry.spec, key, grid, way.layout, (), attributes))
        primary = way.groups[0]
        writer = primary.ranks[sum(key.encode()) % len(primary.ranks)]
        for group in way.groups:
            for place in group.holdings:
                ranks_of = () if found[place].mesh is not None else group.ranks
                rest = (group is primary, way.peers, writer, identity in heads, axes)
                shared[found[place].table][identity] = SharedArray(key, grid, ranks_of, *rest)
    compares = any(way.compares for way in ways.values())
    frame = ManifestFrame(
        world_size=sum(map(len, ranks)),
        placement=placement,
        versions=versions,
        items=_items(tables, ranks, order),
        meshes=tuple(meshes),
        layouts=tuple(layouts),
        tied=_ties(tables, order),
    )
    by_table = tuple(tuple(of[e.spec.id] for e in table.entries) for table, of in zip(tables, shared, strict=True))
    outline = Outline(frame, tuple(sorted(arrays, key=lambda record: record.key)))
    return MergedStructure(outline, by_table, file_parts, compares, _notes(placement, arrays, torn))


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
    """What arrays have in common that are alike in all that `_alike` says; models have many of few kinds. `first`: the first
    holding of the first of them."""

    first: _Holding
    groups: tuple[_Group, ...]
    layout: int | None
    file_parts: int
    peers: tuple[int, ...]
    compares: bool


def _alike(found: Sequence[_Holding]) -> object:
    spec = found[0].entry.spec
    if len(found) == 1:
        table, one = found[0].table, found[0].entry
        return spec.shape, spec.dtype, table, one.mesh, one.placements, one.sharing, one.replicas, one.role, one.kept
    held = (
        (holding.table, one.mesh, one.placements, one.sharing, one.replicas, one.role, one.kept)
        for holding in found
        for one in (holding.entry,)
    )
    return spec.shape, spec.dtype, *held


def _way(identity: ArrayId, found: Sequence[_Holding], meshes: dict[Mesh, int], layouts: dict[Layout, int]) -> _Way:
    first, layout = found[0], None
    if first.mesh is not None:
        number = meshes.setdefault(first.mesh, len(meshes))
        layout = layouts.setdefault(Layout(number, first.entry.placements), len(layouts))
    groups = _groups(identity, found)
    inferred = len(groups) > 1 or (first.entry.sharing == "undeclared" and len(groups[0].ranks) > 1)
    peers = tuple(sorted({rank for group in groups for rank in group.ranks})) if inferred else ()
    compares = inferred or any(one.entry.kept == "loose" and len(one.entry.replicas) > 1 for one in found)
    return _Way(first, tuple(groups), layout, _file_parts(first, replicas=len(groups[0].ranks)), peers, compares)


def _grid_of(way: _Way, placement: Placement) -> tuple[tuple[int, ...], bool]:
    """The extents of chunks, and whether none of them lies in several packs."""
    if placement == "plain":
        return _grid(way.first), True
    cutting, replicas = _cutting(way.first, replicas=len(way.groups[0].ranks))
    return cutting.chunk_shape(replicas=replicas), cutting.keeps_chunks_whole(replicas=replicas)


def _groups(identity: ArrayId, found: Sequence[_Holding]) -> list[_Group]:
    """The groups of ranks that each hold the whole array; more than one only if nobody declared how they belong together."""
    by: dict[tuple[object, ...], list[int]] = {}
    for place, holding in enumerate(found):
        entry = holding.entry
        if entry.sharing == "placed" and holding.mesh is not None:
            kind: tuple[object, ...] = (holding.mesh, entry.placements)
        elif entry.sharing == "declared":
            kind = entry.replicas
        else:
            kind = ()
        by.setdefault(kind, []).append(place)
    groups = []
    for places in by.values():
        holdings = [found[place] for place in places]
        have = sorted(rank for holding in holdings for rank in holding.ranks)
        entry, mesh = holdings[0].entry, holdings[0].mesh
        members = mesh.ranks if mesh is not None else entry.replicas if entry.sharing == "declared" else tuple(have)
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
            ("shape", first.entry.spec.shape, other.entry.spec.shape),
            ("element type", first.entry.spec.dtype, other.entry.spec.dtype),
            ("attributes", first.entry.attributes, other.entry.attributes),
        ):
            if mine != theirs:
                raise StructureConflict(
                    f"array {identity}: {what} is {mine} on rank {first.ranks[0]} and {theirs} on rank {other.ranks[0]}; "
                    "give different tensors different names"
                )
        if (first.mesh is None) != (other.mesh is None) or (
            first.mesh is not None
            and other.mesh is not None
            and (first.entry.placements, first.mesh.sizes) != (other.entry.placements, other.mesh.sizes)
        ):
            raise StructureConflict(
                f"array {identity}: held in different ways on rank {first.ranks[0]} ({_described(first)}) "
                f"and rank {other.ranks[0]} ({_described(other)}); contents cannot be compared, so give them different names"
            )


def _described(holding: _Holding) -> str:
    if holding.mesh is None:
        return "a plain tensor"
    return f"{', '.join(holding.entry.placements)} on mesh {holding.mesh.name} {holding.mesh.sizes}"


def _grid(holding: _Holding) -> tuple[int, ...]:
    spec = holding.entry.spec
    cuts: tuple[int, ...] = ()
    if holding.mesh is not None:
        cuts = cuts_of(spec.shape, holding.mesh.sizes, holding.entry.placements)
    return chunk_shape(spec.shape, itemsize=spec.type.itemsize, cuts=cuts)


def _cutting(holding: _Holding, *, replicas: int) -> tuple[Cutting, int]:
    """How an array is cut in packs, and among how many ranks a box of it is shared out. `replicas`: ranks that hold it as a
    plain tensor."""
    entry = holding.entry
    if holding.mesh is not None:
        replicas = prod(size for size, placement in zip(holding.mesh.sizes, entry.placements, strict=True) if placement == "R")
    whole, itemsize = Box.whole(entry.spec.shape), entry.spec.type.itemsize
    sizes = None if holding.mesh is None else holding.mesh.sizes
    cutting = Cutting.of(entry.spec.shape, itemsize, sizes, entry.placements, whole)
    return cutting, replicas if entry.role == "parameter" else 1


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
    spec, shards, grid = holding.entry.spec, 1, _grid(holding)
    if holding.mesh is not None:
        split = [size for size, placement in zip(holding.mesh.sizes, holding.entry.placements, strict=True) if placement != "R"]
        shards, replicas = prod(split), prod(holding.mesh.sizes) // max(1, prod(split))
    shared_out = holding.entry.role == "parameter" and spec.nbytes >= shards * MIN_SPLIT_NBYTES
    chunks = prod(-(-extent // cut) for extent, cut in zip(spec.shape, grid, strict=True) if cut)
    return chunks + shards * (replicas if shared_out else 1) - 1


def _group_heads(holdings: Mapping[ArrayId, object]) -> set[ArrayId]:
    """Of the arrays of one parameter the one whose document writer also writes the parameter's group document."""
    heads: dict[tuple[str, str], ArrayId] = {}
    for identity in sorted(holdings):
        if identity.section == "params":
            heads.setdefault((identity.item, identity.name), identity)
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
