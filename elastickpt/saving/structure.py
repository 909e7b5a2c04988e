"""What a rank tells the others about what it holds: its structure table. No contents, no coordinates.

Ranks that do the same thing at other coordinates of a mesh have the same table, so a job has a handful of distinct ones
(one a pipeline stage, say); only those travel, and only when a hash is new.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastickpt.errors import Unsafe, ValueNotCarried
from elastickpt.format.arrays import ArrayId, ArraySpec, Mesh, Section
from elastickpt.format.canonical_json import dump
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_values import encode_value
from elastickpt.format.keys import checked_name, checked_names
from elastickpt.format.long_texts import decode_text
from elastickpt.format.records import Item
from elastickpt.format.values import Value
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.training.held import HeldArray, Kept, LiveState, Role, Sharing


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """One array as a rank holds it, without the rank's coordinate. `mesh` indexes the table's meshes, None for a plain one."""

    spec: ArraySpec
    role: Role
    sharing: Sharing
    mesh: int | None
    placements: tuple[str, ...]
    replicas: tuple[int, ...]
    attributes: tuple[tuple[str, Value], ...]
    kept: Kept
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StructureTable:
    """All of one rank, in the order of its `LiveState.arrays`."""

    entries: tuple[HeldEntry, ...]
    meshes: tuple[Mesh, ...]
    items: tuple[Item, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]


def table_of(live: LiveState) -> StructureTable:
    """The structure of a live state. Raises ValueNotCarried for a name that no checkpoint carries."""
    for item in live.items:
        _require_name(item.name, f"key {item.name!r} of `state`")
    try:
        checked_names([name for held in live.arrays for name in (held.spec.id.name, held.spec.id.state)])
    except Unsafe:
        for held in live.arrays:
            for name in (held.spec.id.name, held.spec.id.state):
                _require_name(name, f"tensor {held.spec.id.item!r}/{held.spec.id.name[:80]!r}")
    meshes: dict[Mesh, int] = {}

    def entry(held: HeldArray) -> HeldEntry:
        mesh = None if held.mesh is None else meshes.setdefault(held.mesh, len(meshes))
        how = (held.role, held.sharing, mesh, held.placements, held.replicas)
        return HeldEntry(held.spec, *how, held.attributes, held.kept, held.order)

    entries = tuple(entry(held) for held in live.arrays)
    return StructureTable(entries, tuple(meshes), live.items, live.tied)


def _require_name(name: str, where: str) -> None:
    try:
        checked_name(name)
    except Unsafe as error:
        raise ValueNotCarried(f"{where}: {error.message}") from error


class _Entry(Message, frozen=True):
    """A `HeldEntry` in a message; values of attributes are typed JSON text."""

    id: tuple[Section, str, str, str]
    shape: tuple[int, ...]
    dtype: str
    role: Role
    sharing: Sharing
    mesh: int | None
    placements: tuple[str, ...]
    replicas: tuple[int, ...]
    attributes: tuple[tuple[str, str], ...]
    kept: Kept
    order: tuple[int, ...]


class _Table(Message, frozen=True):
    """A `StructureTable` in a message."""

    entries: tuple[_Entry, ...]
    meshes: tuple[Mesh, ...]
    items: tuple[Item, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]


def encode_table(table: StructureTable) -> bytes:
    """Canonical bytes: equal tables give equal bytes, so their digest identifies them."""
    entries = tuple(
        _Entry(
            (e.spec.id.section, e.spec.id.item, e.spec.id.name, e.spec.id.state),
            e.spec.shape,
            e.spec.dtype,
            e.role,
            e.sharing,
            e.mesh,
            e.placements,
            e.replicas,
            tuple((key, dump(encode_value(value, where=f"{e.spec.id}, attribute {key}"))) for key, value in e.attributes),
            e.kept,
            e.order,
        )
        for e in table.entries
    )
    return encode(_Table(entries, table.meshes, table.items, table.tied))


def decode_table(data: bytes) -> StructureTable:
    """What `encode_table` encoded."""
    table = decode(data, _Table)
    entries = tuple(
        HeldEntry(
            ArraySpec(ArrayId(*e.id), e.shape, e.dtype),
            e.role,
            e.sharing,
            e.mesh,
            e.placements,
            e.replicas,
            tuple((key, decode_text(value, where=key)) for key, value in e.attributes),
            e.kept,
            e.order,
        )
        for e in table.entries
    )
    return StructureTable(entries, table.meshes, table.items, table.tied)


def table_digest(data: bytes) -> str:
    """Identifies an encoded table."""
    return file_digest(data)
