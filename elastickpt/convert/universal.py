"""Writes a universal checkpoint: array by array into a draft, then index and manifest, then the commit."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import DraftContents, Outline, attest
from elastickpt.commit.outcome import commit
from elastickpt.convert.buffers import Buffers
from elastickpt.convert.contents import Array, Contents
from elastickpt.convert.conversion_draft import ConversionDraft
from elastickpt.convert.nodes import Node, nbytes_of
from elastickpt.errors import PathOccupied
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.keys import MANIFEST, array_keys
from elastickpt.format.records import ArrayRecord, FileDigest, FragmentMap, ManifestFrame, StoredFile, StoredPiece
from elastickpt.format.typed_values import typed_values
from elastickpt.format.version import CONVERTER, RELEASE
from elastickpt.layout.grid import chunk_shape
from elastickpt.storage.store import Durability
from elastickpt.writer.plans import (
    BLOCK_NBYTES,
    Document,
    PlannedDocument,
    Slice,
    WritePlan,
    blocks_of,
    documents_of,
    files_of,
    stored_pieces,
    whole_pieces,
)
from elastickpt.writer.write_files import Source, WrittenFolder, directories_of, unwatched, write_portion

_CHECKSUM = np.dtype("<u8")
_CHECKSUM_NBYTES = 8


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


class UniversalTarget:
    """A universal checkpoint under way. A task is an array."""

    def __init__(self, contents: Contents, *, durability: Durability = "power") -> None:
        self._contents, self._wanted = contents, durability
        arrays = tuple(contents.arrays.values())
        self.records = records_of(arrays)
        self._ids = tuple(one.id for one in arrays)
        first: dict[tuple[str, str], ArrayId] = {}
        for one in self.records:
            if one.section == "params":
                first.setdefault((one.item, one.name), one)
        self._heads = set(first.values())  # arrays with which the document of their parameter's group is written
        self._plans = tuple(self._plan(self.records[one]) for one in self._ids)
        self.nodes: tuple[Node, ...] = tuple(one.node for one in arrays)
        self.nbytes = tuple(map(nbytes_of, self.nodes))
        self.left = tuple(
            _CHECKSUM_NBYTES * sum(blocks_of(piece.run.nbytes) for file in plan.files for piece in file.pieces)
            for plan in self._plans
        )
        self._written: dict[int, bytes] = {}

    def describe(self) -> Iterator[object]:
        """All that decides where bytes go."""
        for one in self.records.values():
            yield one.key, str(one.spec.id), one.spec.shape, one.spec.dtype, one.chunk_shape, repr(one.attributes)

    def prepare(self, out: ConversionDraft) -> None:
        """The draft is as every worker expects it. Blocking."""
        for section in sorted({one.section for one in self.records}):
            out.store.make_directories(out.draft.path(section))
        for entry in out.store.entries(out.draft.folder):  # records of an interrupted commit
            if entry.kind == "file" and (entry.name == MANIFEST or entry.name.endswith(".msgpack")):
                out.store.remove(out.draft.path(entry.name))

    def open(self, out: ConversionDraft, buffers: Buffers, *, worker: int) -> None:
        """Tasks are done there from now on. Blocking."""
        self._out, self._worker = out, worker
        store = out.store
        self._durability: Durability = self._wanted if store.capabilities.directory_sync else "process"
        self._target = WrittenFolder(store, out.draft.folder, "none", unwatched)  # all is made durable at once, at the end

    def close(self) -> None:
        """Nothing is open between tasks."""

    def phase(self, task: int) -> int:
        """Pieces begin at a page of their files."""
        return 0

    def beside(self, task: int) -> int:
        return 0

    def put(self, task: int, words: NDArray[Any]) -> bytes:
        """Stores one array: `words` are its elements in C order. Blocking."""
        plan, stored = self._plans[task], self.records[self._ids[task]]
        documents = documents_of(plan, [stored])
        source = _InMemory(plan, stored, words)
        slices, create = whole_pieces(plan.files), self._renew
        checksums = write_portion(self._target, plan, documents, slices, source, block_nbytes=BLOCK_NBYTES, create=create)
        left = checksums.astype(_CHECKSUM).tobytes()
        self.adopt(task, left)
        return left

    def adopt(self, task: int, left: bytes) -> None:
        """An array is stored, also by an interrupted conversion, and stands in this writer's map; `left` is what `put` gave."""
        self._written[task] = left

    def written(self) -> FileDigest:
        """All that this writer stored is durable, and it says so. Blocking."""
        out = self._out
        pieces: list[StoredPiece] = []
        files: list[StoredFile] = []
        for task in sorted(self._written):
            plan, checksums = self._plans[task], np.frombuffer(self._written[task], _CHECKSUM).astype(np.uint64)
            pieces.extend(_moved(piece, len(files)) for piece in stored_pieces(plan, checksums))
            files.extend(StoredFile(0, file.path, file.nbytes) for file in plan.files)
        self._make_durable([file.path for file in files])
        written = FragmentMap(
            self._worker,
            out.draft.attempt,
            BLOCK_NBYTES,
            tuple(files),
            tuple(sorted(pieces, key=lambda piece: piece.array)),
            self._contents.tables() if self._worker == 0 else (),
        )
        return attest(out.store, out.draft, written, durability=self._durability, create=self._renew)

    def commit(self, attested: Sequence[FileDigest]) -> None:
        """Proves, records and commits what all writers attested; on return the checkpoint exists. Blocking."""
        contents, out = self._contents, self._out
        frame = ManifestFrame(
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
        attempt = Attempt(out.store.url, out.draft, self._durability, step=contents.step, time=time.time())
        with out.publishing():
            commit(out.store, attempt, DraftContents(outline, typed_values(contents.values)), attested)

    def _renew(self, path: str, data: bytes) -> None:
        """Creates a file; one that an interrupted conversion made there was not noted as done, and is made again."""
        try:
            self._out.store.create(path, data)
        except PathOccupied:
            self._out.store.remove(path)
            self._out.store.create(path, data)

    def _make_durable(self, files: Sequence[str]) -> None:
        store, out = self._out.store, self._out
        if self._durability == "process":
            return
        documents = [document.path for task in sorted(self._written) for document in self._documents(task)]
        for path in files if out.done or not store.capabilities.tree_sync else ():
            store.sync_file(out.draft.path(path))  # also what another process wrote: only the file itself tells its failures
        if store.capabilities.tree_sync:
            store.sync_tree()
            return
        for path in documents:
            store.sync_file(out.draft.path(path))
        for directory in directories_of([*files, *documents]):
            store.sync_directory(out.draft.path(directory))

    def _documents(self, task: int) -> Sequence[Document]:
        return documents_of(self._plans[task], [self.records[self._ids[task]]])

    def _plan(self, record: ArrayRecord) -> WritePlan:
        whole = Box.whole(record.spec.shape)
        files = files_of(0, record.spec, record.key, record.chunk_shape, [whole], held=whole)
        return WritePlan((record.key,), tuple(files), (PlannedDocument(0, record.spec.id in self._heads),))


class _InMemory(Source):
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
