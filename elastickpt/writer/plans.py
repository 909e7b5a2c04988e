"""What one rank writes, as values: pieces, grouped by the files that they go into, documents, and where the pieces lie in an
arena while they are staged: in portions, if the arena is smaller than what is saved.

A slice that may go past the page cache lies at its file offset modulo the page, so that it is written from where it is;
smaller ones are copied into the page cache in any case, and lie close together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import LimitExceeded
from elastickpt.format.arrays import ArraySpec, Box
from elastickpt.format.documents import array_document, group_document
from elastickpt.format.keys import chunk_file, document_file, pack_file
from elastickpt.format.piece_columns import PieceColumns, starts
from elastickpt.format.records import ArrayRecord, StoredPiece
from elastickpt.format.strict_reading import IntColumn
from elastickpt.layout.algebra import relative
from elastickpt.layout.grid import ByteRun, chunk_nbytes, runs_of
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES


class PlannedPiece(NamedTuple):
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
class PlannedPack(PlannedFile):
    """The pack of a rank: what lies between its pieces is this rank's too, and zero. Its path is "" until its attempt is
    known, after which it is named."""


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

    def of_attempt(self, attempt: str, writer: int) -> WritePlan:
        """The same with the name that this writer's pack has in an attempt."""
        if self.pack is None:
            return self
        return replace(self, files=(replace(self.pack, path=pack_file(attempt, writer)),))

    @property
    def pack(self) -> PlannedPack | None:
        """The one file of placement packed, if anything is stored."""
        found = self.files[0] if self.files else None
        return found if isinstance(found, PlannedPack) else None

    @property
    def nbytes(self) -> int:
        return sum(piece.run.nbytes for file in self.files for piece in file.pieces)

    @property
    def block_nbytes(self) -> int:
        """The size of its checksum blocks. [FRAG-22, FRAG-67]"""
        nbytes = self.nbytes
        if self.pack is not None and nbytes <= MOST_SMALL_BLOCKS * SMALL_BLOCK_NBYTES:
            return SMALL_BLOCK_NBYTES
        return BLOCK_NBYTES if nbytes <= MOST_BLOCKS * BLOCK_NBYTES else LARGE_BLOCK_NBYTES


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


SMALL_BLOCK_NBYTES = 16 << 10  # of small packs: who needs a half of a small piece reads little more
MOST_SMALL_BLOCKS = 1 << 13  # of this size: each costs 0.3 µs beside its bytes, of a load from memory a twentieth
BLOCK_NBYTES = 64 << 10  # as fast to hash as larger ones
MOST_BLOCKS = 1 << 16  # of this size: half a megabyte of checksums
LARGE_BLOCK_NBYTES = 256 << 10  # of whoever writes more: all maps go through the hands of who commits
# What is copied or written at once, and hashed then, while the core's cache holds it: two passes over memory take half as long
# again.
HASHED_NBYTES = 256 << 10
PAGE = 4096
CACHE_LINE = 64
MIN_ARENA_NBYTES = MIN_DIRECT_NBYTES + PAGE


class Slice(NamedTuple):
    """Bytes [start, stop) of one piece, in C order of the piece; `start` is a multiple of the block size.

    `file` counts the plan's files, `piece` that file's pieces; `offset` is the place in the arena, 0 where nothing is staged.
    """

    file: int
    piece: int
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Portion:
    """What is in the arena at one time, in the order of the plan. `nbytes` is the arena that it needs."""

    slices: tuple[Slice, ...]
    nbytes: int


def whole_pieces(files: Sequence[PlannedFile]) -> tuple[Slice, ...]:
    """One slice for each piece, in the order of the plan, without places in an arena."""
    return tuple(Slice(f, p, 0, piece.run.nbytes) for f, file in enumerate(files) for p, piece in enumerate(file.pieces))


def lay_out(
    files: Sequence[PlannedFile], *, arena_nbytes: int | None = None, block_nbytes: int = BLOCK_NBYTES
) -> tuple[Portion, ...]:
    """The portions in which the files' bytes go through an arena, at least one; as few as fit, None: one, however large.

    A piece is split between portions only where it exceeds what is left of the arena, at a multiple of the block size. The
    slices of all portions in order are the plan's bytes in order. Raises LimitExceeded for an arena below `MIN_ARENA_NBYTES`.
    """
    if arena_nbytes is not None and arena_nbytes < MIN_ARENA_NBYTES:
        raise LimitExceeded(f"an arena of {arena_nbytes} bytes; expected at least {MIN_ARENA_NBYTES}")
    portions: list[Portion] = []
    slices: list[Slice] = []
    used = 0
    for f, p, piece in _pieces(files):
        start = 0
        while start < piece.run.nbytes:
            offset = place_of(piece, start, after=used)
            stop = piece.run.nbytes
            if arena_nbytes is not None and offset + stop - start > arena_nbytes:
                room = max(arena_nbytes - offset, 0) // block_nbytes * block_nbytes
                if room < MIN_DIRECT_NBYTES and slices:  # no splinters: the rest of this arena stays empty
                    portions.append(Portion(tuple(slices), used))
                    slices, used = [], 0
                    continue
                stop = start + room
            slices.append(Slice(f, p, start, stop, offset))
            used = offset + stop - start
            start = stop
    return (*portions, Portion(tuple(slices), used)) if slices or not portions else tuple(portions)


def place_of(piece: PlannedPiece, start: int, *, after: int) -> int:
    """The first place in the arena from `after` on for the piece's bytes from `start`."""
    if piece.run.nbytes < MIN_DIRECT_NBYTES or piece.run.row_stride != piece.run.row_nbytes:
        return -(-after // CACHE_LINE) * CACHE_LINE
    return after + (piece.run.offset + start - after) % PAGE


def _pieces(files: Sequence[PlannedFile]) -> Iterator[tuple[int, int, PlannedPiece]]:
    for f, file in enumerate(files):
        for p, piece in enumerate(file.pieces):
            yield f, p, piece


def blocks_of(nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """Number of checksum blocks of so many bytes of one piece."""
    return -(-nbytes // block_nbytes)


def stored_pieces(plan: WritePlan, checksums: NDArray[np.uint64]) -> tuple[StoredPiece, ...]:
    """Every piece with its place and checksums."""
    pieces = []
    every = checksums.tolist()
    first = 0
    for number, file in enumerate(plan.files):
        for piece in file.pieces:
            run = piece.run
            stop = first + blocks_of(run.nbytes)
            pieces.append(
                StoredPiece(
                    array=plan.keys[piece.array],
                    box=run.box,
                    file=number,
                    offset=run.offset,
                    nbytes=run.nbytes,
                    row_nbytes=run.row_nbytes,
                    row_stride=run.row_stride,
                    checksums=tuple(every[first:stop]),
                )
            )
            first = stop
    return tuple(pieces)


def columns_of_plan(plan: WritePlan) -> PieceColumns:
    """Every piece in columns; in place of each checksum its place among those of the plan's blocks, in order."""
    file = np.repeat(np.arange(len(plan.files)), [len(one.pieces) for one in plan.files])
    pieces = [piece for one in plan.files for piece in one.pieces]
    runs, number = [piece.run for piece in pieces], _column(map(attrgetter("array"), pieces))
    held = sorted(set(number.tolist()), key=plan.keys.__getitem__)
    place = np.zeros(len(plan.keys), dtype=np.int64)
    place[held] = np.arange(len(held))
    order = np.argsort(place[number], kind="stable")
    ndims = _column(len(run.box.start) for run in runs)
    start, stop = (_column(chain.from_iterable(map(attrgetter(name), runs))) for name in ("box.start", "box.stop"))
    nbytes = _column(map(attrgetter("nbytes"), runs))
    blocks = -(-nbytes // plan.block_nbytes)
    axes, sums = _moved(ndims, order), _moved(blocks, order)
    array, ndim = place[number][order], np.zeros(len(held), dtype=np.int64)
    ndim[array] = ndims[order]
    return PieceColumns(
        arrays=tuple(map(plan.keys.__getitem__, held)),
        ndims=ndim,
        array=array,
        file=file[order],
        offset=_column(map(attrgetter("offset"), runs))[order],
        nbytes=nbytes[order],
        row_nbytes=_column(map(attrgetter("row_nbytes"), runs))[order],
        row_stride=_column(map(attrgetter("row_stride"), runs))[order],
        start=start[axes],
        shape=(stop - start)[axes],
        axis_start=starts(ndims[order]),
        checksums=sums.astype(np.uint64),
        checksum_start=starts(blocks[order]),
    )


def _column(numbers: Iterable[int]) -> IntColumn:
    return np.fromiter(numbers, dtype=np.int64)


def _moved(counts: IntColumn, order: IntColumn) -> IntColumn:
    """Where the entries of a flat column stood that has so many each, once what they are of stands in another order."""
    begin, mine = starts(counts)[:-1][order], counts[order]
    return np.repeat(begin - starts(mine)[:-1], mine) + np.arange(int(mine.sum()))
