"""Name maps: which whole arrays become which, and how elements of the one lie in the other. [LANG-30]

A line of a map is an equation: the same elements, under two names, with two orders of the same factors. It is read from left to
right or from right to left, whichever fits the names that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod

from elastickpt.language import tree as t
from elastickpt.language.held import Strides
from elastickpt.language.patterns import filled, regex_of
from elastickpt.language.scope import Scope
from elastickpt.language.strands import solved, unknown_sizes


@dataclass(frozen=True, slots=True)
class Half:
    """One side of an equation: a name and dimensions, of which `label` chooses a part of a sum."""

    pattern: t.Pattern
    dims: tuple[t.Factor, ...] | None  # None: whatever they are
    label: str | None = None
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class Equation:
    left: Half
    right: Half
    at: t.TextPlace
    drops: bool = False  # its names are left out, whatever the direction

    def turned(self) -> Equation:
        return self if self.drops else Equation(self.right, self.left, self.at)


@dataclass(frozen=True, slots=True)
class NamedShape:
    """A whole array as a map looks at it. `true` is its shape without padding."""

    name: str
    shape: tuple[int, ...]
    true: tuple[int, ...] | None = None
    item: str = "model"


@dataclass(frozen=True, slots=True)
class Link:
    """Elements of `source` that stand in `target`, whose shape is given: the same lattice on both sides."""

    source: str
    target: str
    shape: tuple[int, ...]
    extents: tuple[int, ...]
    at: Strides
    to: Strides
    keeps: bool  # the target is the source under another name
    cast: str | None = None


def equations(program: t.Program, scope: Scope) -> tuple[Equation, ...]:
    """The equations of a name map. Raises ProgramFault for a line that is none."""
    return tuple(one for line in program.statements if isinstance(line, t.RuleLine) for one in _equations(line, scope))


def _equations(line: t.RuleLine, scope: Scope) -> Iterator[Equation]:
    if not all(scope.holds(one.condition) for one in line.clauses if isinstance(one, t.If)):
        return
    left = line.dims if isinstance(line.dims, tuple) else None
    if line.arrow is not None:
        yield Equation(Half(line.pattern, left), _half(line.arrow), line.at)
        return
    if any(isinstance(one, t.Flag) and one.word == "drop" for one in line.clauses):
        yield Equation(Half(line.pattern, None), Half(line.pattern, None), line.at, drops=True)
        return
    if not line.body or left is None:
        raise scope.fault("expected a map: 'name  dims  ->  name  dims', parts of it in lines below, or 'name  drop'", line.at)
    labels = {part.label for factor in left if isinstance(factor, t.Sum) for part in _parts(factor)}
    for part in line.body:
        label = "".join(piece for piece in part.pattern.pieces if isinstance(piece, str))
        if part.arrow is None or label not in labels:
            raise scope.fault(f"expected 'LABEL -> name  dims' with one of {', '.join(sorted(filter(None, labels)))}", part.at)
        yield Equation(Half(line.pattern, left, label), _half(part.arrow), part.at)


def _parts(total: t.Sum) -> Iterator[t.Product]:
    for part in total.parts:
        yield part
        for factor in part.factors:
            if isinstance(factor, t.Sum):
                yield from _parts(factor)


def _half(arrow: t.Arrow) -> Half:
    cast = next((one.dtype for one in arrow.clauses if isinstance(one, t.CastClause)), None)
    return Half(arrow.pattern, arrow.dims if isinstance(arrow.dims, tuple) else None, None, cast)


def fitting(lines: Sequence[Equation], names: Sequence[str]) -> tuple[Equation, ...]:
    """The equations, turned if the names fit their right side better; lines that fit every name say nothing."""
    maps = [line for line in lines if not line.drops]
    halves = ([line.left for line in maps], [line.right for line in maps])
    sides = [[regex_of(half.pattern) for half in side if not _fits_all(half)] for side in halves]
    counts = [sum(any(one.fullmatch(name) for one in side) for name in names) for side in sides]
    return tuple(lines) if not counts or counts[0] >= counts[1] else tuple(one.turned() for one in lines)


def _fits_all(half: Half) -> bool:
    return all(isinstance(piece, t.Hole) and piece.any_text for piece in half.pattern.pieces)


def link(lines: Sequence[Equation], arrays: Sequence[NamedShape], scope: Scope) -> tuple[Link, ...]:
    """How every array becomes others. Of several lines that have a name the first one counts.

    Raises ProgramFault for a name that no line has, and sizes that do not fit.
    """
    finders = [regex_of(one.left.pattern) for one in lines]
    found: dict[str, list[tuple[Equation, dict[str, int | str]]]] = {}
    for array in arrays:
        hits = [(line, _holes(m)) for line, finder in zip(lines, finders, strict=True) if (m := finder.fullmatch(array.name))]
        if not hits:
            at = lines[-1].at if lines else t.NOWHERE
            raise scope.fault(f"no line of the map has {array.name!r}, shape {array.shape}; expected one, up to here", at)
        if hits[0][0].drops:
            continue
        found[array.name] = [hit for hit in hits if _source(hit[0]) == _source(hits[0][0])]
    scope = _with_sizes(arrays, found, scope)
    by_name = {array.name: array for array in arrays}
    return tuple(
        one for name, hits in found.items() for line, holes in hits for one in _links(by_name[name], line, holes, scope)
    )


def left_out(lines: Sequence[Equation], names: Sequence[str]) -> tuple[str, ...]:
    """The names that the map drops."""
    finders = [(line, regex_of(line.left.pattern)) for line in lines]
    firsts = {name: next((line for line, finder in finders if finder.fullmatch(name)), None) for name in names}
    return tuple(name for name, line in firsts.items() if line is not None and line.drops)


def _source(line: Equation) -> tuple[object, ...]:
    return (line.left.pattern, line.left.dims) if line.left.label else (id(line),)


def _holes(found: re.Match[str]) -> dict[str, int | str]:
    return {hole: int(text) if text.isdecimal() else text for hole, text in found.groupdict().items()}


def _with_sizes(
    arrays: Sequence[NamedShape], found: Mapping[str, list[tuple[Equation, dict[str, int | str]]]], scope: Scope
) -> Scope:
    """Sizes that shapes, true ones where there is padding, and numbers in names tell."""
    numbers: dict[str, int] = {}
    for hits in found.values():
        for line, holes in hits:
            keys = set(_size_names(line.right.dims or ()))
            for hole, value in holes.items():
                if hole in keys and isinstance(value, int):
                    numbers[hole] = max(numbers.get(hole, 0), value + 1)
    scope = scope.with_sizes({name: size for name, size in numbers.items() if scope.size(name) is None})
    while True:
        sizes: dict[str, int] = {}
        for array in arrays:
            for line, _ in found.get(array.name, ()):
                _sizes_of(array, line, scope, sizes)
        if not sizes:
            return scope
        scope = scope.with_sizes(sizes)


def _sizes_of(array: NamedShape, line: Equation, scope: Scope, sizes: dict[str, int]) -> None:
    if line.left.dims is None:
        return
    if len(line.left.dims) != len(array.shape):
        raise scope.fault(f"{array.name!r}: {len(line.left.dims)} dimensions in the map, shape {array.shape}", line.at)
    for factor, extent, true in zip(line.left.dims, array.shape, array.true or array.shape, strict=True):
        names = {size.name for size in unknown_sizes(factor, scope)}
        if len(names) == 1 and not names & sizes.keys():
            (name,) = names
            size = true if isinstance(factor, t.Pad) else solved(factor, scope, name, Fraction(extent))
            if size is not None:
                sizes[name] = size


# -- digits ------------------------------------------------------------------------------------------------------------


def _size_names(dims: Sequence[t.Factor]) -> Iterator[str]:
    for factor in dims:
        if isinstance(factor, t.Sum):
            for part in factor.parts:
                yield from _size_names(part.factors)
        elif isinstance(factor, t.Size):
            yield factor.name


def _digit(factor: t.Factor, scope: Scope, seen: dict[str, int]) -> tuple[str, int]:
    """(key, count) of a factor that is no sum. Keys are names, or numbers, with their turn where they stand several times."""
    match factor:
        case t.Number(value):
            return _turn(str(value), seen), value
        case t.Size(name) | t.Pad(t.Size(name)):
            return _turn(name, seen), _known(name, factor.at, scope)
        case _:
            raise scope.fault("a map has no axes, and no cat", factor.at)


def _known(name: str, at: t.TextPlace, scope: Scope) -> int:
    found = scope.size(name)
    if found is None:
        raise scope.fault(f"the size {name!r} cannot be found: give --set {name}=N", at)
    return found


def _turn(key: str, seen: dict[str, int]) -> str:
    seen[key] = seen.get(key, 0) + 1
    return key if seen[key] == 1 else f"{key}'{seen[key]}"


@dataclass(frozen=True, slots=True)
class _Laid:
    """Where digits stand in an array of a shape: (count, stride) by key, and the offset of the chosen part."""

    shape: tuple[int, ...]
    digits: Mapping[str, tuple[int, int]]
    offset: int


def _layout(half: Half, stored: tuple[int, ...] | None, scope: Scope) -> _Laid:
    """`stored`: the shape that the array has; a padded dimension has that extent, else its true one."""
    dims = half.dims or ()
    extents = []
    for k, factor in enumerate(dims):
        extents.append(_extent(factor, scope) if stored is None or not isinstance(factor, t.Pad) else stored[k])
    digits: dict[str, tuple[int, int]] = {}
    seen: dict[str, int] = {}
    offset = 0
    for k, factor in enumerate(dims):
        offset += _place(factor, prod(extents[k + 1 :]), half.label, scope, seen, digits)
    return _Laid(tuple(extents), digits, offset)


def _extent(factor: t.Factor, scope: Scope) -> int:
    if isinstance(factor, t.Sum):
        return sum(prod(_extent(one, scope) for one in part.factors) for part in factor.parts)
    return _digit(factor, scope, {})[1]


def _place(
    factor: t.Factor, stride: int, label: str | None, scope: Scope, seen: dict[str, int], digits: dict[str, tuple[int, int]]
) -> int:
    """Adds a factor's digits, one step being `stride`; returns the offset of the chosen part."""
    if not isinstance(factor, t.Sum):
        key, count = _digit(factor, scope, seen)
        digits[key] = (count, stride)
        return 0
    before = 0
    for part in factor.parts:
        if len(factor.parts) == 1 or _has(part, label):
            inner, offset = stride, 0
            for one in reversed(part.factors):
                offset += _place(one, inner, label, scope, seen, digits)
                inner *= _extent(one, scope)
            return before * stride + offset
        before += prod(_extent(one, scope) for one in part.factors)
    raise scope.fault("a sum of which no part is chosen: give its parts labels, and a line for each", factor.at)


def _has(part: t.Product, label: str | None) -> bool:
    if label is None:
        return False
    inner = (one for factor in part.factors if isinstance(factor, t.Sum) for one in factor.parts)
    return part.label == label or any(_has(one, label) for one in inner)


# -- links -------------------------------------------------------------------------------------------------------------


def _links(array: NamedShape, line: Equation, holes: Mapping[str, int | str], scope: Scope) -> Iterator[Link]:
    left, right = line.left, line.right
    if left.dims is None or right.dims is None:
        if left.dims is not right.dims:
            raise scope.fault("expected dimensions on both sides of the arrow, or on none", line.at)
        flat = Strides(0, tuple(prod(array.shape[k + 1 :]) for k in range(len(array.shape))))
        name = filled(right.pattern, holes)
        yield Link(array.name, name, array.shape, array.shape, flat, flat, True, right.cast)
        return
    here, there = _layout(left, array.shape, scope), _layout(right, None, scope)
    if here.shape != array.shape:
        raise scope.fault(f"{array.name!r}: expected shape {here.shape} by the map, found {array.shape}", line.at)
    free = [key for key in here.digits if key not in there.digits]
    fixed = {key: value for key, value in holes.items() if key in there.digits and key not in here.digits}
    names = {hole.name for hole in right.pattern.holes}
    shared = [key for key in there.digits if key in here.digits]
    unknown = [key for key in free if key not in names] + [k for k in there.digits if k not in here.digits and k not in fixed]
    unknown = [key for key in unknown if (here.digits.get(key) or there.digits[key])[0] != 1]
    if unknown:
        raise scope.fault(f"{', '.join(unknown)}: stands on one side of the arrow only", line.at)
    for key in shared:
        if here.digits[key][0] != there.digits[key][0]:
            raise scope.fault(f"{key}: {here.digits[key][0]} on the left, {there.digits[key][0]} on the right", line.at)
    spread = [key for key in free if key in names]
    for indices in product(*(range(here.digits[key][0]) for key in spread)):
        chosen = dict(zip(spread, indices, strict=True))
        at = here.offset + sum(index * here.digits[key][1] for key, index in chosen.items())
        to = there.offset + sum(int(value) * there.digits[key][1] for key, value in fixed.items())
        extents = tuple(there.digits[key][0] for key in shared)
        yield Link(
            array.name,
            filled(right.pattern, {**holes, **chosen}),
            there.shape,
            extents,
            Strides(at, tuple(here.digits[key][1] for key in shared)),
            Strides(to, tuple(there.digits[key][1] for key in shared)),
            False,
            right.cast,
        )


def renamed(lines: Sequence[Equation], name: str) -> str | None:
    """What becomes of a name that has no array of its own, as an alias.

    None where no line has it, and where the first that does drops or splits it.
    """
    found = [(line, m) for line in lines if (m := regex_of(line.left.pattern).fullmatch(name))]
    if not found or found[0][0].drops or found[0][0].left.label is not None:
        return None
    line, match = found[0]
    holes = _holes(match)
    needed = {hole.name for hole in line.right.pattern.holes}
    return filled(line.right.pattern, holes) if needed <= holes.keys() else None
