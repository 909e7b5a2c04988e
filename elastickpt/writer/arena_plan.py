"""What a writer knows of a structure: its rank's plan, laid out for an arena, and on the committer's the outline. A writer
process gets it once: it is identified by a digest, so that no later save sends it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from elastickpt.commit.attest import Outline, decode_outline, encode_outline
from elastickpt.format.arrays import Box
from elastickpt.format.digest import file_digest
from elastickpt.format.piece_columns import PieceColumns, columns_of
from elastickpt.format.strict_reading import pack_ints
from elastickpt.layout.grid import ByteRun
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.writer.plans import (
    Document,
    PlannedDocument,
    PlannedFile,
    PlannedPack,
    PlannedPiece,
    Portion,
    Slice,
    WritePlan,
    blocks_of,
    lay_out,
    stored_pieces,
)

_PIECE = 6  # integers of a piece beside those of its axes
_SLICE = 5


@dataclass(frozen=True, eq=False)
class ArenaPlan:
    """A plan with its documents and its portions through an arena."""

    plan: WritePlan
    documents: tuple[Document, ...]
    portions: tuple[Portion, ...]

    @cached_property
    def columns(self) -> PieceColumns:
        """Its stored pieces; in place of each checksum its place among those of the plan's blocks, in order."""
        blocks = sum(blocks_of(piece.run.nbytes) for file in self.plan.files for piece in file.pieces)
        return columns_of(stored_pieces(self.plan, np.arange(blocks, dtype=np.uint64)))

    @cached_property
    def encoded(self) -> bytes:
        """It says the same, for `decode_prepared`."""
        return _encode(self.plan, self.documents, self.portions)

    @cached_property
    def digest(self) -> str:
        """Identifies it."""
        return file_digest(self.encoded)

    @property
    def arena_nbytes(self) -> int:
        """The arena that holds every portion."""
        return max(one.nbytes for one in self.portions)


class WriterStructure:
    """What all saves of one structure have in common for one writer. `outline` on the committer's, else None."""

    def __init__(self, prepared: ArenaPlan, outline: Outline | None = None) -> None:
        self._prepared, self._outline = prepared, outline

    @property
    def prepared(self) -> ArenaPlan:
        return self._prepared

    @property
    def outline(self) -> Outline | None:
        return self._outline

    @cached_property
    def encoded_outline(self) -> bytes:
        """b"" without one. Raises what `encode_outline` raises."""
        return b"" if self._outline is None else encode_outline(self._outline)

    @cached_property
    def digest(self) -> str:
        """Identifies it."""
        return file_digest((self._prepared.digest + file_digest(self.encoded_outline)).encode())


class SentStructure(WriterStructure):
    """The same as a writer process was sent it, decoded by whoever needs it first: not by the thread that beats."""

    def __init__(self, plan: bytes, outline: bytes) -> None:
        self._plan, self._encoded_outline = plan, outline

    @cached_property
    def prepared(self) -> ArenaPlan:
        prepared, self._plan = decode_prepared(self._plan), b""
        return prepared

    @cached_property
    def outline(self) -> Outline | None:
        return decode_outline(self._encoded_outline) if self._encoded_outline else None

    @property
    def encoded_outline(self) -> bytes:
        return self._encoded_outline


class _Plan(Message, frozen=True):
    """A plan in a message; columns are packed integers: of each file its size and number of pieces, of each piece a row."""

    keys: tuple[str, ...]
    paths: tuple[str, ...]
    sizes: bytes
    counts: bytes
    pieces: bytes
    planned: tuple[PlannedDocument, ...]
    documents: tuple[Document, ...]
    portions: tuple[tuple[int, bytes], ...]


def prepare(plan: WritePlan, documents: Sequence[Document], *, arena_nbytes: int | None = None) -> ArenaPlan:
    """The plan, laid out for an arena of at most so many bytes (None: as large as the plan wants)."""
    return ArenaPlan(plan, tuple(documents), lay_out(plan.files, arena_nbytes=arena_nbytes))


def decode_prepared(data: bytes) -> ArenaPlan:
    """The plan that was encoded so."""
    told = decode(data, _Plan)
    every = _decode_pieces(_ints(told.pieces))
    ends = [0, *accumulate(_ints(told.counts))]
    files = tuple(
        (PlannedFile if path else PlannedPack)(path, nbytes, tuple(every[first:stop]))
        for path, nbytes, (first, stop) in zip(told.paths, _ints(told.sizes), pairwise(ends), strict=True)
    )
    plan = WritePlan(told.keys, files, told.planned)
    found = []
    for nbytes, column in told.portions:
        rows = iter(_ints(column))
        found.append(Portion(tuple(Slice(*row) for row in zip(*[rows] * _SLICE, strict=True)), nbytes))
    return ArenaPlan(plan, told.documents, tuple(found))


def _encode(plan: WritePlan, documents: Sequence[Document], portions: Sequence[Portion]) -> bytes:
    rows = (_piece_row(piece) for file in plan.files for piece in file.pieces)
    told = _Plan(
        plan.keys,
        tuple(file.path for file in plan.files),
        pack_ints([file.nbytes for file in plan.files]),
        pack_ints([len(file.pieces) for file in plan.files]),
        pack_ints([number for row in rows for number in row]),
        plan.documents,
        tuple(documents),
        tuple(
            (one.nbytes, pack_ints([n for s in one.slices for n in (s.file, s.piece, s.start, s.stop, s.offset)]))
            for one in portions
        ),
    )
    return encode(told)


def _piece_row(piece: PlannedPiece) -> tuple[int, ...]:
    run = piece.run
    head = (piece.array, run.offset, run.nbytes, run.row_nbytes, run.row_stride, len(run.chunk))
    return (*head, *run.chunk, *run.box.start, *run.box.stop, *piece.local.start)


def _decode_pieces(numbers: Sequence[int]) -> list[PlannedPiece]:
    found = []
    at = 0
    while at < len(numbers):
        array, offset, nbytes, row, stride, ndim = numbers[at : at + _PIECE]
        at += _PIECE
        chunk, start, stop, local = (tuple(numbers[at + k * ndim : at + (k + 1) * ndim]) for k in range(4))
        at += 4 * ndim
        box = Box(start, stop)
        there = Box(local, tuple(low + n for low, n in zip(local, box.shape, strict=True)))
        found.append(PlannedPiece(array, there, ByteRun(chunk, box, offset, nbytes, row, stride)))
    return found


def _ints(column: bytes) -> list[int]:
    numbers: list[int] = np.frombuffer(column, dtype="<i8").tolist()
    return numbers
