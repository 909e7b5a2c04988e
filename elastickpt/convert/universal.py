"""Writes a universal checkpoint: array by array into a draft, then index and manifest, then the commit."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import attest
from elastickpt.commit.contents import Contents as Whole
from elastickpt.commit.contents import Outline
from elastickpt.commit.draft import Draft, abort, begin, new_draft, require_free, sweep
from elastickpt.commit.outcome import commit
from elastickpt.convert.contents import Array, Contents
from elastickpt.errors import NotDurable
from elastickpt.format.arrays import ArrayId, ArraySpec
from elastickpt.format.box import Box
from elastickpt.format.keys import array_keys, chunk_file
from elastickpt.format.records import ArrayRecord, FileDigest, FragmentMap, Frame, StoredFile, StoredPiece
from elastickpt.format.release import CONVERTER, RELEASE
from elastickpt.layout.grid import chunk_nbytes, chunk_shape, runs_of
from elastickpt.storage.opening import locate_for_saving
from elastickpt.storage.store import Durability
from elastickpt.writer.carry import Target, directories_of, unwatched, write_round
from elastickpt.writer.plans import PlannedDocument, PlannedFile, PlannedPiece, WritePlan, documents_of
from elastickpt.writer.rounds import BLOCK_NBYTES, Slice, whole_pieces
from elastickpt.writer.share import stored_pieces


def records_of(arrays: Iterable[Array]) -> dict[ArrayId, ArrayRecord]:
    """The arrays as the index lists them; `true_shape` where something is padded. [UCF-121]"""
    listed = tuple(arrays)
    keys = array_keys(one.id for one in listed)
    found = {}
    for one in listed:
        spec = ArraySpec(one.id, one.node.shape, one.node.dtype)
        attributes = one.attributes
        if one.true is not None and one.true != spec.shape:
            attributes = (*attributes, ("true_shape", list(one.true)))
        grid = chunk_shape(spec.shape, itemsize=spec.type.itemsize)
        found[one.id] = ArrayRecord(spec, keys[one.id], grid, None, (), attributes)
    return found


@dataclass(slots=True)
class _Written:
    """What this writer has stored so far."""

    files: list[StoredFile] = field(default_factory=list)
    pieces: list[StoredPiece] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)


class UniversalTarget:
    """A universal checkpoint under way. As a context: an error, or no `commit`, leaves nothing at the path."""

    def __init__(self, path: str, contents: Contents, *, durability: Durability = "power") -> None:
        self._store, self._name = locate_for_saving(path)
        require_free(self._store, self._name)
        self._contents = contents
        self.records = records_of(contents.arrays.values())
        first: dict[tuple[str, str], ArrayId] = {}
        for one in self.records:
            if one.section == "params":
                first.setdefault((one.item, one.name), one)
        self._heads = set(first.values())  # arrays with which the document of their parameter's group is written
        able = self._store.capabilities.directory_sync
        self._durability: Durability = durability if able else "process"
        self.draft: Draft = new_draft(self._name, pid=os.getpid())
        self._writer = 0
        self._committed = False
        self._written = _Written()

    @classmethod
    def joined(cls, path: str, contents: Contents, draft: Draft, writer: int) -> Self:
        """Another writer of a draft that worker 0 has begun, and commits."""
        found = cls(path, contents)
        found.draft, found._writer = draft, writer
        return found

    def __enter__(self) -> Self:
        sweep(self._store, self._name)
        begin(self._store, self.draft, sections={one.section for one in self.records})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._committed:
            abort(self._store, self.draft)

    def put(self, identity: ArrayId, words: NDArray[Any]) -> None:
        """Stores one array: `words` are its elements in C order. Blocking."""
        record = self.records[identity]
        plan = self._plan(record)
        target = Target(self._store, self.draft.folder, "none", unwatched)  # all is made durable at once, at the end
        documents = documents_of(plan, [record])
        source = _InMemory(plan, record, words)
        checksums = write_round(target, plan, documents, whole_pieces(plan.files), source, create=self._store.create)
        self._written.documents.extend(document.path for document in documents)
        first = len(self._written.files)
        self._written.files.extend(StoredFile(0, file.path, file.nbytes) for file in plan.files)
        self._written.pieces.extend(_moved(piece, first) for piece in stored_pieces(plan, checksums))

    def attest(self) -> FileDigest:
        """All that this writer stored is durable, and it says so. Blocking."""
        self._make_durable()
        written = FragmentMap(
            self._writer,
            self.draft.attempt,
            BLOCK_NBYTES,
            tuple(self._written.files),
            tuple(sorted(self._written.pieces, key=lambda piece: piece.array)),
            self._contents.tables() if self._writer == 0 else (),
        )
        return attest(self._store, self.draft, written, durability=self._durability)

    def commit(self, attested: Sequence[FileDigest]) -> None:
        """Proves, records and commits what all writers attested; on return the checkpoint exists. Blocking."""
        contents = self._contents
        frame = Frame(
            world_size=1,
            placement="plain",
            versions=((CONVERTER, RELEASE), ("elastickpt", RELEASE), ("python", platform.python_version())),
            items=contents.items,
            meshes=(),
            layouts=(),
            tied=contents.tied,
            layout_text=contents.layout_text,
        )
        outline = Outline(frame, tuple(sorted(self.records.values(), key=lambda record: record.key)))
        attempt = Attempt(self._store.url, self.draft, self._durability, step=contents.step, time=time.time())
        try:
            commit(self._store, attempt, Whole(outline, dict(contents.values)), attested)
        except NotDurable:
            self._committed = True  # and whole
            raise
        self._committed = True

    def _make_durable(self) -> None:
        if self._durability == "process":
            return
        if self._store.capabilities.tree_sync:
            self._store.sync_tree()
            return
        paths = [*(file.path for file in self._written.files), *self._written.documents]
        for path in paths:
            self._store.sync_file(self.draft.path(path))
        for directory in directories_of(paths):
            self._store.sync_directory(self.draft.path(directory))

    def _plan(self, record: ArrayRecord) -> WritePlan:
        spec = record.spec
        by_chunk: dict[tuple[int, ...], list[PlannedPiece]] = {}
        whole = Box.whole(spec.shape)
        for run in runs_of(whole, shape=spec.shape, chunk_shape=record.chunk_shape, itemsize=spec.type.itemsize):
            by_chunk.setdefault(run.chunk, []).append(PlannedPiece(0, run.box, run))
        nbytes = chunk_nbytes(record.chunk_shape, itemsize=spec.type.itemsize)
        files = [PlannedFile(chunk_file(record.key, chunk), nbytes, tuple(p)) for chunk, p in by_chunk.items()]
        return WritePlan((record.key,), tuple(files), (PlannedDocument(0, spec.id in self._heads),))


class _InMemory:
    """The bytes of one array in memory, as a source of a write plan."""

    def __init__(self, plan: WritePlan, record: ArrayRecord, words: NDArray[Any]) -> None:
        self._plan = plan
        self._words = words.reshape(record.spec.shape)

    def take(self, at: Slice, start: int, stop: int) -> NDArray[np.uint8]:
        piece = self._plan.files[at.file].pieces[at.piece]
        box = piece.run.box
        part = self._words[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8)[start:stop]


def _moved(piece: StoredPiece, files: int) -> StoredPiece:
    return StoredPiece(
        piece.array,
        piece.box,
        piece.file + files,
        piece.offset,
        piece.nbytes,
        piece.row_nbytes,
        piece.row_stride,
        piece.checksums,
    )
