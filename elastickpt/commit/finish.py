"""From attestations to a committed checkpoint: prove, write index and manifest, rename. Runs on the committer. [SAVE-50..53]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastickpt.commit.attest import read_attested
from elastickpt.commit.draft import TOKEN, Draft, commit
from elastickpt.commit.prove import merge_tables, prove, require_distinct_ranges
from elastickpt.commit.states import Attempt, Event
from elastickpt.errors import CheckpointError, StorageFailed
from elastickpt.format.arrays import Mesh
from elastickpt.format.digest import file_digest
from elastickpt.format.documents import upper_documents
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import encode_manifest
from elastickpt.format.keys import MANIFEST, index_file
from elastickpt.format.records import (
    ArrayRecord,
    FileDigest,
    IndexEntry,
    IndexPart,
    Item,
    Layout,
    Manifest,
    OptimizerTable,
    Placement,
)
from elastickpt.format.values import Value
from elastickpt.storage.store import Durability, Store

SYNC_TREE_FILES = 16  # beyond this many one syncfs is cheaper than an fsync of each
SYNC_TREE_ARRAYS = 64  # beyond this many the writers synced the tree a moment ago, and little is left to sync (0.4 ms for 2)
PART_ARRAYS = 200_000  # of one index part: about 40 MB, below the limit of 64 MiB


@dataclass(frozen=True, slots=True)
class Contents:
    """What the committer knows of the whole checkpoint beside what the writers attest. `arrays` have no writers yet."""

    step: int | None
    time: float
    world_size: int
    placement: Placement
    versions: tuple[tuple[str, str], ...]
    items: tuple[Item, ...]
    meshes: tuple[Mesh, ...]
    layouts: tuple[Layout, ...]
    arrays: tuple[ArrayRecord, ...]
    tied: tuple[tuple[tuple[str, str], ...], ...]
    values: Value


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

    Raises CoverageGap, CoverageOverlap, StructureConflict or ChecksumMismatch if the draft is not whole, PathOccupied if the
    path was taken meanwhile, StorageFailed kinds; unless `attempt.state` is committed then, nothing is visible at the path.
    """
    maps = read_attested(store, draft, attested)
    attempt.advance(Event.ATTEST)
    arrays = prove(contents.arrays, maps)
    require_distinct_ranges(maps)
    tables = merge_tables(table for columns in maps for table in columns.tables)
    attempt.advance(Event.PROVE)
    manifest, created = _record(store, draft, contents, arrays, tables, attested)
    if durability == "power":
        many = len(created) > SYNC_TREE_FILES or len(arrays) > SYNC_TREE_ARRAYS
        if many and store.capabilities.tree_sync:
            store.sync_tree()
        else:
            _sync_records(store, draft, created)
    attempt.advance(Event.RECORD)
    commit(store, draft)
    attempt.advance(Event.PUBLISH)
    if durability == "power":
        try:
            store.sync_directory("")
        except CheckpointError as error:
            raise StorageFailed(
                f"{store.url}/{draft.name} is committed and whole, but its name may not survive a power cut: {error}"
            ) from error
    return manifest


def _record(
    store: Store,
    draft: Draft,
    contents: Contents,
    arrays: tuple[ArrayRecord, ...],
    tables: tuple[OptimizerTable, ...],
    attested: Sequence[FileDigest],
) -> tuple[Manifest, Sequence[str]]:
    parts = [
        IndexPart(arrays[begin : begin + PART_ARRAYS], tables if begin == 0 else ())
        for begin in range(0, max(len(arrays), 1), PART_ARRAYS)
    ]
    entries, created = [], [MANIFEST]
    for number, part in enumerate(parts):
        data = encode_index(part)
        store.create(draft.path(index_file(number)), data)
        first, last = (part.arrays[0].key, part.arrays[-1].key) if part.arrays else ("", "")
        created.append(index_file(number))
        entries.append(IndexEntry(FileDigest(index_file(number), len(data), file_digest(data)), first, last))
    for path, document in upper_documents(arrays):
        store.make_directories(draft.path(path).rpartition("/")[0])
        store.create(draft.path(path), document)
        created.append(path)
    manifest = Manifest(
        attempt=draft.attempt,
        step=contents.step,
        time=contents.time,
        world_size=contents.world_size,
        placement=contents.placement,
        versions=contents.versions,
        items=contents.items,
        meshes=contents.meshes,
        layouts=contents.layouts,
        index=tuple(entries),
        fragments=tuple(attested),
        values=contents.values,
        tied=contents.tied,
    )
    store.create(draft.path(MANIFEST), encode_manifest(manifest))
    store.remove(draft.path(TOKEN))
    return manifest, created


def _sync_records(store: Store, draft: Draft, created: Sequence[str]) -> None:
    for path in created:
        store.sync_file(draft.path(path))
    # deepest first, the draft folder itself last: a name is durable only when every folder above it is
    directories = {draft.path(path).rpartition("/")[0] for path in created} | {draft.path("fragments")}
    for directory in sorted(directories, key=lambda path: (-path.count("/"), path)):
        store.sync_directory(directory)
