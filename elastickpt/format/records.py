"""The records of a checkpoint as values: stored pieces, fragment maps, index parts, the manifest.
[UCF-40..83, FRAG-10..28]

How they are spelled on disk is in `encode_*` modules beside this one; here is only what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from elastickpt.format.arrays import ArraySpec, Box, Mesh
from elastickpt.format.values import Value

FORMAT_VERSION = 1
Placement = Literal["plain", "packed"]
FieldKind = Literal["hyper", "scalar", "schedule"]
ItemKind = Literal["module", "optimizer", "stateful", "values"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that pieces lie in: `path` below base 0, this checkpoint, or below the manifest's `bases[base - 1]`."""

    base: int
    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """The part of a box that lies inside one chunk, and where its bytes are. [FRAG-10]

    `array` is the array's key (its path in the tree), `box` is in global coordinates, `file` indexes the map's file
    table. The bytes are `nbytes // row_nbytes` rows of `row_nbytes`, each `row_stride` bytes after the one before;
    `offset` is the first byte's place in the file. A contiguous piece is one row: `row_nbytes == row_stride ==
    nbytes`.
    `checksums`: xxh3-64 of each `block_nbytes` block of the piece's bytes in C order of the piece, the last one
    shorter.
    """

    array: str
    box: Box
    file: int
    offset: int
    nbytes: int
    row_nbytes: int
    row_stride: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """One column of an optimizer table: a value for each parameter, dictionary-coded; -1 is absent.

    `hyper`: a param group's option; `scalar`: a 0-d optimizer state; `schedule`: an entry of a scheduler's list that
    is as long as its optimizer's groups, `key` being "<scheduler item>/<JSON pointer>".
    """

    kind: FieldKind
    key: str
    values: tuple[Value, ...]
    which: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OptimizerTable:
    """What an optimizer holds per parameter and not as an array. `parameters` are (model item, FQN). [UCF-60]"""

    item: str
    parameters: tuple[tuple[str, str], ...]
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class FragmentMap:
    """All that one writer stored; its creation is that writer's attestation. [FRAG-20]"""

    writer: int
    attempt: str
    block_nbytes: int
    files: tuple[StoredFile, ...]
    pieces: tuple[StoredPiece, ...]
    tables: tuple[OptimizerTable, ...] = ()
    values: Value = None  # per-rank values, a mapping from JSON pointer to value; None when there are none


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks held an array: a mesh (by index in the manifest) and one placement an axis: `R`, `S(0)`, `_S(0)`."""

    mesh: int
    placements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArrayRecord:
    """One array in the index. `key` is its path in the tree; `writers` are the writers whose fragment maps hold
    pieces of it.

    `layout` indexes the manifest's layouts, None for a plain tensor. `attributes` are the array's own attributes
    beside item, name and state (`composition`, `true_shape`, `stored_as`, ...).
    """

    spec: ArraySpec
    key: str
    chunk_shape: tuple[int, ...]
    layout: int | None
    writers: tuple[int, ...]
    attributes: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True, slots=True)
class IndexPart:
    """Arrays in the order of their keys, and (in the first part) the optimizer tables merged from all writers."""

    arrays: Sequence[ArrayRecord]
    tables: tuple[OptimizerTable, ...] = ()


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A record file named by the manifest: relative path, size, xxh3-128 as 32 hex digits."""

    path: str
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One part of the index: its file, and the first and last array key in it (both "" when it has none)."""

    file: FileDigest
    first: str
    last: str


@dataclass(frozen=True, slots=True)
class Base:
    """Another checkpoint that pieces may lie in: where, and the xxh3-128 of its manifest."""

    uri: str
    digest: str


@dataclass(frozen=True, slots=True)
class Item:
    """A key of `state` and what stood under it; `type` is the class's name, for people only."""

    name: str
    kind: ItemKind
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFrame:
    """The members of a manifest that all saves of one structure by one release have in common. `tied` lists groups of (item,
    name) that are one tensor in memory."""

    world_size: int
    placement: Placement
    versions: tuple[tuple[str, str], ...]
    items: tuple[Item, ...]
    meshes: tuple[Mesh, ...]
    layouts: tuple[Layout, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...] = ()
    layout_text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(ManifestFrame):
    """`checkpoint.json`: the record that makes a folder a checkpoint. [UCF-70]

    `step` counts completed optimizer steps; `time` is seconds since 1970 UTC. `values` maps the JSON pointer of each replicated
    value to it.
    """

    attempt: str
    step: int | None
    time: float
    index: tuple[IndexEntry, ...]
    fragments: tuple[FileDigest, ...]  # by writer
    values: Value
    bases: tuple[Base, ...] = ()
    requires: tuple[str, ...] = ()
    version: int = field(default=FORMAT_VERSION)
