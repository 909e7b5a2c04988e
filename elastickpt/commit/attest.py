"""What stands in a draft for whoever commits: attestations of writers, and the contents that a committer knows beside.
[SAVE-45, SAVE-85]

A writer attests by its fragment file, created last, when all that it names is durable. A process that is gone, or one that is
late, may have begun a file with the same bytes: it is completed. Contents are an outline, which is that of a structure: one
value, and one text, for every save of it, so that a writer process is sent it once; and the replicated values of one save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.draft import CONTENTS, Draft
from elastickpt.commit.prove import ProofMemory, parts_of
from elastickpt.errors import CheckpointError, ChecksumMismatch, Malformed, MissingFile, PathOccupied, StorageFailed
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import KnownFragments, decode_columns, encode_fragments
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import decode_frame, encode_frame
from elastickpt.format.keys import fragments_file
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, FileDigest, FragmentMap, IndexPart, ManifestFrame
from elastickpt.format.typed_values import TypedValue
from elastickpt.format.version import MAX_FRAGMENTS_NBYTES
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.storage.store import Durability, Store


@dataclass(frozen=True, slots=True)
class Outline:
    """What saves of one structure have in common of manifest and index: the frame, and the arrays in the order of their keys,
    which have no writers yet. `memory` is what was proven of them in the newest save."""

    frame: ManifestFrame
    arrays: tuple[ArrayRecord, ...]
    memory: ProofMemory = field(default_factory=ProofMemory, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DraftContents:
    """One save of a structure. `values` are the replicated ones, by JSON pointer."""

    outline: Outline
    values: Mapping[str, TypedValue]


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


def encode_values(values: Mapping[str, TypedValue]) -> bytes:
    """Replicated values. Raises ValueNotCarried."""
    return encode({pointer: value.text for pointer, value in values.items()})


def decode_values(data: bytes) -> dict[str, TypedValue]:
    """What `encode_values` encoded."""
    return {pointer: TypedValue.told(text, pointer) for pointer, text in decode(data, dict[str, str]).items()}


def decode_contents(encoded: EncodedContents) -> DraftContents:
    """What `encode_outline` and `encode_values` encoded."""
    return DraftContents(decode_outline(encoded.outline), decode_values(encoded.values))


Create = Callable[[str, bytes], None]


def completing(store: Store) -> Create:
    """`store.create`, where another process may have made the file, or a part of it, from the same bytes.

    Its bytes are written again, as only the other one was told what the kernel could not write of them. Any other file is
    an error: the attempt is not ours alone.
    """

    def create(path: str, data: bytes) -> None:
        try:
            return store.create(path, data)
        except PathOccupied:
            found = store.read(path, len(data))
            if not _is_part(found, data):
                raise
        writer = store.open_writer(path, len(data))
        try:
            writer.write(0, memoryview(data))
            writer.sync()
        finally:
            writer.close()

    return create


def _is_part(found: bytes, data: bytes) -> bool:
    """Whether writing `data` may have left this, cut short anywhere; what a second writing had not come to reads as zero."""
    written, wanted = np.frombuffer(found, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8)[: len(found)]
    return bool(np.all((written == wanted) | (written == 0)))


def attest(
    store: Store,
    draft: Draft,
    fragments: FragmentMap | FragmentColumns,
    *,
    durability: Durability,
    create: Callable[[str, bytes], None] | None = None,
) -> FileDigest:
    """Creates the writer's fragment file; on return it is as durable as was asked. Blocking. Raises StorageFailed kinds.

    `create`: in place of `store.create`, for a writer that takes over from one that died meanwhile.
    """
    relative = fragments_file(fragments.writer)
    data = encode_fragments(fragments)
    (create or store.create)(draft.path(relative), data)
    if durability == "power":
        store.sync_file(draft.path(relative))
        store.sync_directory(draft.path("fragments"))
    return FileDigest(relative, len(data), file_digest(data))


def read_attested(
    store: Store, draft: Draft, attested: Sequence[FileDigest], memory: ProofMemory | None = None
) -> tuple[FragmentColumns, ...]:
    """The fragment maps of all writers, by writer, checked against what they said they wrote. Of what is as it was in the save
    before, as the memory has it, only checksums are decoded."""
    maps, known = [], dict[int, KnownFragments]()
    for writer, said in enumerate(attested):
        data = store.read(draft.path(said.path), MAX_FRAGMENTS_NBYTES)
        if file_digest(data) != said.digest:
            raise ChecksumMismatch(
                f"{said.path}: writer {writer} said digest {said.digest} of {said.nbytes} bytes, "
                f"found {file_digest(data)} of {len(data)} in the draft"
            )
        last = None if memory is None else memory.maps.get(writer)
        columns = None if last is None else last.next(data, attempt=draft.attempt, path=said.path)
        if columns is None:
            columns = decode_columns(data, path=said.path)
            last = None if memory is None else KnownFragments.of(columns, data)
        if last is not None:
            known[writer] = last
        if (columns.writer, columns.attempt) != (writer, draft.attempt):
            raise Malformed(
                f"{said.path}: expected writer {writer} of attempt {draft.attempt}, "
                f"found writer {columns.writer} of attempt {columns.attempt}"
            )
        maps.append(columns)
    if memory is not None:
        memory.maps = known if sum(one.nbytes for one in known.values()) <= MAX_KNOWN_NBYTES else {}
    return tuple(maps)


MAX_KNOWN_NBYTES = 64 << 20  # of fragment maps that a committer remembers of one structure
_DIGEST_NBYTES = 32
_LENGTH_NBYTES = 8


def find_attestation(store: Store, attempt: Attempt, member: int) -> FileDigest | None:
    """A writer's attestation in the draft, made durable, if it is there and whole. Blocking. Raises StorageFailed kinds."""
    path = fragments_file(member)
    try:
        data = store.read(attempt.path(path), MAX_FRAGMENTS_NBYTES)
        columns = decode_columns(data, path=path)
    except MissingFile:
        return None
    except StorageFailed:
        raise
    except CheckpointError:
        return None  # begun, and never finished
    if (columns.writer, columns.attempt) != (member, attempt.id):
        return None
    if attempt.durability == "power":
        store.sync_file(attempt.path(path))
        store.sync_directory(attempt.path("fragments"))
    return FileDigest(path, len(data), file_digest(data))


def leave_contents(store: Store, attempt: Attempt, contents: EncodedContents, *, create: Create | None = None) -> None:
    """Puts into the draft what another committer would need. Not durable: after a crash of the host nobody commits it.

    `create`: in place of `store.create`, for a writer that takes over from one that died meanwhile.
    """
    body = len(contents.outline).to_bytes(_LENGTH_NBYTES, "big") + contents.outline + contents.values
    (create or store.create)(attempt.path(CONTENTS), body + file_digest(body).encode())


def left_contents(store: Store, attempt: Attempt) -> DraftContents | None:
    """What `leave_contents` left; None if it is not there, or was not finished."""
    try:
        data = store.read(attempt.path(CONTENTS), MAX_FRAGMENTS_NBYTES)
    except MissingFile:
        return None
    body, digest = data[:-_DIGEST_NBYTES], data[-_DIGEST_NBYTES:]
    if len(body) < _LENGTH_NBYTES or file_digest(body).encode() != digest:
        return None
    middle = _LENGTH_NBYTES + int.from_bytes(body[:_LENGTH_NBYTES], "big")
    return decode_contents(EncodedContents(body[_LENGTH_NBYTES:middle], body[middle:]))
