"""From attestations to a committed checkpoint: prove, write index and manifest, rename. Runs on the committer. [SAVE-50..53]"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastickpt.commit.attest import read_attested
from elastickpt.commit.contents import Contents, parts_of
from elastickpt.commit.draft import CONTENTS, Draft, commit
from elastickpt.commit.prove import merge_tables, prove, require_distinct_ranges
from elastickpt.commit.states import Attempt, Event
from elastickpt.errors import CheckpointError, NotDurable
from elastickpt.format.digest import file_digest
from elastickpt.format.documents import upper_documents
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import encode_manifest
from elastickpt.format.features import OWN_ENTRIES, features_used, has_own_entries
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST, index_file
from elastickpt.format.records import (
    ArrayRecord,
    FileDigest,
    IndexEntry,
    IndexPart,
    Manifest,
    OptimizerTable,
)
from elastickpt.format.values import Value
from elastickpt.storage.store import Durability, Store

SYNC_TREE_FILES = 16  # beyond this many one syncfs is cheaper than an fsync of each
SYNC_TREE_ARRAYS = 64  # beyond this many the writers synced the tree a moment ago, and little is left to sync (0.4 ms for 2)


def finish(
    store: Store,
    draft: Draft,
    contents: Contents,
    attested: Sequence[FileDigest],
    *,
    durability: Durability,
    attempt: Attempt,
) -> Manifest:
    """Proves the draft whole and commits it; on return the checkpoint exists, as durable as was asked. Blocking.

    Raises what `record` raises, PathOccupied if the path was taken meanwhile, StorageFailed kinds; unless `attempt.state` is
    committed then, nothing is visible at the path.
    """
    recorded = record(store, draft, contents, attested, durability=durability, attempt=attempt, create=store.create)
    publish(store, draft, durability=durability, attempt=attempt)
    return recorded.manifest


@dataclass(frozen=True, slots=True)
class Recorded:
    """A draft that is whole, and needs only its commit."""

    manifest: Manifest
    digest: str  # of the manifest's file


def record(
    store: Store,
    draft: Draft,
    contents: Contents,
    attested: Sequence[FileDigest],
    *,
    durability: Durability,
    attempt: Attempt,
    create: Callable[[str, bytes], None],
) -> Recorded:
    """Proves the draft whole, and writes index, documents and manifest, as durable as was asked. Blocking.

    Of the same contents and attestations everybody makes the same bytes. Raises CoverageGap, CoverageOverlap,
    StructureConflict or ChecksumMismatch if the draft is not whole, StorageFailed kinds.
    """
    maps = read_attested(store, draft, attested)
    attempt.advance(Event.ATTEST)
    arrays = prove(contents.outline.arrays, maps)
    require_distinct_ranges(maps)
    tables = merge_tables(table for columns in maps for table in columns.tables)
    attempt.advance(Event.PROVE)
    requires = _features(arrays, tables, contents, [columns.values for columns in maps])
    recorded, created = _record(store, draft, contents, (arrays, tables, requires), attested, create)
    if durability == "power":
        many = len(created) > SYNC_TREE_FILES or len(arrays) > SYNC_TREE_ARRAYS
        if many and store.capabilities.tree_sync:
            store.sync_tree()
        else:
            sync_records(store, draft, created)
    attempt.advance(Event.RECORD)
    return recorded


def publish(store: Store, draft: Draft, *, durability: Durability, attempt: Attempt) -> None:
    """The commit by the name of the path, and its durability. Blocking. Raises PathOccupied, StorageFailed kinds."""
    commit(store, draft)
    attempt.advance(Event.PUBLISH)
    if durability == "power":
        sync_name(store, draft)


def sync_name(store: Store, draft: Draft) -> None:
    """The name of a committed path is durable. Raises NotDurable. [SAVE-53]"""
    try:
        store.sync_directory("")
    except CheckpointError as error:
        raise NotDurable(
            f"{store.url}/{draft.name} is committed and whole, but its name may not survive a power cut: {error}"
        ) from error


def _record(
    store: Store,
    draft: Draft,
    contents: Contents,
    proven: tuple[tuple[ArrayRecord, ...], tuple[OptimizerTable, ...], tuple[str, ...]],
    attested: Sequence[FileDigest],
    create: Callable[[str, bytes], None],
) -> tuple[Recorded, Sequence[str]]:
    arrays, tables, requires = proven
    outline = contents.outline
    parts = [IndexPart(part, tables if number == 0 else ()) for number, part in enumerate(parts_of(arrays))]
    entries, created = [], [MANIFEST]
    for number, part in enumerate(parts):
        data = encode_index(part)
        create(draft.path(index_file(number)), data)
        first, last = (part.arrays[0].key, part.arrays[-1].key) if part.arrays else ("", "")
        created.append(index_file(number))
        entries.append(IndexEntry(FileDigest(index_file(number), len(data), file_digest(data)), first, last))
    for path, document in _documents_of(arrays):
        if "/" in path:  # the draft itself is there, or it was aborted, and nobody brings it back
            store.make_directories(draft.path(path).rpartition("/")[0])
        create(draft.path(path), document)
        created.append(path)
    manifest = Manifest(
        attempt=draft.attempt,
        step=contents.step,
        time=contents.time,
        world_size=outline.world_size,
        placement=outline.placement,
        versions=outline.versions,
        items=outline.items,
        meshes=outline.meshes,
        layouts=outline.layouts,
        index=tuple(entries),
        fragments=tuple(attested),
        values=dict(contents.values),
        tied=outline.tied,
        requires=requires,
        layout_text=outline.layout_text,
    )
    data = encode_manifest(manifest)
    create(draft.path(MANIFEST), data)
    for leftover in (DRAFT_TOKEN, CONTENTS):
        store.remove(draft.path(leftover))
    return Recorded(manifest, file_digest(data)), created


def _features(
    arrays: Sequence[ArrayRecord], tables: Sequence[OptimizerTable], contents: Contents, per_rank: Sequence[Value]
) -> tuple[str, ...]:
    """What a reader must know beyond version 1. [UCF-100]"""
    fields = [field for table in tables for field in table.fields]
    attributes = {(name, id(value)): value for array in arrays for name, value in array.attributes}
    values = [dict(contents.values), *per_rank, *(field.values for field in fields), *attributes.values()]
    found = features_used(values, (name for name, _ in attributes), (field.key for field in fields))
    models = (item.name for item in contents.outline.items if item.kind == "module")
    return tuple(sorted((*found, OWN_ENTRIES))) if has_own_entries(models, contents.values) else found


_DOCUMENTS: deque[tuple[tuple[ArrayRecord, ...], tuple[tuple[str, bytes], ...]]] = deque(maxlen=2)


def _documents_of(arrays: tuple[ArrayRecord, ...]) -> tuple[tuple[str, bytes], ...]:
    """The committer's documents; those of the same arrays as a save before are not made again."""
    for known, documents in tuple(_DOCUMENTS):
        if known is arrays:
            return documents
    documents = tuple(upper_documents(arrays))
    _DOCUMENTS.append((arrays, documents))
    return documents


def sync_records(store: Store, draft: Draft, created: Sequence[str]) -> None:
    """What the committer created in the draft is durable."""
    for path in created:
        store.sync_file(draft.path(path))
    # deepest first, the draft folder itself last: a name is durable only when every folder above it is
    directories = {draft.path(path).rpartition("/")[0] for path in created} | {draft.path("fragments")}
    for directory in sorted(directories, key=lambda path: (-path.count("/"), path)):
        store.sync_directory(directory)
    if draft.folder == draft.name:  # of a run: no rename follows, its name must be there before a register says commit [RUN-41]
        store.sync_directory("")
