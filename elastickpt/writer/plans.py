"""What one rank writes, as values: pieces, grouped by the files that they go into, and documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastickpt.format.arrays import ArraySpec, Box
from elastickpt.format.documents import array_document, group_document
from elastickpt.format.keys import chunk_file, document_file
from elastickpt.format.records import ArrayRecord
from elastickpt.layout.algebra import relative
from elastickpt.layout.grid import ByteRun, chunk_nbytes, runs_of


@dataclass(frozen=True, slots=True)
class PlannedPiece:
    """One stored piece to be: `array` counts this rank's held arrays, `local` is the box in that local tensor's coordinates."""

    array: int
    local: Box
    run: ByteRun


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One chunk file, its full size, and what this rank puts into it."""

    path: str
    nbytes: int
    pieces: tuple[PlannedPiece, ...]


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A held array whose zarr document this rank writes; `heads_group`: its parameter's group document too."""

    array: int
    heads_group: bool


@dataclass(frozen=True, slots=True)
class WritePlan:
    """All that one rank writes of arrays. `keys` are the tree paths of its held arrays, in their order."""

    keys: tuple[str, ...]
    files: tuple[PlannedFile, ...]
    documents: tuple[PlannedDocument, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.run.nbytes for file in self.files for piece in file.pieces)


@dataclass(frozen=True, slots=True)
class Document:
    """One small file: path below the checkpoint, content."""

    path: str
    content: bytes


def documents_of(plan: WritePlan, records: Sequence[ArrayRecord]) -> tuple[Document, ...]:
    """The documents that the plan's rank writes; `records[i]` is held array i as the index lists it."""
    found = []
    for document in plan.documents:
        record = records[document.array]
        found.append(Document(document_file(record.key), array_document(record)))
        if document.heads_group:
            identity = record.spec.id
            group = group_document((identity.section, identity.item, identity.name))
            found.append(Document(document_file(record.key.rpartition("/")[0]), group))
    return tuple(found)


def files_of(
    number: int, spec: ArraySpec, key: str, chunk_shape: Sequence[int], boxes: Sequence[Box], *, held: Box
) -> list[PlannedFile]:
    """What these boxes of array `number`, in global coordinates, put into its chunk files; `held` is the part of it that the
    source has, of which a piece's `local` box counts."""
    itemsize = spec.type.itemsize
    by_chunk: dict[tuple[int, ...], list[PlannedPiece]] = {}
    for box in boxes:
        for run in runs_of(box, shape=spec.shape, chunk_shape=tuple(chunk_shape), itemsize=itemsize):
            by_chunk.setdefault(run.chunk, []).append(PlannedPiece(number, relative(run.box, held), run))
    nbytes = chunk_nbytes(tuple(chunk_shape), itemsize=itemsize)
    return [PlannedFile(chunk_file(key, chunk), nbytes, tuple(pieces)) for chunk, pieces in by_chunk.items()]
