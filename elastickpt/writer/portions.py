"""Where the pieces of a plan lie in an arena while they are staged: in portions, if the arena is smaller than what is saved.

A slice that may go past the page cache lies at its file offset modulo the page, so that it is written from where it is;
smaller ones are copied into the page cache in any case, and lie close together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elastickpt.errors import LimitExceeded
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES
from elastickpt.writer.plans import PlannedFile, PlannedPiece

BLOCK_NBYTES = 256 << 10
PAGE = 4096
CACHE_LINE = 64
MIN_ARENA_NBYTES = MIN_DIRECT_NBYTES + PAGE


@dataclass(frozen=True, slots=True)
class Slice:
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


def lay_out(files: Sequence[PlannedFile], *, arena_nbytes: int | None = None) -> tuple[Portion, ...]:
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
                room = max(arena_nbytes - offset, 0) // BLOCK_NBYTES * BLOCK_NBYTES
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
