"""Who holds what of a whole array, and whether everybody who should does. [LANG-18]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from elastickpt.language.held import Held, HeldPiece
from elastickpt.language.labels import axes_in, labelled, labels_of
from elastickpt.language.rules import Rule, Rules
from elastickpt.language.scope import Scope


@dataclass(frozen=True, slots=True)
class LocalShape:
    """A tensor of a rank, as far as a program looks at it."""

    container: str
    name: str
    shape: tuple[int, ...]
    chunk: int = 0  # which of the parts that the rank holds side by side


@dataclass(frozen=True, slots=True)
class RankShapes:
    """What one rank holds, in the order of its file. `where` names the rank in messages."""

    coordinate: Mapping[str, int]
    tensors: tuple[LocalShape, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """Tensor `tensor` of rank `rank`, and what of the array it holds."""

    rank: int
    tensor: int
    rule: Rule
    held: Held
    at: Mapping[str, int]  # its place on all axes, chunks too


@dataclass(frozen=True, slots=True)
class WholeArray:
    """A whole array and who holds what of it. `true` is its shape without padding, None where nothing is padded."""

    name: str
    shape: tuple[int, ...]
    true: tuple[int, ...] | None
    holders: tuple[Holder, ...]


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
            fixed |= axes_in(hole.share)
    stacked = {hole.name for hole in rule.whole.holes} - {hole.name for hole in rule.pattern.holes}
    for label in stacked & set(labels_of(rule.dims)):
        fixed |= axes_in(labelled(label, rule.dims if isinstance(rule.dims, tuple) else ()))
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
