"""What a writer knows of a structure: its rank's plan, laid out for an arena, what of its pack is written at once, and on the
committer's the outline. A writer process gets it once: it is identified by a digest, so that no later save sends it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from elastickpt.commit.attest import Outline, decode_outline, encode_outline
from elastickpt.format.arrays import Box
from elastickpt.format.digest import file_digest
from elastickpt.format.piece_columns import PieceColumns
from elastickpt.format.strict_reading import pack_ints
from elastickpt.layout.grid import ByteRun
from elastickpt.ranks.messages import Message, decode, encode
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES
from elastickpt.writer.plans import (
    BLOCK_NBYTES,
    HASHED_NBYTES,
    PAGE,
    Document,
    PlannedDocument,
    PlannedFile,
    PlannedPack,
    PlannedPiece,
    Portion,
    Slice,
    WritePlan,
    blocks_of,
    columns_of_plan,
    lay_out,
)

_PIECE = 6  # integers of a piece beside those of its axes
_SLICE = 5

# Of a large piece in a row, written at once, and as much as a `Source` gives at once: 1.8 GB of two ranks beside training take
# 0.93 s with 8 MiB, 1.03 with 2, as an arena's memory reaches the device in many small segments.
ROW_NBYTES = 8 << 20
ROWS_APART = 4  # rows further apart than this many of them are written one by one


class PackPart(NamedTuple):
    """Bytes [start, stop) of the piece of a slice, at [begin, end) of the pack: `blocks` of all blocks, from `block` on."""

    at: Slice
    run: ByteRun
    start: int
    stop: int
    begin: int
    end: int
    block: int
    blocks: int

    @property
    def slice(self) -> Slice:
        """Of these bytes alone; their place in an arena, if they have one."""
        if (self.start, self.stop) == (self.at.start, self.at.stop):
            return self.at
        return self.at._replace(start=self.start, stop=self.stop, offset=self.at.offset + self.start - self.at.start)


class PackGroup(NamedTuple):
    """Parts of a span that are copied, and hashed where they then lie, before the next ones are. `places` are where they begin
    in the span, `within` are [begin, end) of their blocks there, of which the first is `block` of all blocks."""

    slices: tuple[Slice, ...]
    places: tuple[int, ...]
    within: tuple[tuple[int, int], ...]
    block: int


@dataclass(frozen=True, slots=True, eq=False)
class PackSpan:
    """Parts that are written at once; several that each lie in a row also in groups, and `gaps`, [begin, end) in the span, is
    what lies between them."""

    parts: tuple[PackPart, ...]
    groups: tuple[PackGroup, ...] = ()
    gaps: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[PackPart], block_nbytes: int = BLOCK_NBYTES) -> PackSpan:
        """These parts, of which each begins less than a page behind the one before."""
        if len(parts) == 1 or not all(part.run.in_a_row for part in parts):
            return cls(tuple(parts))
        begin = parts[0].begin
        gaps = tuple((one.end - begin, two.begin - begin) for one, two in pairwise(parts) if one.end < two.begin)
        return cls(tuple(parts), tuple(_groups(parts, begin, block_nbytes)), gaps)

    @property
    def nbytes(self) -> int:
        """Of the parts."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def blocks(self) -> int:
        """Checksum blocks of the parts."""
        return self.parts[-1].block + self.parts[-1].blocks - self.parts[0].block


def _groups(parts: Sequence[PackPart], begin: int, block_nbytes: int) -> Iterator[PackGroup]:
    slices: list[Slice] = []
    places: list[int] = []
    within: list[tuple[int, int]] = []
    end, block = parts[0].begin + HASHED_NBYTES, parts[0].block
    for part in parts:
        if part.end > end and slices:
            yield PackGroup(tuple(slices), tuple(places), tuple(within), block)
            slices, places, within = [], [], []
            end, block = part.begin + HASHED_NBYTES, part.block
        slices.append(part.slice)
        places.append(low := part.begin - begin)
        high = part.end - begin
        if part.blocks == 1:
            within.append((low, high))
        else:
            within += [(at, min(at + block_nbytes, high)) for at in range(low, high, block_nbytes)]
    yield PackGroup(tuple(slices), tuple(places), tuple(within), block)


@dataclass(frozen=True, eq=False)
class ArenaPlan:
    """A plan with its documents and its portions through an arena."""

    plan: WritePlan
    documents: tuple[Document, ...]
    portions: tuple[Portion, ...]

    @cached_property
    def block_nbytes(self) -> int:
        """The size of its checksum blocks."""
        return self.plan.block_nbytes

    @cached_property
    def columns(self) -> PieceColumns:
        """Its stored pieces; in place of each checksum its place among those of the plan's blocks, in order."""
        return columns_of_plan(self.plan)

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

    def spans(self, number: int, most: int) -> tuple[PackSpan, ...]:
        """What of the pack a portion writes at once, each time at most so many bytes; found out once. () without a pack."""
        if (number, most) not in self._spans:
            pack, slices = self.plan.pack, self.portions[number].slices
            self._spans[number, most] = () if pack is None else spans_of(pack, slices, most, self.block_nbytes)
        return self._spans[number, most]

    @cached_property
    def _spans(self) -> dict[tuple[int, int], tuple[PackSpan, ...]]:
        return {}


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
    return ArenaPlan(plan, tuple(documents), lay_out(plan.files, arena_nbytes=arena_nbytes, block_nbytes=plan.block_nbytes))


def spans_of(pack: PlannedFile, slices: Sequence[Slice], most: int, block_nbytes: int = BLOCK_NBYTES) -> tuple[PackSpan, ...]:
    """These slices of a pack in spans of at most so many bytes, counted from a page on, gaps included: those that follow each
    other with less than a page between are one. What is large and in a row is one of its own, of up to `ROW_NBYTES`."""
    found = _close_together(_parts(pack, slices, most, block_nbytes), most)
    return tuple(PackSpan.of(parts, block_nbytes) for parts in found)


def _parts(pack: PlannedFile, slices: Sequence[Slice], most: int, block_nbytes: int) -> Iterator[PackPart]:
    block = 0
    for at in slices:
        run = pack.pieces[at.piece].run
        nbytes = at.stop - at.start
        if 0 < nbytes <= min(block_nbytes, most) and run.row_nbytes == run.nbytes:  # nearly all of many small ones
            yield PackPart(at, run, at.start, at.stop, run.offset + at.start, run.offset + at.stop, block, 1)
            block += 1
            continue
        step = ROW_NBYTES if run.in_a_row else max(most // ROWS_APART, block_nbytes)
        for start in range(at.start, at.stop, step):
            stop = min(start + step, at.stop)
            bounds = (run.offset + start, run.offset + stop) if run.in_a_row else (run.place(start), run.place(stop - 1) + 1)
            blocks = blocks_of(stop - start, block_nbytes)
            yield PackPart(at, run, start, stop, *bounds, block, blocks)
            block += blocks


def _close_together(parts: Iterator[PackPart], most: int) -> Iterator[tuple[PackPart, ...]]:
    span: list[PackPart] = []
    for part in parts:
        joins = span and 0 <= part.begin - span[-1].end < PAGE and part.end - span[0].begin // PAGE * PAGE <= most
        if span and not (joins and not _stands_alone(part) and not _stands_alone(span[-1])):
            yield tuple(span)
            span = []
        span.append(part)
    if span:
        yield tuple(span)


def _stands_alone(part: PackPart) -> bool:
    """Whether it goes past the page cache by itself, and gains nothing by being copied together with others."""
    return part.run.in_a_row and part.stop - part.start >= MIN_DIRECT_NBYTES


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
