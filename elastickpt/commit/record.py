"""From attestations to a draft that is whole: the proof, then index, documents and manifest. Runs on the committer. [SAVE-50,
SAVE-51]

Of the same contents and attestations every committer makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import DraftContents, completing, read_attested
from elastickpt.commit.draft import LEFTOVERS
from elastickpt.commit.prove import Proof, ProofMemory, merge_tables, prove, references_to, require_distinct_ranges
from elastickpt.errors import Uncommitted
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import file_digest
from elastickpt.format.documents import upper_documents
from elastickpt.format.encode_index import with_tables
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest_with, manifest_in
from elastickpt.format.keys import MANIFEST, REFERENCES, attempt_of_pack, index_file
from elastickpt.format.records import (
    ArrayRecord,
    FileDigest,
    IndexEntry,
    Manifest,
    OptimizerTable,
)
from elastickpt.format.values import Value
from elastickpt.format.version import MAX_MANIFEST_NBYTES, OWN_ENTRIES, PACKS, features_in, features_used, has_own_entries
from elastickpt.storage.store import Store

SYNC_TREE_FILES = 16  # beyond this many one syncfs is cheaper than an fsync of each
SYNC_TREE_ARRAYS = 64  # beyond this many the writers synced the tree a moment ago, and little is left to sync (0.4 ms for 2)


@dataclass(frozen=True, slots=True)
class Proven:
    """What the writers attested: every element of every array once."""

    arrays: tuple[ArrayRecord, ...]
    tables: tuple[OptimizerTable, ...]
    requires: tuple[str, ...]
    references: str | None = None  # the text of `references.json`, if there is to be one


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a checkpoint, which stand there, and are as durable as was asked."""

    manifest: Manifest  # where this process made it, without the values
    digest: str  # of the manifest's file
    arrays: tuple[ArrayRecord, ...]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(one.spec.nbytes for one in self.arrays)


def prove_draft(store: Store, attempt: Attempt, contents: DraftContents, files: Sequence[FileDigest]) -> Proven:
    """Reads what each writer attested, by writer, and proves it whole. Blocking.

    Raises CoverageGap, CoverageOverlap, StructureConflict or ChecksumMismatch if it is not, StorageFailed kinds.
    """
    outline = contents.outline
    maps = read_attested(store, attempt.draft, files, outline.memory)
    arrays = prove(outline.arrays, maps, outline.memory)
    require_distinct_ranges(maps, outline.memory)
    tables = merge_tables(table for columns in maps for table in columns.tables)
    requires = _features(arrays, tables, contents, [columns.values for columns in maps])
    if any(attempt_of_pack(file.path) for columns in maps for file in columns.files):
        requires = tuple(sorted((*requires, PACKS)))
    packed = outline.frame.placement == "packed"
    references = references_to(arrays, maps, attempt.id, outline.memory) if packed else None
    return Proven(arrays, tables, requires, references)


def write_records(
    store: Store, attempt: Attempt, contents: DraftContents, files: Sequence[FileDigest], proven: Proven
) -> Records:
    """Index, documents and manifest stand in the draft, which needs only its commit, as durable as was asked. Blocking.

    What another committer began of them is completed. Raises StorageFailed kinds.
    """
    entries, created = _write_index(store, attempt, proven, contents.outline.memory)
    plain = contents.outline.frame.placement == "plain"
    if plain:
        created += _write_documents(store, attempt, _documents_of(proven, contents.outline.memory))
    elif proven.references is not None:
        completing(store)(attempt.path(REFERENCES), proven.references.encode("ascii"))
        created.append(REFERENCES)
    manifest = manifest_in(
        contents.outline.frame,
        attempt=attempt.id,
        step=attempt.step,
        time=attempt.time,
        index=entries,
        fragments=tuple(files),
        values={},
        requires=proven.requires,
    )
    data = encode_manifest_with(manifest, contents.outline.memory.newest(contents.values))
    completing(store)(attempt.path(MANIFEST), data)
    for leftover in LEFTOVERS:
        store.remove(attempt.path(leftover))
    if attempt.durability == "power":
        many = len(created) >= SYNC_TREE_FILES or len(proven.arrays) > SYNC_TREE_ARRAYS
        if many and plain and store.capabilities.tree_sync:  # writers of packs sync their own files alone
            store.sync_tree()
        else:
            sync_records(store, attempt, [MANIFEST, *created])
    return Records(manifest, file_digest(data), proven.arrays)


def find_records(store: Store, attempt: Attempt) -> Records:
    """The records that another committer made in the draft, whole, and made durable. Blocking. Raises MissingFile, Damaged
    kinds."""
    found = read_records(store, attempt.draft.folder)
    if found.manifest.attempt != attempt.id:
        raise Uncommitted(f"{attempt.where}: the draft holds the manifest of attempt {found.manifest.attempt}")
    if attempt.durability == "power":
        derived = [REFERENCES] if store.exists(attempt.path(REFERENCES)) else []
        sync_records(store, attempt, [MANIFEST, *(entry.file.path for entry in found.manifest.index), *derived])
    return found


def read_records(store: Store, folder: str) -> Records:
    """The records below a folder. Blocking. Raises MissingFile, Damaged kinds."""
    data = store.read(f"{folder}/{MANIFEST}", MAX_MANIFEST_NBYTES)
    manifest = decode_manifest(data, path=MANIFEST)
    files = [entry.file.path for entry in manifest.index]
    parts = [decode_index(store.read(f"{folder}/{path}", MAX_MANIFEST_NBYTES), path=path) for path in files]
    return Records(manifest, file_digest(data), tuple(record for part in parts for record in part.arrays))


def _write_index(
    store: Store, attempt: Attempt, proven: Proven, memory: ProofMemory
) -> tuple[tuple[IndexEntry, ...], list[str]]:
    known = memory.last
    proof = known if known is not None and known.arrays is proven.arrays else Proof((), proven.arrays)
    entries, created = [], []
    for number, (part, columns) in enumerate(proof.index):
        data = with_tables(columns, proven.tables if number == 0 else ())
        completing(store)(attempt.path(index_file(number)), data)
        first, last = (part[0].key, part[-1].key) if part else ("", "")
        created.append(index_file(number))
        entries.append(IndexEntry(FileDigest(index_file(number), len(data), file_digest(data)), first, last))
    return tuple(entries), created


def _documents_of(proven: Proven, memory: ProofMemory) -> Sequence[tuple[str, bytes]]:
    """The committer's documents; those of the same arrays as in a save before are not made again."""
    last = memory.last
    return last.documents if last is not None and last.arrays is proven.arrays else tuple(upper_documents(proven.arrays))


def _write_documents(store: Store, attempt: Attempt, documents: Sequence[tuple[str, bytes]]) -> list[str]:
    created = []
    for path, document in documents:
        if "/" in path:  # the draft itself is there, or it was aborted, and nobody brings it back
            store.make_directories(attempt.path(path).rpartition("/")[0])
        completing(store)(attempt.path(path), document)
        created.append(path)
    return created


def _features(
    arrays: Sequence[ArrayRecord], tables: Sequence[OptimizerTable], contents: DraftContents, per_rank: Sequence[Value]
) -> tuple[str, ...]:
    """What a reader must know beyond version 1. [UCF-100]"""
    fields = [field for table in tables for field in table.fields]
    attributes = {(name, id(value)): value for array in arrays for name, value in array.attributes}
    values = [*per_rank, *(field.values for field in fields), *attributes.values()]
    found = features_used(values, (name for name, _ in attributes), (field.key for field in fields))
    found = tuple(sorted({*found, *(feature for one in contents.values.values() for feature in features_in(one.text))}))
    models = (item.name for item in contents.outline.frame.items if item.kind == "module")
    return tuple(sorted((*found, OWN_ENTRIES))) if has_own_entries(models, contents.values) else found


def sync_records(store: Store, attempt: Attempt, created: Sequence[str]) -> None:
    """What the committer created in the draft is durable."""
    draft = attempt.draft
    for path in created:
        store.sync_file(draft.path(path))
    # deepest first, the draft folder itself last: a name is durable only when every folder above it is
    directories = {draft.path(path).rpartition("/")[0] for path in created} | {draft.path("fragments")}
    for directory in sorted(directories, key=lambda path: (-path.count("/"), path)):
        store.sync_directory(directory)
    if draft.folder == draft.name:  # of a run: no rename follows, its name must be there before a register says commit [RUN-41]
        store.sync_directory("")
