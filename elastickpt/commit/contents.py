"""What a committer knows of a whole checkpoint beside what the writers attest, as values and as bytes.

The outline is that of a structure: the same value, and the same bytes, for every save of it, so that a writer process is
sent it once. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack

from elastickpt.format.arrays import Mesh
from elastickpt.format.canonical_json import dump
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_index import decode_index, encode_index
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.records import ArrayRecord, FileDigest, IndexEntry, IndexPart, Item, Layout, Manifest, Placement
from elastickpt.format.values import Value, decode_text, encode_value

PART_ARRAYS = 200_000  # of one index part: about 40 MB, below the limit of 64 MiB
_NO_PART = IndexEntry(FileDigest("index.msgpack", 0, "0" * 32), "", "")  # a manifest has at least one


@dataclass(frozen=True, slots=True)
class Outline:
    """What saves of one structure have in common. `arrays` stand in the order of their keys and have no writers yet."""

    world_size: int
    placement: Placement
    versions: tuple[tuple[str, str], ...]
    items: tuple[Item, ...]
    meshes: tuple[Mesh, ...]
    layouts: tuple[Layout, ...]
    arrays: tuple[ArrayRecord, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]
    layout_text: str | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """One save of a structure. `time` in seconds since 1970 is fixed when the attempt begins, so that whoever commits it makes
    the same manifest. `values` are the replicated ones, by JSON pointer."""

    outline: Outline
    step: int | None
    time: float
    values: Mapping[str, Value]


def encode_outline(outline: Outline) -> bytes:
    """Canonical bytes; their digest identifies the outline. Raises ValueNotCarried, LimitExceeded."""
    frame = Manifest(
        attempt="",
        step=None,
        time=0.0,
        world_size=outline.world_size,
        placement=outline.placement,
        versions=outline.versions,
        items=outline.items,
        meshes=outline.meshes,
        layouts=outline.layouts,
        index=(_NO_PART,),
        fragments=(),
        values={},
        tied=outline.tied,
        layout_text=outline.layout_text,
    )
    parts = [encode_index(IndexPart(part)) for part in parts_of(outline.arrays)]
    return bytes(msgpack.packb((encode_manifest(frame), parts)))


def decode_outline(data: bytes) -> Outline:
    """What `encode_outline` encoded."""
    frame, parts = msgpack.unpackb(data, use_list=False)
    found = decode_manifest(frame, path="outline")
    arrays = tuple(record for part in parts for record in decode_index(part, path="outline").arrays)
    return Outline(
        found.world_size,
        found.placement,
        found.versions,
        found.items,
        found.meshes,
        found.layouts,
        arrays,
        found.tied,
        found.layout_text,
    )


def outline_digest(data: bytes) -> str:
    """Identifies an encoded outline."""
    return file_digest(data)


def encode_rest(contents: Contents) -> bytes:
    """The contents without their outline. Raises ValueNotCarried."""
    values = {pointer: dump(encode_value(value, where=pointer)) for pointer, value in contents.values.items()}
    return bytes(msgpack.packb((contents.step, contents.time, values)))


def decode_rest(data: bytes, outline: Outline) -> Contents:
    """The contents that `encode_rest` encoded, of a save with that outline."""
    step, time, values = msgpack.unpackb(data)
    return Contents(outline, step, time, {pointer: decode_text(text, where=pointer) for pointer, text in values.items()})


def parts_of(arrays: tuple[ArrayRecord, ...]) -> list[tuple[ArrayRecord, ...]]:
    """The arrays, parted as the index is; one empty part for none."""
    return [arrays[begin : begin + PART_ARRAYS] for begin in range(0, max(len(arrays), 1), PART_ARRAYS)]
