"""Who holds what of a whole array, and whether everybody who should does. [LANG-18]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from elastickpt.language.held import HeldParts, HeldPiece, prove_pieces
from elastickpt.language.labels import labelled, labels_of
from elastickpt.language.rules import Rule, Rules
from elastickpt.language.scope import Scope
from elastickpt.language.strands import Lowering, axes_of_factor, whole_index


@dataclass(frozen=True, slots=True)
class LocalShape:
    """A tensor of a rank, as far as a program looks at it."""

    container: str
    name: str
    shape: tuple[int, ...]
    chunk: int = 0  # which of the parts that the rank holds side by side


@dataclass(frozen=True, slots=True)
class RankShapes:
    """What one rank holds, in the order of its file. `where` names the rank in messages.

    `listings`: orders that its file states, as names with the shapes that the rank has of them.
    """

    coordinate: Mapping[str, int]
    tensors: tuple[LocalShape, ...]
    where: str = ""
    listings: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holder:
    """Tensor `tensor` of rank `rank`, and what of the array it holds."""

    rank: int
    tensor: int
    rule: Rule
    held: HeldParts
    at: Mapping[str, int]  # its place on all axes, chunks too


@dataclass(frozen=True, slots=True)
class WholeArray:
    """A whole array and who holds what of it. `true` is its shape without padding, None where nothing is padded."""

    name: str
    shape: tuple[int, ...]
    true: tuple[int, ...] | None
    holders: tuple[Holder, ...]


def global_names(rule: Rule, holes: Mapping[str, int | str], scope: Scope, at: Mapping[str, int]) -> dict[str, int | str]:
    """The holes of a name as the whole has them. Raises ProgramFault for a number beyond the rank's share."""
    names = dict(holes)
    for hole in rule.pattern.holes:
        if hole.share is not None:
            extent = Lowering(scope, at, {}).extent(hole.share)
            local = int(names[hole.name])
            if local >= extent.local:
                said = f"number {local} in a name of {dict(at)}: expected below {extent.local}, its share of {extent.whole}"
                raise scope.fault(said, hole.at)
            names[hole.name] = whole_index(extent, local)
    return names


def require_whole(name: str, shape: tuple[int, ...], holders: Sequence[Holder], scope: Scope) -> None:
    """What flat tensors hold of an array is all of it: each element in one piece, which several ranks may hold. [LANG-27]"""
    distinct = {(p.extents, p.whole): p for one in holders for p in one.held.pieces if p.count}
    report = prove_pieces(shape, list(distinct.values()))
    if not report.exact:
        problem = f"nobody holds {report.gaps[0]}" if report.gaps else f"two parts hold {report.overlaps[0][2]}"
        raise scope.fault(f"array {name!r} of shape {shape}: {problem} of its elements", holders[0].rule.at)


def require_all(name: str, holders: list[Holder], rules: Rules, scope: Scope) -> None:
    """Every rank that the rule says has it must have it once."""
    rule = holders[0].rule
    axes = rules.meshes.get(rule.mesh, ())
    fixed = _fixed_axes(rule, rules)
    seen: dict[tuple[int, ...], Holder] = {}
    for holder in holders:
        where = (*(holder.at.get(axis, 0) for axis in axes), *(holder.at.get(axis, 0) for axis in rules.chunks))
        if where in seen:
            raise scope.fault(f"array {name!r}: {dict(holder.at)} holds it twice", rule.at)
        seen[where] = holder
    chunk_places = {where[len(axes) :] for where in seen}
    if len(chunk_places) > 1:
        raise scope.fault(f"array {name!r} is held by several chunks of one rank", rule.at)
    choices = [
        sorted({where[k] for where in seen}) if axis in fixed else range(scope.axes[axis]) for k, axis in enumerate(axes)
    ]
    for place in product(*choices):
        if (*place, *next(iter(chunk_places))) not in seen:
            there = ", ".join(f"{axis}={index}" for axis, index in zip(axes, place, strict=True))
            raise scope.fault(f"array {name!r}: the rank at {there} lacks its tensor", rule.at)


def _fixed_axes(rule: Rule, rules: Rules) -> set[str]:
    """Axes along which names, `first` and `last` decide who has a tensor."""
    fixed: set[str] = {axis for hold in rule.holds if hold.word in ("first", "last") for axis in hold.axes}
    for hole in rule.pattern.holes:
        if hole.share is not None:
            fixed |= axes_of_factor(hole.share)
    stacked = {hole.name for hole in rule.whole.holes} - {hole.name for hole in rule.pattern.holes}
    for label in stacked & set(labels_of(rule.dims)):
        fixed |= axes_of_factor(labelled(label, rule.dims if isinstance(rule.dims, tuple) else ()))
    for split in rules.splits:
        if fixed & set(split.into):
            fixed.add(split.axis)
    return fixed


def distinct_pieces(array: WholeArray) -> dict[HeldPiece, list[Holder]]:
    """The pieces that make an array up, and who holds each: several where ranks hold the same."""
    found: dict[HeldPiece, list[Holder]] = {}
    for holder in array.holders:
        for piece in holder.held.pieces:
            if piece.count:
                key = HeldPiece(piece.extents, piece.whole, piece.local)
                found.setdefault(key, []).append(holder)
    return found
