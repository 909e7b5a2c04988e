"""What a committer knows of a whole checkpoint beside what the writers attest, as values and as bytes.

The outline is that of a structure: one value, and one text, for every save of it, so that a writer process is sent it once.
No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastickpt.commit.prove import ProofMemory
from elastickpt.format.canonical_json import dump
from elastickpt.format.decode_values import decode_text
from elastickpt.format.encode_index import decode_index, encode_index
from elastickpt.format.encode_manifest import decode_frame, encode_frame
from elastickpt.format.encode_values import encode_value
from elastickpt.format.records import ArrayRecord, Frame, IndexPart
from elastickpt.format.values import Value
from elastickpt.ranks.messages import Message, decode, encode

PART_ARRAYS = 200_000  # of one index part: about 40 MB, below the limit of 64 MiB


@dataclass(frozen=True, slots=True)
class Outline:
    """What saves of one structure have in common of manifest and index: the frame, and the arrays in the order of their keys,
    which have no writers yet. `memory` is what was proven of them in the newest save."""

    frame: Frame
    arrays: tuple[ArrayRecord, ...]
    memory: ProofMemory = field(default_factory=ProofMemory, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Contents:
    """One save of a structure. `values` are the replicated ones, by JSON pointer."""

    outline: Outline
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class EncodedContents:
    """Contents as they go to another committer: `encode_outline` and `encode_values`."""

    outline: bytes
    values: bytes


class _Outline(Message, frozen=True):
    """An outline in a message: a frame and the parts of an index, as they are on disk."""

    frame: bytes
    parts: tuple[bytes, ...]


def encode_outline(outline: Outline) -> bytes:
    """Canonical bytes; their digest identifies the outline. Raises ValueNotCarried, LimitExceeded, or what a reader of the
    manifest raises for a member that no reader would take."""
    parts = tuple(encode_index(IndexPart(part)) for part in parts_of(outline.arrays))
    return encode(_Outline(encode_frame(outline.frame), parts))


def decode_outline(data: bytes) -> Outline:
    """What `encode_outline` encoded."""
    told = decode(data, _Outline)
    arrays = tuple(record for part in told.parts for record in decode_index(part, path="outline").arrays)
    return Outline(decode_frame(told.frame, path="outline"), arrays)


def encode_values(values: Mapping[str, Value]) -> bytes:
    """Replicated values. Raises ValueNotCarried."""
    return encode({pointer: dump(encode_value(value, where=pointer)) for pointer, value in values.items()})


def decode_values(data: bytes) -> dict[str, Value]:
    """What `encode_values` encoded."""
    return {pointer: decode_text(text, where=pointer) for pointer, text in decode(data, dict[str, str]).items()}


def decode_contents(encoded: EncodedContents) -> Contents:
    """What `encode_outline` and `encode_values` encoded."""
    return Contents(decode_outline(encoded.outline), decode_values(encoded.values))


def parts_of(arrays: tuple[ArrayRecord, ...]) -> list[tuple[ArrayRecord, ...]]:
    """The arrays, parted as the index is; one empty part for none."""
    return [arrays[begin : begin + PART_ARRAYS] for begin in range(0, max(len(arrays), 1), PART_ARRAYS)]
