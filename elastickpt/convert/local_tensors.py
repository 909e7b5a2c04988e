"""What ranks' files hold, as far as a program and an optimizer's names look at it; a whole source is one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastickpt.foreign.listing import ForeignCheckpoint, LocalName, ParamGroup, StateScalar, StoredTensor
from elastickpt.format.arrays import Box


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor of a rank: a box of it may lie apart."""

    item: str
    name: LocalName
    state: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[tuple[Box, StoredTensor], ...]
    chunk: int


@dataclass(frozen=True, slots=True)
class LocalRank:
    """`whole`: its tensors are whole arrays."""

    coordinate: Mapping[str, int]
    where: str
    tensors: tuple[Local, ...]
    groups: tuple[ParamGroup, ...]
    scalars: tuple[StateScalar, ...]
    whole: bool


def local_ranks(found: ForeignCheckpoint) -> Iterator[LocalRank]:
    """The ranks of a listing, in its order."""
    for rank in found.ranks:
        tensors = tuple(
            Local(
                one.item,
                one.name,
                one.state,
                one.stored.shape,
                one.stored.dtype,
                ((Box.whole(one.stored.shape), one.stored),),
                one.chunk,
            )
            for one in rank.tensors
        )
        yield LocalRank(dict(rank.coordinate), rank.file, tensors, rank.groups, rank.scalars, False)
    if found.wholes or not found.ranks:
        wholes = tuple(
            Local(
                one.item, one.name, one.state, one.shape, one.dtype, tuple((piece.box, piece.stored) for piece in one.pieces), 0
            )
            for one in found.wholes
            if one.state
        )
        yield LocalRank({}, found.folder, wholes, found.groups, found.scalars, True)
