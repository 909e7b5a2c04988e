"""What arrays are made of, as values: a small expression for each, whose leaves lie in files. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Literal, TypeAlias

from elastickpt.foreign.listing import StoredTensor
from elastickpt.format.arrays import Box, dtype_named
from elastickpt.format.records import ArrayRecord
from elastickpt.language.held import HeldPiece, Strides
from elastickpt.language.scope import Scope
from elastickpt.language.tree import TextPlace

Agreement = Literal["same", "any", "average"]


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank's tensor gives of an array.

    `parts` are the boxes of the local tensor and where their bytes lie; `pieces` where its elements go. `divisor`: what is
    stored is the whole's divided by it. `where` names the tensor in messages. `worker`: its place on averaged axes.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[Box, StoredTensor], ...]
    pieces: tuple[HeldPiece, ...]
    where: str
    agreement: Agreement = "same"
    divisor: Fraction = Fraction(1)
    worker: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """An array that is put together from ranks' tensors.

    `divided`: the program says that ranks hold different parts, and not that equal ones are meant. `rule` is its place in the
    program of `scope`, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    shares: tuple[RankPart, ...]
    divided: bool
    rule: TextPlace
    scope: Scope = field(default_factory=Scope)


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """An array of a universal checkpoint."""

    record: ArrayRecord

    @property
    def shape(self) -> tuple[int, ...]:
        return self.record.spec.shape

    @property
    def dtype(self) -> str:
        return self.record.spec.dtype


@dataclass(frozen=True, slots=True)
class Term:
    """Elements of another array that go into one: a lattice in both, in elements of their C order."""

    source: Node
    extents: tuple[int, ...]
    at: Strides
    to: Strides


@dataclass(frozen=True, slots=True, eq=False)
class Mapped:
    """An array made of elements of others, bit for bit; what no term reaches is zero."""

    shape: tuple[int, ...]
    dtype: str
    terms: tuple[Term, ...]

    @property
    def sources(self) -> tuple[Node, ...]:
        """The arrays that it is made of, each once."""
        return tuple(dict.fromkeys(term.source for term in self.terms))


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """An array in another element type."""

    source: Node
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


Node: TypeAlias = Gathered | Recorded | Mapped | Cast


def nbytes_of(node: Node) -> int:
    return prod(node.shape) * dtype_named(node.dtype).itemsize


def visits(node: Node) -> Iterator[Gathered | Recorded]:
    """The arrays in files that its evaluation needs, in order, one as often as it is needed."""
    if isinstance(node, Gathered | Recorded):
        yield node
        return
    for source in node.sources if isinstance(node, Mapped) else (node.source,):
        yield from visits(source)


def leaves(node: Node) -> tuple[Gathered | Recorded, ...]:
    """The arrays in files that it is made of, each once."""
    return tuple(dict.fromkeys(visits(node)))


def working_nbytes(node: Node) -> int:
    """Bytes of memory that its evaluation needs at one time."""
    if isinstance(node, Recorded):
        return nbytes_of(node)
    if isinstance(node, Gathered):
        item = dtype_named(node.dtype).itemsize
        return nbytes_of(node) + max((prod(share.shape) * item for share in node.shares), default=0)
    sources = node.sources if isinstance(node, Mapped) else (node.source,)
    return nbytes_of(node) + max(map(working_nbytes, sources), default=0)


def resized(node: Node, shape: tuple[int, ...]) -> Node:
    """The node cut to, or filled with zeros up to, another shape of as many axes."""
    if node.shape == shape:
        return node
    common = tuple(map(min, node.shape, shape))
    at, to = (Strides(0, _steps(one)) for one in (node.shape, shape))
    return Mapped(shape, node.dtype, (Term(node, common, at, to),))


def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[k + 1 :]) for k in range(len(shape)))
