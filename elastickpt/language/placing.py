"""Reads a program the other way: which tensors ranks have of whole arrays. [LANG-24]"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import prod

from elastickpt.language import tree as t
from elastickpt.language.flat import Orders, Shapes, cat_of, lay_flat
from elastickpt.language.held import HeldParts, lower
from elastickpt.language.labels import labelled, labels_of
from elastickpt.language.patterns import filled, regex_of
from elastickpt.language.renaming import NamedShape
from elastickpt.language.rules import Rule, Rules
from elastickpt.language.scope import Scope
from elastickpt.language.strands import Lowering, solved, unknown_sizes, whole_index

TextKey = tuple[tuple[int, tuple[int | str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What a local tensor has of one whole array."""

    array: str
    held: HeldParts


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One local tensor to be: of the rank at `coordinate`, of its part `chunk`. `key` sorts as the program's text does."""

    coordinate: tuple[tuple[str, int], ...]
    chunk: int
    container: str
    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    rule: Rule
    key: TextKey


def whole_sizes(rules: Rules, arrays: Sequence[NamedShape]) -> Scope:
    """The scope with the sizes that whole shapes tell: dimensions without their axes, padded ones by their true extent."""
    erased = Scope(
        rules.scope.constants, dict.fromkeys(rules.scope.axes, 1), rules.scope.sizes, rules.scope.source, rules.scope.name
    )
    found = [
        (rule, one)
        for rule in rules.rules
        if not rule.flag("drop") and isinstance(rule.dims, tuple)
        for names in [regex_of(rule.tied or rule.whole)]
        for one in arrays
        if names.fullmatch(one.name)
    ]
    while True:
        sizes: dict[str, int] = {}
        for rule, one in found:
            dims = _unstacked(rule)
            if len(dims) == len(one.shape):
                for factor, extent in zip(dims, one.true or one.shape, strict=True):
                    _solve(factor, extent, erased, sizes)
        if not sizes:
            return rules.scope.with_sizes(erased.sizes)
        erased = erased.with_sizes(sizes)


def _solve(factor: t.Factor, extent: int, erased: Scope, sizes: dict[str, int]) -> None:
    names = {size.name for size in unknown_sizes(factor, erased)}
    if len(names) == 1 and not names & sizes.keys():
        (name,) = names
        inner = factor
        while isinstance(inner, t.Cut | t.Deal):
            inner = inner.inner
        size = extent if isinstance(inner, t.Pad) else solved(factor, erased, name, Fraction(extent))
        if size is not None:
            sizes[name] = size


def _unstacked(rule: Rule) -> list[t.Factor]:
    """The dimensions of one whole array: without numbers that its name carries."""
    labels = {hole.name for hole in rule.whole.holes} - {hole.name for hole in rule.pattern.holes}
    dims = rule.dims if isinstance(rule.dims, tuple) else ()
    return [_without(factor, labels) for factor in dims if not _is_label(factor, labels)]


def _is_label(factor: t.Factor, labels: set[str]) -> bool:
    return isinstance(factor, t.Sum) and len(factor.parts) == 1 and factor.parts[0].label in labels


def _without(factor: t.Factor, labels: set[str]) -> t.Factor:
    if _is_label(factor, labels):
        return t.Number(1)
    if isinstance(factor, t.Cut | t.Deal):
        return replace(factor, inner=_without(factor.inner, labels))
    if isinstance(factor, t.Sum):
        parts = (replace(part, factors=tuple(_without(one, labels) for one in part.factors)) for part in factor.parts)
        return t.Sum(tuple(parts), at=factor.at)
    return factor


def place(
    rules: Rules, arrays: Sequence[NamedShape], *, listings: Mapping[str, Shapes] | None = None
) -> tuple[PlacedTensor, ...]:
    """Every rank's tensors, in the order of the program; flat ones by orders that are written out, or by `listings`.

    Raises ProgramFault for an array that no rule has, a rule that has none and is not optional, and sizes that do not fit.
    """
    scope = whole_sizes(rules, arrays)
    used: set[int] = set()
    made: dict[tuple[object, ...], _Under] = {}
    flat = tuple(_flat(rules, scope, arrays, listings or {}))
    laid = {part.array for one in flat for part in one.parts}
    used.update(id(one.rule) for one in flat)
    finders = [regex_of(rule.tied or rule.whole) for rule in rules.rules]
    for array in arrays:
        fitting = [
            (rule, m)
            for rule, finder in zip(rules.rules, finders, strict=True)
            if not rule.flag("drop") and cat_of(rule.dims) is None and (m := finder.fullmatch(array.name))
        ]
        own = [rule for rule, _ in fitting if rule.tied is None]
        if not fitting and array.name not in laid:
            at = rules.block_of(array.item)
            raise rules.scope.fault(f"array {array.name!r}, shape {array.shape}: no rule has it; expected one here", at)
        if len(own) > 1:
            lines = ", ".join(str(rule.at.line) for rule in own)
            raise rules.scope.fault(f"array {array.name!r}: several rules have it, of lines {lines}", own[-1].at)
        for rule, found in fitting:
            used.add(id(rule))
            holes = {hole: int(text) if text.isdecimal() else text for hole, text in found.groupdict().items()}
            for one in _places(rule, rules, scope, array, holes):
                key = (one.coordinate, one.chunk, one.container, one.name)
                made.setdefault(key, _Under(one)).parts.extend(one.parts)
    for rule in rules.rules:
        if id(rule) not in used and not rule.flag("optional") and not rule.flag("drop"):
            raise rules.scope.fault("no array has such a name: mark the rule 'optional' if that may be", rule.at)
    placed = (*(one.finished(rules) for one in made.values()), *flat)
    return tuple(sorted(placed, key=lambda p: (p.coordinate, p.chunk, p.key)))


def _flat(rules: Rules, scope: Scope, arrays: Sequence[NamedShape], listings: Mapping[str, Shapes]) -> Iterator[PlacedTensor]:
    """The flat tensors of all ranks; a rule of which no array is there has none."""
    names = {one.name for one in arrays}
    for rule in rules.rules:
        cat = cat_of(rule.dims)
        if cat is None or not isinstance(rule.dims, tuple):
            continue
        if rule.pattern.holes:
            raise scope.fault("a flat tensor that is to be made has a plain name", rule.at)
        for index in product(*(range(scope.axes[axis]) for axis in rules.rank_axes)):
            coordinate = tuple(zip(rules.rank_axes, index, strict=True))
            at = rules.coordinate(dict(coordinate))
            order = Orders(rules, scope, at, listings).listed(cat)
            if not _allowed(rule, at, scope) or not names & {one.name for one in order}:
                continue
            laid = lay_flat(rule.dims[0], order, scope, at)
            parts = tuple(Part(one.name, one.held) for one in laid.parts)
            key: TextKey = tuple((line, ()) for line, _ in rule.path)
            container = filled(rule.containers[0], {})
            yield PlacedTensor(coordinate, 0, container, filled(rule.pattern, {}), (laid.count,), parts, rule, key)


class _Under:
    """A local tensor under way: stacked ones have parts of several arrays."""

    def __init__(self, first: PlacedTensor) -> None:
        self.first = first
        self.parts: list[Part] = []

    def finished(self, rules: Rules) -> PlacedTensor:
        one = self.first
        count = sum(piece.count for part in self.parts for piece in part.held.pieces)
        if count != prod(one.shape):
            raise rules.scope.fault(
                f"tensor {one.name!r} of {dict(one.coordinate)}: {prod(one.shape)} elements, the arrays give {count}",
                one.rule.at,
            )
        return PlacedTensor(one.coordinate, one.chunk, one.container, one.name, one.shape, tuple(self.parts), one.rule, one.key)


def _places(
    rule: Rule, rules: Rules, scope: Scope, array: NamedShape, holes: Mapping[str, int | str]
) -> Iterator[PlacedTensor]:
    axes = rules.rank_axes
    for index in product(*(range(scope.axes[axis]) for axis in axes)):
        coordinate = tuple(zip(axes, index, strict=True))
        place = rules.coordinate(dict(coordinate))
        for at_chunk in product(*(range(scope.axes[axis]) for axis in rules.chunks)):
            at = {**place, **dict(zip(rules.chunks, at_chunk, strict=True))}
            if not _allowed(rule, at, scope):
                continue
            chunk = 0
            for axis, k in zip(rules.chunks, at_chunk, strict=True):
                chunk = chunk * scope.axes[axis] + k
            one = _placed(rule, scope, array, holes, (coordinate, at, chunk))
            if one is not None:
                yield one


def _allowed(rule: Rule, place: Mapping[str, int], scope: Scope) -> bool:
    for hold in rule.holds:
        for axis in hold.axes:
            wanted = {"first": 0, "last": scope.axes[axis] - 1}.get(hold.word)
            if wanted is not None and place.get(axis, 0) != wanted:
                return False
    return True


def _placed(
    rule: Rule,
    scope: Scope,
    array: NamedShape,
    holes: Mapping[str, int | str],
    where: tuple[tuple[tuple[str, int], ...], Mapping[str, int], int],
) -> PlacedTensor | None:
    """The tensor of one place, or None where it holds nothing of that name."""
    coordinate, at, chunk = where
    numbers = dict(holes)
    for hole in rule.pattern.holes:
        if hole.share is not None:
            local = _local_number(hole.share, int(numbers[hole.name]), scope, at)
            if local is None:
                return None
            numbers[hole.name] = local
    chosen: dict[str, int] = {}
    if isinstance(rule.dims, tuple):
        for label in labels_of(rule.dims):
            if label in holes and label not in {hole.name for hole in rule.pattern.holes}:
                local = _local_number(labelled(label, rule.dims), int(holes[label]), scope, at)
                if local is None:
                    return None
                chosen[label] = local
        held = lower(rule.dims, scope, at, chosen=chosen)
    else:
        held = lower([t.Number(extent) for extent in array.shape], scope, at)
    _check(rule, scope, array, held)
    name = filled(rule.pattern, numbers)
    key = tuple((line, tuple(numbers.get(hole, 0) for hole in names)) for line, names in rule.path)
    container = filled(rule.containers[0], {hole.name: array.item for hole in rule.containers[0].holes})
    return PlacedTensor(coordinate, chunk, container, name, held.local, (Part(array.name, held),), rule, key)


def _local_number(share: t.Factor, number: int, scope: Scope, at: Mapping[str, int]) -> int | None:
    extent = Lowering(scope, at, {}).extent(share)
    return next((k for k in range(extent.local) if whole_index(extent, k) == number), None)


def _check(rule: Rule, scope: Scope, array: NamedShape, held: HeldParts) -> None:
    """The program's whole shape must be the array's but for padding, and true sizes that both know the same."""
    true = array.true or array.shape
    wanted = held.true or held.whole
    fits = wanted == true or (held.whole == array.shape and (held.true is None or array.true is None))
    if len(held.whole) != len(array.shape) or not fits:
        raise scope.fault(f"array {array.name!r}: expected shape {wanted} by the program, found {true}", rule.at)
