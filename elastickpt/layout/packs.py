"""Placement packed: how arrays are cut into chunks, who of several replicas stores a box, and where pieces lie in a pack.

[FRAG-60..66, SAVE-116, SAVE-117]

All of it follows from the plan: shapes, layouts, who holds what. So a save that blocks and one beside training, a writer and
the one that replaces it, make the same bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from elastickpt.format.arrays import Box
from elastickpt.format.version import MAX_CHUNKS, MIB
from elastickpt.layout.algebra import intersect
from elastickpt.layout.grid import CHUNK_NBYTES, ByteRun, chunk_count, chunk_nbytes, chunk_shape, chunks_of, runs_of
from elastickpt.layout.placement import cuts_of, is_cut_regularly

PAGE = 4096
CACHE_LINE = 64
PAGE_SLOT_NBYTES = MIB  # from so many bytes on a slot begins at a page, and may be written past the page cache
WHOLE_NBYTES = 64 * MIB  # of the largest box that goes whole to one replica
MORE_PARTS = 64  # so many times more parts than needed are tried, for a number that suits
PADS_OF = 100  # what size alone cuts is padded by at most this part of it, where that can be


@dataclass(frozen=True, slots=True)
class Cutting:
    """How an array is cut in packs. `box`: the extents of what a rank holds, of the first one; `cuts` as in `chunk_shape`;
    `regular`: all cuts of the layout are."""

    shape: tuple[int, ...]
    itemsize: int
    box: tuple[int, ...]
    cuts: tuple[int, ...]
    regular: bool

    @classmethod
    def of(
        cls, shape: Sequence[int], itemsize: int, sizes: Sequence[int] | None, placements: Sequence[str], held: Box
    ) -> Cutting:
        """Of an array by its layout, on a mesh of such sizes; `held` is what a rank has of it.

        That counts where the layout cuts it irregularly.
        """
        whole = tuple(shape)
        if sizes is None:
            return cls(whole, itemsize, whole, (0,) * len(whole), True)
        cuts = cuts_of(whole, sizes, placements)
        regular = is_cut_regularly(whole, sizes, placements)
        box = tuple(cut or extent for cut, extent in zip(cuts, whole, strict=True)) if regular else held.shape
        return cls(whole, itemsize, box, cuts, regular)

    def division(self, replicas: int) -> tuple[int, int] | None:
        """(axis, extent): along which axis, and at multiples of what extent, so many replicas share out the box; None where it
        goes whole to one of them. [SAVE-117]"""
        if replicas < 2 or prod(self.box) * self.itemsize <= WHOLE_NBYTES:
            return None
        axis = next((axis for axis, extent in enumerate(self.box) if extent > 1), None)
        return None if axis is None else (axis, -(-self.box[axis] // replicas))

    def keeps_chunks_whole(self, *, replicas: int) -> bool:
        """Whether every chunk lies in one pack: then readers of zarr can be referred to it. [FRAG-61]"""
        divided = self.division(replicas)
        ends = list(self.cuts)  # every part of the array ends at a multiple of these, where they are not 0
        if divided is not None:
            axis, extent = divided
            if ends[axis] % extent:
                return False
            ends[axis] = extent
        chunk = self.chunk_shape(replicas=replicas)
        return self.regular and all(end % extent == 0 for end, extent in zip(ends, chunk, strict=True))

    def chunk_shape(self, *, replicas: int) -> tuple[int, ...]:
        """The chunk shape of the array. Raises LimitExceeded. [FRAG-60]"""
        if not self.regular:
            return chunk_shape(self.shape, itemsize=self.itemsize, cuts=self.cuts)
        cuts = list(self.cuts)
        divided = self.division(replicas)
        if divided is not None:
            axis, extent = divided
            if cuts[axis] % extent == 0:  # also where the layout does not cut it
                cuts[axis] = extent
        return packed_chunk_shape(self.shape, itemsize=self.itemsize, cuts=cuts)


def packed_chunk_shape(shape: Sequence[int], *, itemsize: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """The chunk shape of an array that is cut regularly, by the rule of FRAG-60: the first axis is cut like the others.

    `cuts` as in `grid.chunk_shape`. Raises LimitExceeded.
    """
    extents = [max(extent, 1) for extent in shape]
    by_layout = [0 < cut < extent for cut, extent in zip(cuts, extents, strict=True)]
    for axis, cut in enumerate(cuts):
        if by_layout[axis]:
            extents[axis] = cut
    step = prod(extents) * itemsize
    for axis, extent in enumerate(extents):
        step //= extent
        if step <= CHUNK_NBYTES:
            parts = -(-extent // (CHUNK_NBYTES // step))
            extents[axis] = _part(extent, parts, pads=0 if by_layout[axis] else extent // PADS_OF)
            break
        extents[axis] = 1
    if chunk_count(shape, extents) <= MAX_CHUNKS:
        return tuple(extents)
    return chunk_shape(shape, itemsize=itemsize, cuts=cuts)


def _part(extent: int, parts: int, *, pads: int) -> int:
    """The extent of at least so many equal parts with at most so many pads; of as many as asked for, where there are none."""
    for number in range(parts, MORE_PARTS * parts + 1):
        part = -(-extent // number)
        if part * -(-extent // part) - extent <= pads:
            return part
    return -(-extent // parts)


# -- replicas ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shared:
    """A box that several ranks hold alike. `division` as in `Cutting`; `by_first`: it is the first one's to store."""

    key: str
    box: Box
    itemsize: int
    division: tuple[int, int] | None = None
    by_first: bool = False


def share_out(shared: Sequence[Shared], count: int, index: int) -> tuple[Box | None, ...]:
    """What replica `index` of `count` stores of each of the boxes that the same ranks hold alike; None is nothing of it.

    Over all indices each box is stored once. The order of `shared` does not matter. [SAVE-116, SAVE-117]
    """
    stored = [0] * count
    mine: list[Box | None] = [None] * len(shared)
    whole = []
    for number, one in enumerate(shared):
        nbytes = one.box.count * one.itemsize
        if nbytes == 0:
            continue
        if one.by_first or count == 1:
            stored[0] += nbytes
            mine[number] = one.box if index == 0 else None
        elif one.division is not None:
            for replica, part in enumerate(_parts(one.box, *one.division)):
                stored[replica] += part.count * one.itemsize
                if replica == index:
                    mine[number] = part
        else:
            whole.append((-nbytes, one.key, number))
    least = [(nbytes, replica) for replica, nbytes in enumerate(stored)]
    heapq.heapify(least)
    for less, _, number in sorted(whole):
        nbytes, replica = least[0]
        heapq.heapreplace(least, (nbytes - less, replica))
        if replica == index:
            mine[number] = shared[number].box
    return tuple(mine)


def _parts(box: Box, axis: int, extent: int) -> Iterator[Box]:
    """The box, cut at multiples of an extent from its beginning on."""
    for low in range(box.start[axis], box.stop[axis], extent):
        high = min(low + extent, box.stop[axis])
        yield Box((*box.start[:axis], low, *box.start[axis + 1 :]), (*box.stop[:axis], high, *box.stop[axis + 1 :]))


# -- packs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackSlot:
    """A place in a pack: a whole chunk with its pads, or a part of one. Offsets of `runs` count from its beginning."""

    nbytes: int
    runs: tuple[ByteRun, ...]


def slots_of(box: Box, *, shape: Sequence[int], chunk_shape: Sequence[int], itemsize: int) -> Iterator[PackSlot]:
    """The slots in which a writer stores a box of an array, of which it stores nothing else, in C order of chunks.

    [FRAG-61, FRAG-66]
    """
    whole = chunk_nbytes(chunk_shape, itemsize=itemsize)
    for chunk, inside in chunks_of(box, shape=shape, chunk_shape=chunk_shape):
        part = intersect(box, inside)
        if part is None:
            continue
        if part == inside:
            yield PackSlot(whole, runs_of(part, shape=shape, chunk_shape=chunk_shape, itemsize=itemsize))
        else:
            nbytes = part.count * itemsize
            yield PackSlot(nbytes, (ByteRun(chunk, part, 0, nbytes, nbytes, nbytes),))


def place_slots(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where slots of these sizes, in bytes, begin in a pack, and how many bytes it has. [FRAG-62]"""
    offsets = []
    end = 0
    for nbytes in sizes:
        offset = aligned(end, PAGE if nbytes >= PAGE_SLOT_NBYTES else CACHE_LINE)
        offsets.append(offset)
        end = offset + nbytes
    return tuple(offsets), aligned(end, PAGE)


def aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not before `offset`."""
    return -(-offset // alignment) * alignment
