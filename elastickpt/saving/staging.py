"""Staging: from live tensors to an arena, and nothing else. This is what stalls training.

    stager = Stager(prepared, arena)           # once for a plan and an arena
    stager.stage(0, live.arrays, skip)    # each save: a copy of what this rank writes, laid out as it will be written

Tensors on a device are not copied here but by `training.device_staging`, into the same places.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from elastickpt.errors import LimitExceeded, Refused
from elastickpt.format.box import Box
from elastickpt.ranks.workers import Pool
from elastickpt.saving.gather import Bytes, flat_bytes, gather, part_of
from elastickpt.storage.direct import address_of
from elastickpt.training.held import HeldArray
from elastickpt.training.memory import host_address, host_elements
from elastickpt.writer.arena import Arena
from elastickpt.writer.plans import PlannedPiece
from elastickpt.writer.prepared import Prepared
from elastickpt.writer.rounds import Slice

MIN_THREADED_NBYTES = 32 << 20  # below this a second thread costs more to wake than it copies meanwhile
PART_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StagedSlice:
    """A slice of a piece and its place in the arena, shape=[stop - start] bytes."""

    piece: PlannedPiece
    at: Slice
    into: Bytes


def slices_of(prepared: Prepared, arena: Arena, number: int) -> tuple[StagedSlice, ...]:
    """The slices of a round with their places. Raises LimitExceeded for an arena that is too small."""
    found = prepared.rounds[number]
    if arena.nbytes < found.nbytes:
        raise LimitExceeded(f"round {number} needs an arena of {found.nbytes} bytes, found one of {arena.nbytes}")
    files, memory = prepared.plan.files, arena.memory
    return tuple(
        StagedSlice(files[at.file].pieces[at.piece], at, memory[at.offset : at.offset + at.stop - at.start])
        for at in found.slices
    )


@dataclass(frozen=True, slots=True)
class _Move:
    """A slice by addresses: `offset` of its first byte in a local tensor without gaps; None where it has no such place."""

    one: StagedSlice
    array: int
    offset: int | None
    target: int
    nbytes: int


class Stager:
    """Copies the rounds of one plan into one arena, again and again; keeps views of the arena, so drop it before the arena.

    `threads`: how many copy; `python -m tools.bench.copies` shows what it brings, which is nothing where one core fills the
    memory bus, or ranks keep all cores busy.
    """

    def __init__(self, prepared: Prepared, arena: Arena, *, threads: int = 1) -> None:
        self._arena = arena
        self._rounds = [slices_of(prepared, arena, number) for number in range(len(prepared.rounds))]
        self._needs = [one.nbytes for one in prepared.rounds]
        self._moves: list[list[_Move]] = []
        self._pool = Pool("elastickpt-stage", threads) if threads > 1 else None

    @property
    def rounds(self) -> int:
        """More than one: the arena is smaller than what is saved, and all but the last must be written before it returns."""
        return len(self._rounds)

    def stage(self, number: int, held: Sequence[HeldArray], skip: Collection[int] = ()) -> int:
        """Copies round `number` from what this rank holds; returns its bytes. Blocking.

        On return those tensors may change. The arena, emptied before, says on the way how far it is filled; of several threads
        at the end. The arrays in `skip` are staged by somebody else, who then says it. By address where a tensor has no gaps,
        which costs 1 µs a slice, views 6 µs; what the arrays of a plan have in common, and so where their slices lie, is found
        out once. Raises Refused for an arena that was not emptied: a writer would take what lies there for what is to come.
        """
        if self._arena.filled:
            raise Refused("this arena is full: it is emptied before it is filled again")
        if not self._moves:
            self._moves = [[_move(one, held) for one in slices] for slices in self._rounds]
        addresses = [None if array in skip else host_address(one.tensor) for array, one in enumerate(held)]
        moves = [move for move in self._moves[number] if move.array not in skip] if skip else self._moves[number]
        nbytes = sum(move.nbytes for move in moves)
        fill_to = _nobody if skip else self._arena.fill_to
        if self._pool is None or nbytes < MIN_THREADED_NBYTES:
            _copy(moves, addresses, held, fill_to)
        else:
            parts: list[Callable[[], object]] = []
            for move in moves:
                parts += _parts_of_move(move, addresses[move.array], held)
            self._pool.share_out(parts, lambda part: part())
        fill_to(self._needs[number])
        return nbytes

    def slices(self, number: int) -> Sequence[StagedSlice]:
        """The slices of a round with their places."""
        return self._rounds[number]

    def close(self) -> None:
        """Ends the threads and lets go of the arena."""
        self._rounds, self._moves = [], []
        if self._pool is not None:
            self._pool.close()


def _nobody(filled: int) -> None:
    """Somebody else says how far the arena is filled."""


def _copy(
    moves: Sequence[_Move], addresses: Sequence[int | None], held: Sequence[HeldArray], fill_to: Callable[[int], None]
) -> None:
    """Copies in the order of the arena, and says how far after each part."""
    memmove = ctypes.memmove
    said = 0
    for move in moves:
        first, base, start = move.one.at.offset, addresses[move.array], 0
        while start < move.nbytes:
            if base is None or move.offset is None:
                nbytes = move.nbytes
                _copy_held(move, held)
            else:
                nbytes = min(PART_NBYTES, move.nbytes - start)
                memmove(move.target + start, base + move.offset + start, nbytes)
            start += nbytes
            if first + start - said >= PART_NBYTES:
                fill_to(said := first + start)


def _move(one: StagedSlice, held: Sequence[HeldArray]) -> _Move:
    piece = one.piece
    target = address_of(one.into.data) if one.into.size else 0
    offset = _offset_of(piece.local, held[piece.array].box.shape, itemsize=held[piece.array].spec.type.itemsize)
    at = None if offset is None else offset + one.at.start
    return _Move(one, piece.array, at, target, one.into.size)


def _offset_of(box: Box, shape: Sequence[int], *, itemsize: int) -> int | None:
    """The first byte of the box in an array of this shape in C order; None unless its elements follow each other there."""
    offset, stride, whole = 0, itemsize, True
    for low, high, extent in zip(reversed(box.start), reversed(box.stop), reversed(shape), strict=True):
        if not whole and high - low != 1:
            return None
        whole = whole and high - low == extent
        offset += low * stride
        stride *= extent
    return offset


def _copy_held(move: _Move, held: Sequence[HeldArray]) -> None:
    """A slice of a tensor with gaps, or on a device, in C order of its piece."""
    one = move.one
    part = part_of(host_elements(held[move.array].tensor), one.piece.local)
    if one.into.size == one.piece.run.nbytes:
        np.copyto(one.into.view(part.dtype).reshape(part.shape), part)
    elif (flat := flat_bytes(part)) is not None:
        np.copyto(one.into, flat[one.at.start : one.at.stop])
    else:
        gather(part, one.at.start, one.into)


def _parts_of_move(move: _Move, base: int | None, held: Sequence[HeldArray]) -> list[Callable[[], object]]:
    if base is None or move.offset is None:
        return [lambda: _copy_held(move, held)]
    start = base + move.offset

    def part(at: int) -> Callable[[], object]:
        return lambda: ctypes.memmove(move.target + at, start + at, min(PART_NBYTES, move.nbytes - at))

    return [part(at) for at in range(0, move.nbytes, PART_NBYTES)]
