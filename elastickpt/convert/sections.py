"""What is read of ranks' tensors for an array, and which bytes several arrays need, so that none is read twice. No I/O.

A tensor that feeds several arrays is read in sections: for each array the elements between its first and its last one, or run
by run where others lie between them. Where runs are so short that what lies between is read with them, or where tensors share
memory, the bytes are a region, which is read once and kept until the last array that needs it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from elastickpt.convert.nodes import Gathered, RankPart
from elastickpt.foreign.listing import Storage, StoredTensor
from elastickpt.foreign.tensor_bytes import ranges
from elastickpt.format.arrays import Box
from elastickpt.language.held import HeldPiece, Strides
from elastickpt.layout.grid import c_strides


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of a file that several sections read; `leaves` are those that they are of, by number."""

    file: str
    start: int
    stop: int
    leaves: frozenset[int]


def sections(share: RankPart) -> tuple[RankPart, ...]:
    """The share, or smaller ones that hold what it gives of its array, their pieces counted from their first element."""
    needed = [piece for piece in share.pieces if piece.count]
    count = sum(piece.count for piece in needed)
    if count >= prod(share.shape) or not direct(share):
        return (share,)
    ends = [p.local.offset + sum((n - 1) * s for n, s in zip(p.extents, p.local.strides, strict=True)) for p in needed]
    first, stop = min((piece.local.offset for piece in needed), default=0), max(ends, default=-1) + 1
    if stop - first <= 2 * count or len(needed) == 0:
        run = HeldPiece((stop - first,), Strides(0, (1,)), Strides(first, (1,)))
        moved = tuple(replace(p, local=replace(p.local, offset=p.local.offset - first)) for p in needed)
        return (replace(share, shape=run.extents, parts=_part(share, run), pieces=moved),)
    return tuple(
        replace(share, shape=p.extents, parts=_part(share, p), pieces=(replace(p, local=Strides(0, c_strides(p.extents, 1))),))
        for p in needed
    )


def direct(share: RankPart) -> bool:
    """Whether a lattice in the local tensor is one in the file."""
    return len(share.parts) == 1 and share.parts[0][1].contiguous


def of_piece(share: RankPart, piece: HeldPiece) -> StoredTensor:
    """The elements of a piece as a tensor of the file, for a share of which that is so."""
    stored = share.parts[0][1]
    return replace(stored, offset=stored.offset + piece.local.offset, shape=piece.extents, strides=piece.local.strides)


def _part(share: RankPart, piece: HeldPiece) -> tuple[tuple[Box, StoredTensor], ...]:
    return ((Box.whole(piece.extents), of_piece(share, piece)),)


def regions(leaves: Sequence[object]) -> tuple[Region, ...]:
    """The bytes that sections of these leaves need more than once."""
    reads: dict[Storage, list[tuple[int, StoredTensor]]] = {}
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Gathered):
            for stored in _stored(leaf):
                reads.setdefault(stored.storage, []).append((number, stored))
    return tuple(
        region for storage, several in reads.items() if len(several) > 1 for region in _overlaps(storage.file, several)
    )


def _stored(leaf: Gathered) -> Iterator[StoredTensor]:
    """What is read for a leaf, as often as it is."""
    for share in leaf.shares:
        for section in sections(share):
            times = 1 if direct(section) or section.agreement != "average" else len(section.pieces)
            for _, stored in section.parts:
                yield from [stored] * times


def _overlaps(file: str, reads: Iterable[tuple[int, StoredTensor]]) -> Iterator[Region]:
    intervals = sorted((start, stop, leaf) for leaf, stored in reads for start, stop in ranges(stored))
    under: list[tuple[int, int, int]] = []
    end = 0
    for one in (*intervals, None):
        if one is not None and under and one[0] < end:
            under.append(one)
            end = max(end, one[1])
            continue
        if len(under) > 1:
            yield Region(file, under[0][0], end, frozenset(leaf for _, _, leaf in under))
        if one is not None:
            under, end = [one], one[1]
