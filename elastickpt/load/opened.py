"""A committed checkpoint's records, opened and checked: manifest, index, fragment maps. Needs no torch. [UCF-70..79]"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from elastickpt.commit.draft import TOKEN, is_draft
from elastickpt.errors import (
    CheckpointError,
    ChecksumMismatch,
    Malformed,
    MissingFile,
    NotACheckpoint,
    Uncommitted,
    Unsupported,
    WrongLength,
)
from elastickpt.format.arrays import ArrayId
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.format.encode_index import decode_index
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import MANIFEST
from elastickpt.format.limits import MAX_FRAGMENTS_NBYTES, MAX_MANIFEST_NBYTES
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, FileDigest, IndexPart, Manifest
from elastickpt.format.values import Value
from elastickpt.storage.opening import locate
from elastickpt.storage.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class _Cache:
    """Fragment maps read so far; several threads may ask."""

    lock: threading.Lock
    maps: dict[int, FragmentColumns]


class Opened:
    """A checkpoint whose manifest was read and checked; the rest is read, and checked, when it is asked for."""

    def __init__(self, store: Store, name: str, manifest: Manifest) -> None:
        self.store = store
        self.name = name
        self.manifest = manifest
        self._fragments = _Cache(threading.Lock(), {})

    def path(self, relative: str) -> str:
        """Where a file of this checkpoint stands in its store."""
        return f"{self.name}/{relative}"

    @cached_property
    def parts(self) -> tuple[IndexPart, ...]:
        """All parts of the index. Raises Damaged kinds naming the part."""
        parts = []
        for entry in self.manifest.index:
            part = decode_index(self.record(entry.file, MAX_MANIFEST_NBYTES), path=entry.file.path)
            ends = (part.arrays[0].key, part.arrays[-1].key) if part.arrays else ("", "")
            if ends != (entry.first, entry.last):
                raise Malformed(
                    f"{entry.file.path}: expected arrays {entry.first!r} to {entry.last!r} (in the manifest), found {ends}"
                )
            for record in part.arrays:
                _require_known(record, self.manifest, entry.file.path)
            parts.append(part)
        return tuple(parts)

    @cached_property
    def records(self) -> Mapping[ArrayId, ArrayRecord]:
        """Every array, by id, in the order of keys."""
        records: dict[ArrayId, ArrayRecord] = {}
        for record in (record for part in self.parts for record in part.arrays):
            twin = records.setdefault(record.spec.id, record)
            if twin is not record:
                raise Malformed(f"index: array {record.spec.id} stands twice, under {twin.key!r} and {record.key!r}")
        return MappingProxyType(records)

    @cached_property
    def by_key(self) -> Mapping[str, ArrayRecord]:
        """Every array, by its path in the tree."""
        return MappingProxyType({record.key: record for record in self.records.values()})

    def fragments(self, writer: int) -> FragmentColumns:
        """One writer's fragment map; read once. Raises Damaged kinds naming the file."""
        with self._fragments.lock:
            known = self._fragments.maps.get(writer)
        if known is not None:
            return known
        if not 0 <= writer < len(self.manifest.fragments):
            raise Malformed(f"index: writer {writer} is not in the manifest, which has {len(self.manifest.fragments)}")
        said = self.manifest.fragments[writer]
        columns = decode_columns(self.record(said, MAX_FRAGMENTS_NBYTES), path=said.path)
        if (columns.writer, columns.attempt) != (writer, self.manifest.attempt):
            raise Malformed(
                f"{said.path}: expected writer {writer} of attempt {self.manifest.attempt} (in the manifest), "
                f"found writer {columns.writer} of attempt {columns.attempt}"
            )
        for file in columns.files:
            if file.base:
                raise Unsupported(f"{said.path}: file {file.path!r} lies in another checkpoint, which no caller named")
        with self._fragments.lock:
            return self._fragments.maps.setdefault(writer, columns)

    def stored_by(self, writer: int) -> Iterator[ArrayRecord]:
        """The arrays that a writer stored pieces of. Raises Malformed for one that the index lacks."""
        for key in self.fragments(writer).pieces.arrays:
            if key not in self.by_key:
                raise Malformed(f"{self.manifest.fragments[writer].path}: has pieces of array {key}, which is not in the index")
            yield self.by_key[key]

    def all_fragments(self) -> Iterator[FragmentColumns]:
        """Every writer's fragment map, by writer."""
        for writer in range(len(self.manifest.fragments)):
            yield self.fragments(writer)

    def per_rank(self, writer: int) -> Mapping[str, Value]:
        """One writer's own values, by JSON pointer."""
        values = self.fragments(writer).values
        return values if isinstance(values, dict) else {}

    def record(self, file: FileDigest, limit: int) -> bytes:
        """The bytes of a record file named by the manifest, checked against it."""
        data = self.store.read(self.path(file.path), limit)
        if len(data) != file.nbytes:
            raise WrongLength(f"{file.path}: expected {file.nbytes} bytes (in the manifest), found {len(data)}")
        found = file_digest(data)
        if found != file.digest:
            raise ChecksumMismatch(f"{file.path}: expected digest {file.digest} (in the manifest), found {found}")
        return data


def _require_known(record: ArrayRecord, manifest: Manifest, path: str) -> None:
    """Raises Malformed for an array whose layout or writers the manifest does not have."""
    if record.layout is not None and record.layout >= len(manifest.layouts):
        raise Malformed(
            f"{path}: array {record.spec.id} has layout {record.layout}, the manifest {len(manifest.layouts)} of them"
        )
    if record.writers and record.writers[-1] >= len(manifest.fragments):
        raise Malformed(
            f"{path}: array {record.spec.id} has writer {record.writers[-1]}, the manifest {len(manifest.fragments)} of them"
        )


def open_records(path: str | os.PathLike[str]) -> Opened:
    """The checkpoint at `path` (a folder or a URL); reads its manifest only.

    Raises NotACheckpoint or Uncommitted when there is none, Unsupported for a version or feature unknown to this release,
    Damaged kinds if the manifest is not what was written.
    """
    store, name = locate(path)
    if is_draft(name):  # whatever it holds: it may be whole, and its writer about to take it back [SAVE-23]
        raise Uncommitted(f"{store.url}/{name}: a draft of a checkpoint that was never committed")
    try:
        data = store.read(f"{name}/{MANIFEST}", MAX_MANIFEST_NBYTES)
    except MissingFile:
        raise _absent(store, name) from None
    if store.exists(f"{name}/{TOKEN}"):
        raise Uncommitted(f"{store.url}/{name}: a draft of a checkpoint under another name ({TOKEN} is in it), never committed")
    return Opened(store, name, decode_manifest(data, path=MANIFEST))


def _absent(store: Store, name: str) -> CheckpointError:
    where = f"{store.url}/{name}"
    try:
        names = {entry.name for entry in store.entries(name)}
    except CheckpointError:
        return NotACheckpoint(f"{where}: expected the folder of a checkpoint, found nothing that can be opened")
    if TOKEN in names or ("fragments" in names and "params" in names):
        return Uncommitted(f"{where}: an attempt to write a checkpoint, never committed ({MANIFEST} is missing)")
    found = ", ".join(sorted(names)[:5]) or "an empty folder"
    return NotACheckpoint(f"{where}: expected {MANIFEST}, found {found}")
