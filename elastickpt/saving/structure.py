"""What a rank tells the others about what it holds: its structure table. No contents, no coordinates.

Ranks that do the same thing at other coordinates of a mesh have the same table, so a job has a handful of distinct ones
(one a pipeline stage, say); only those travel, and only when a hash is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

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
from elastickpt.training.held import Kept, LiveState, Role, Sharing


@dataclass(frozen=True, slots=True)
class HeldKind:
    """How a rank holds arrays that are alike in all but their names, without the rank's coordinate. `mesh` indexes the table's
    meshes, None for plain tensors."""

    shape: tuple[int, ...]
    dtype: str
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
    """All of one rank, in the order of its `LiveState.arrays`: array k is `specs[k]`, held as `kinds[which[k]]` says."""

    specs: tuple[ArraySpec, ...]
    kinds: tuple[HeldKind, ...]
    which: tuple[int, ...]
    meshes: tuple[Mesh, ...]
    items: tuple[Item, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]


def table_of(live: LiveState) -> StructureTable:
    """The structure of a live state. Raises ValueNotCarried for a name or an attribute that no checkpoint carries."""
    for item in live.items:
        _require_name(item.name, f"key {item.name!r} of `state`")
    try:
        checked_names([name for held in live.arrays for name in (held.spec.id.name, held.spec.id.state)])
    except Unsafe:
        for held in live.arrays:
            for name in (held.spec.id.name, held.spec.id.state):
                _require_name(name, f"tensor {held.spec.id.item!r}/{held.spec.id.name[:80]!r}")
    meshes: dict[Mesh, int] = {}
    kinds: list[HeldKind] = []
    numbers: dict[object, int] = {}
    known: dict[object, int] = {}  # by the very mesh, as a comparison goes through all of its ranks
    which: list[int] = []
    for held in live.arrays:
        mesh = held.mesh
        alike = (_HOW(held), held.attributes and _texts(held.attributes, str(held.spec.id)))
        number = known.get((id(mesh), alike))
        if number is None:
            laid = None if mesh is None else meshes.setdefault(mesh, len(meshes))
            number = known[id(mesh), alike] = numbers.setdefault((laid, alike), len(kinds))
            if number == len(kinds):
                rest = (laid, held.placements, held.replicas, held.attributes, held.kept, held.order)
                kinds.append(HeldKind(held.spec.shape, held.spec.dtype, held.role, held.sharing, *rest))
        which.append(number)
    specs = tuple(held.spec for held in live.arrays)
    return StructureTable(specs, tuple(kinds), tuple(which), tuple(meshes), live.items, live.tied)


_HOW = attrgetter("spec.shape", "spec.dtype", "role", "sharing", "placements", "replicas", "kept", "order")


def _texts(attributes: tuple[tuple[str, Value], ...], where: str) -> tuple[tuple[str, str], ...]:
    return tuple((key, dump(encode_value(value, where=f"{where}, attribute {key}"))) for key, value in attributes)


def _require_name(name: str, where: str) -> None:
    try:
        checked_name(name)
    except Unsafe as error:
        raise ValueNotCarried(f"{where}: {error.message}") from error


class _Kind(Message, frozen=True):
    """A `HeldKind` in a message; values of attributes are typed JSON text."""

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

    ids: tuple[tuple[Section, str, str, str], ...]
    kinds: tuple[_Kind, ...]
    which: tuple[int, ...]
    meshes: tuple[Mesh, ...]
    items: tuple[Item, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]


def encode_table(table: StructureTable) -> bytes:
    """Canonical bytes: equal tables give equal bytes, so their digest identifies them."""
    kinds = tuple(
        _Kind(k.shape, k.dtype, k.role, k.sharing, k.mesh, k.placements, k.replicas, _texts(k.attributes, ""), k.kept, k.order)
        for k in table.kinds
    )
    ids = tuple((one.section, one.item, one.name, one.state) for spec in table.specs for one in (spec.id,))
    return encode(_Table(ids, kinds, table.which, table.meshes, table.items, table.tied))


def decode_table(data: bytes) -> StructureTable:
    """What `encode_table` encoded."""
    told = decode(data, _Table)
    kinds = tuple(_decode_kind(kind) for kind in told.kinds)
    specs = tuple(
        ArraySpec(ArrayId(*id_), kinds[number].shape, kinds[number].dtype)
        for id_, number in zip(told.ids, told.which, strict=True)
    )
    return StructureTable(specs, kinds, told.which, told.meshes, told.items, told.tied)


def _decode_kind(k: _Kind) -> HeldKind:
    attributes = tuple((key, decode_text(value, where=key)) for key, value in k.attributes)
    rest = (k.mesh, k.placements, k.replicas, attributes, k.kept, k.order)
    return HeldKind(k.shape, k.dtype, k.role, k.sharing, *rest)


def table_digest(data: bytes) -> str:
    """Identifies an encoded table."""
    return file_digest(data)
