"""Staging: from live tensors to an arena, and nothing else. This is what stalls training.

    stager = Stager(prepared)                   # once for a plan
    stager.stage(arena, 0, live.arrays, skip)   # each save: a copy of what this rank writes, laid out as it will be written

Bytes of a local tensor are gathered in C order, a range at a time, whatever its strides. Tensors on a device are not copied
here but by `training.device`, into the same places.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from elastickpt.errors import LimitExceeded, Refused
from elastickpt.format.arrays import Box
from elastickpt.format.memory_views import address_of
from elastickpt.ranks.threads import Pool
from elastickpt.training.elements import host_address, host_elements
from elastickpt.training.held import HeldArray
from elastickpt.writer.arena import Arena
from elastickpt.writer.arena_plan import ArenaPlan
from elastickpt.writer.plans import PlannedPack, PlannedPiece, Slice

DIGEST_NBYTES = 1 << 20  # a multiple of every element size

Bytes = NDArray[np.uint8]
AnyArray = NDArray[np.generic]


def part_of(elements: AnyArray, box: Box) -> AnyArray:
    """A view of the box, in the elements' own coordinates."""
    return elements[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]


def flat_bytes(elements: AnyArray) -> Bytes | None:
    """The elements as one byte array without a copy; None if they are not contiguous in C order."""
    if not elements.flags.c_contiguous:
        return None
    return elements.reshape(-1).view(np.uint8)


def gather(elements: AnyArray, start: int, into: Bytes) -> None:
    """Fills `into` with the bytes from byte `start` of the elements in C order. Both are multiples of the element size."""
    itemsize = elements.dtype.itemsize
    _gather(elements, start // itemsize, into.view(elements.dtype))


def _gather(elements: AnyArray, start: int, into: AnyArray) -> None:
    count = into.size
    if count == 0:
        return
    if elements.ndim <= 1 or elements.size == count:
        flat = elements.reshape(-1) if elements.ndim == 0 else elements
        if elements.ndim <= 1:
            into[:] = flat[start : start + count]
        else:
            np.copyto(into.reshape(elements.shape), elements)
        return
    row = elements[0].size
    first, skip = divmod(start, row)
    filled = 0
    if skip:  # the rest of a row that an earlier range began
        filled = min(row - skip, count)
        _gather(elements[first], skip, into[:filled])
        first += 1
    rows = (count - filled) // row
    if rows:
        target = into[filled : filled + rows * row].reshape((rows, *elements.shape[1:]))
        np.copyto(target, elements[first : first + rows])
        filled += rows * row
    if filled < count:
        _gather(elements[first + rows], 0, into[filled:])


def range_digest(elements: AnyArray, first: int, last: int) -> bytes:
    """xxh3-128 of the bytes of elements [first, last) in C order, whatever the strides."""
    hasher, itemsize = xxh3_128(), elements.dtype.itemsize
    begin, end = first * itemsize, last * itemsize
    flat = flat_bytes(elements)
    if flat is not None:
        hasher.update(flat[begin:end].data)
        return hasher.digest()
    buffer = np.empty(min(end - begin, DIGEST_NBYTES), dtype=np.uint8)
    for start in range(begin, end, DIGEST_NBYTES):
        part = buffer[: min(DIGEST_NBYTES, end - start)]
        gather(elements, start, part)
        hasher.update(part.data)
    return hasher.digest()


MIN_THREADED_NBYTES = 32 << 20  # below this a second thread costs more to wake than it copies meanwhile
PART_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StagedSlice:
    """A slice of a piece and its place in the arena, shape=[stop - start] bytes."""

    piece: PlannedPiece
    at: Slice
    into: Bytes


def slices_of(prepared: ArenaPlan, arena: Arena, number: int) -> tuple[StagedSlice, ...]:
    """The slices of a portion with their places. Raises LimitExceeded for an arena that is too small."""
    _require_room(prepared, arena, number)
    found, files, memory = prepared.portions[number], prepared.plan.files, arena.memory
    return tuple(
        StagedSlice(files[at.file].pieces[at.piece], at, memory[at.offset : at.offset + at.stop - at.start])
        for at in found.slices
    )


def _require_room(prepared: ArenaPlan, arena: Arena, number: int) -> None:
    if arena.nbytes < (needed := prepared.portions[number].nbytes):
        raise LimitExceeded(f"portion {number} needs an arena of {needed} bytes, found one of {arena.nbytes}")


@dataclass(frozen=True, slots=True)
class _Move:
    """A slice by addresses: `source` of its first byte in a local tensor without gaps; None where it has no such place."""

    piece: PlannedPiece
    at: Slice
    array: int
    source: int | None
    nbytes: int


class Stager:
    """Copies the portions of one plan into arenas, again and again.

    A pool's threads help; `python -m tools.bench.copies` shows what they bring, which is nothing where one core fills the
    memory bus, or ranks keep all cores busy.
    """

    def __init__(self, prepared: ArenaPlan) -> None:
        self.prepared = prepared
        self._moves: list[list[_Move]] = []

    def stage(
        self,
        arena: Arena,
        number: int,
        held: Sequence[HeldArray],
        skip: Collection[int] = (),
        pool: Pool | None = None,
    ) -> int:
        """Copies portion `number` from what this rank holds; returns its bytes. Blocking.

        On return those tensors may change. The arena, emptied before, says on the way how far it is filled; of several threads
        at the end. The arrays in `skip` are staged by somebody else, who then says it. By address where a tensor has no gaps,
        which costs 1 µs a slice, views 6 µs; what the arrays of a plan have in common, and so where their slices lie, is found
        out once. Raises LimitExceeded for an arena that is too small, Refused for one that was not emptied: a writer would take
        what lies there for what is to come.
        """
        _require_room(self.prepared, arena, number)
        if arena.filled:
            raise Refused("this arena is full: it is emptied before it is filled again")
        if not self._moves:
            self._moves = [[_move(self.prepared, at, held) for at in one.slices] for one in self.prepared.portions]
        addresses = [None if array in skip else host_address(one.tensor) for array, one in enumerate(held)]
        moves = [move for move in self._moves[number] if move.array not in skip] if skip else self._moves[number]
        nbytes = sum(move.nbytes for move in moves)
        fill_to = _nobody if skip else arena.fill_to
        if pool is None or nbytes < MIN_THREADED_NBYTES:
            _copy(moves, addresses, held, arena.memory, fill_to)
        else:
            parts: list[Callable[[], object]] = []
            for move in moves:
                parts += _parts_of_move(move, addresses[move.array], held, arena.memory)
            pool.share_out(parts, lambda part: part())
        fill_to(self.prepared.portions[number].nbytes)
        return nbytes


def _nobody(filled: int) -> None:
    """Somebody else says how far the arena is filled."""


def _copy(
    moves: Sequence[_Move],
    addresses: Sequence[int | None],
    held: Sequence[HeldArray],
    memory: Bytes,
    fill_to: Callable[[int], None],
) -> None:
    """Copies in the order of the arena, and says how far after each part."""
    memmove, target = ctypes.memmove, address_of(memory.data) if moves else 0
    said = 0
    for move in moves:
        first, base, start = move.at.offset, addresses[move.array], 0
        while start < move.nbytes:
            if base is None or move.source is None:
                nbytes = move.nbytes
                _copy_held(move, held, memory)
            else:
                nbytes = min(PART_NBYTES, move.nbytes - start)
                memmove(target + first + start, base + move.source + start, nbytes)
            start += nbytes
            if first + start - said >= PART_NBYTES:
                fill_to(said := first + start)


def _move(prepared: ArenaPlan, at: Slice, held: Sequence[HeldArray]) -> _Move:
    piece = prepared.plan.files[at.file].pieces[at.piece]
    offset = _offset_of(piece.local, held[piece.array].box.shape, itemsize=held[piece.array].spec.type.itemsize)
    return _Move(piece, at, piece.array, None if offset is None else offset + at.start, at.stop - at.start)


PiecePlace = tuple[int, int | None]  # of a piece: its array, and its first byte in a local tensor without gaps, if it has one


def places_of(pack: PlannedPack, held: Sequence[HeldArray]) -> tuple[PiecePlace, ...]:
    """Of all pieces of a pack."""
    known: dict[tuple[int, int, str], int | None] = {}  # by the very boxes, which many arrays have in common
    found = []
    for one in pack.pieces:
        array = held[one.array]
        alike = id(one.local), id(array.box), array.spec.dtype
        if alike not in known:
            known[alike] = _offset_of(one.local, array.box.shape, itemsize=array.spec.type.itemsize)
        found.append((one.array, known[alike]))
    return tuple(found)


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


def _copy_held(move: _Move, held: Sequence[HeldArray], memory: Bytes) -> None:
    """A slice of a tensor with gaps, or on a device, in C order of its piece."""
    into = memory[move.at.offset : move.at.offset + move.nbytes]
    part = part_of(host_elements(held[move.array].tensor), move.piece.local)
    if move.nbytes == move.piece.run.nbytes:
        np.copyto(into.view(part.dtype).reshape(part.shape), part)
    elif (flat := flat_bytes(part)) is not None:
        np.copyto(into, flat[move.at.start : move.at.stop])
    else:
        gather(part, move.at.start, into)


def _parts_of_move(move: _Move, base: int | None, held: Sequence[HeldArray], memory: Bytes) -> list[Callable[[], object]]:
    if base is None or move.source is None:
        return [lambda: _copy_held(move, held, memory)]
    start, target = base + move.source, address_of(memory.data) + move.at.offset

    def part(at: int) -> Callable[[], object]:
        return lambda: ctypes.memmove(target + at, start + at, min(PART_NBYTES, move.nbytes - at))

    return [part(at) for at in range(0, move.nbytes, PART_NBYTES)]
