"""Reads a program against what ranks hold: which whole arrays there are, and what each rank holds of them. [LANG-14..18]

No byte of a tensor is read: names and shapes decide. Whatever does not fit is a ProgramFault; no rule matched is one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

from elastickpt.language import tree as t
from elastickpt.language.flat import Orders, cat_of
from elastickpt.language.held import HeldParts, lower
from elastickpt.language.holders import Holder, LocalShape, RankShapes, WholeArray, global_names, require_all, require_whole
from elastickpt.language.labels import labelled, labels_of
from elastickpt.language.patterns import filled, regex_of
from elastickpt.language.rules import Rule, Rules, needed, ways
from elastickpt.language.scope import ConstantValue, Scope
from elastickpt.language.strands import Lowering, solved, unknown_sizes, whole_index


@dataclass(frozen=True, slots=True)
class Matched:
    """`sizes` were found from shapes, `lists` of sizes from names. `dropped` are (rank, tensor) of rules that say so. `tied`:
    (container, alias) → array. Arrays of two containers are two, whatever their names.
    """

    rules: Rules
    sizes: Mapping[str, int]
    lists: Mapping[str, ConstantValue]
    arrays: tuple[WholeArray, ...]
    dropped: tuple[tuple[int, int], ...]
    tied: Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class _Hit:
    rank: int
    tensor: int
    rule: Rule
    at: Mapping[str, int]
    holes: Mapping[str, int | str]


def match(rules: Rules, ranks: Sequence[RankShapes]) -> Matched:
    """What the ranks hold, by the program's rules.

    Raises ProgramFault for a name that no rule or several rules match, a rule that matches nothing and is not optional,
    shapes that are not the program's, and tensors that some ranks lack.
    """
    hits, dropped = _hits(rules, ranks)
    scope = _with_found_sizes(_with_found_shares(rules, hits), ranks, hits)
    _require_flat(hits, rules, scope, ranks)
    collected: dict[tuple[str, str], list[Holder]] = {}
    tied: dict[tuple[str, str], str] = {}
    for hit in hits:
        container = ranks[hit.rank].tensors[hit.tensor].container
        for name, holder in _holders(hit, rules, scope, ranks):
            collected.setdefault((container, name), []).append(holder)
            if hit.rule.tied is not None:
                alias = filled(hit.rule.whole, hit.holes)
                if alias != name:
                    tied[container, alias] = name
    arrays = tuple(_array(name, holders, rules, scope) for (_, name), holders in collected.items())
    lists = {name: value for name, value in scope.constants.items() if name in scope.own}
    return Matched(rules, scope.sizes, lists, arrays, tuple(dropped), tied)


# -- names -------------------------------------------------------------------------------------------------------------


def _hits(rules: Rules, ranks: Sequence[RankShapes]) -> tuple[list[_Hit], list[tuple[int, int]]]:
    finders = [_Finder(rule, rules) for rule in rules.rules]
    used: set[int] = set()
    hits: list[_Hit] = []
    dropped: list[tuple[int, int]] = []
    known: dict[tuple[str, str], list[tuple[int, dict[str, int | str]]]] = {}
    for number, rank in enumerate(ranks):
        place = rules.coordinate(rank.coordinate)
        for index, tensor in enumerate(rank.tensors):
            key = (tensor.container, tensor.name)
            if key not in known:
                known[key] = [(k, holes) for k, finder in enumerate(finders) if (holes := finder.find(*key)) is not None]
            here = {**place, **_chunk_place(rules, tensor)}
            fitting = [(k, holes) for k, holes in known[key] if finders[k].allows(here)]
            if len(fitting) != 1:
                raise _no_rule(rules, rank, tensor, [rules.rules[k] for k, _ in known[key]], bool(fitting))
            k, holes = fitting[0]
            used.add(k)
            if rules.rules[k].flag("drop"):
                dropped.append((number, index))
                continue
            hits.append(_Hit(number, index, rules.rules[k], here, holes))
    for k, rule in enumerate(rules.rules):
        if k not in used and not rule.flag("optional"):
            raise rules.scope.fault("no tensor has such a name: mark the rule 'optional' if that may be", rule.at)
    return hits, dropped


def _chunk_place(rules: Rules, tensor: LocalShape) -> dict[str, int]:
    """Where a tensor stands among the parts that its rank holds side by side: the chunk axes, the first one slowest."""
    place, left = {}, tensor.chunk
    for axis in reversed(rules.chunks):
        left, place[axis] = divmod(left, rules.scope.axes[axis])
    if left:
        there = ways({axis: rules.scope.axes[axis] for axis in rules.chunks})
        at = next((one.at for one in rules.program.statements if isinstance(one, t.Chunks)), rules.block_of(tensor.container))
        raise rules.scope.fault(f"tensor {tensor.name!r} of chunk {tensor.chunk}: expected {there} by the program", at)
    return place


def _no_rule(rules: Rules, rank: RankShapes, tensor: LocalShape, found: Sequence[Rule], several: bool) -> Exception:
    what = f"tensor {tensor.name!r} of {tensor.container!r}, shape {tensor.shape}, {rank.where or dict(rank.coordinate)}"
    if several:
        lines = ", ".join(str(rule.at.line) for rule in found)
        return rules.scope.fault(f"{what}: several rules match it, of lines {lines}; expected one", found[-1].at)
    if found:
        return rules.scope.fault(f"{what}: its rule says that other ranks only have it", found[0].at)
    at = rules.block_of(tensor.container)
    return rules.scope.fault(f"{what}: no rule matches it; expected one here, or one that drops it", at)


class _Finder:
    """Finds the tensors of one rule by name, and knows on which ranks they may be."""

    def __init__(self, rule: Rule, rules: Rules) -> None:
        self._names = regex_of(rule.pattern)
        self._containers = [regex_of(one) for one in rule.containers]
        self._only = [
            (axis, 0 if hold.word == "first" else rules.scope.axes[axis] - 1)
            for hold in rule.holds
            if hold.word in ("first", "last")
            for axis in hold.axes
        ]

    def find(self, container: str, name: str) -> dict[str, int | str] | None:
        within: re.Match[str] | None = next((m for one in self._containers if (m := one.fullmatch(container))), None)
        found = self._names.fullmatch(name) if within is not None else None
        if found is None or within is None:
            return None
        texts = {**within.groupdict(), **found.groupdict()}
        return {hole: int(text) if text.isdecimal() else text for hole, text in texts.items()}

    def allows(self, place: Mapping[str, int]) -> bool:
        return all(place.get(axis, 0) == index for axis, index in self._only)


# -- sizes -------------------------------------------------------------------------------------------------------------


def _with_found_shares(rules: Rules, hits: Sequence[_Hit]) -> Scope:
    """The scope with the lists of sizes that numbers in names tell: of each share one more than its highest number."""
    wanted = {need.name for need in needed(rules.program) if need.default == t.SizeList(None)} & rules.scope.own
    found: dict[str, list[int]] = {}
    for hit in hits if wanted else ():
        for hole in hit.rule.pattern.holes:
            cut = hole.share
            if isinstance(cut, t.Cut) and isinstance(cut.mode, t.Sizes) and cut.mode.values in wanted:
                place, count = 0, 1
                for axis in cut.axes:
                    size = rules.scope.axis(axis, cut.at)
                    place, count = place * size + hit.at.get(axis, 0), count * size
                sizes = found.setdefault(str(cut.mode.values), [0] * count)
                if len(sizes) == count:
                    sizes[place] = max(sizes[place], int(hit.holes[hole.name]) + 1)
    lists = {name: tuple(sizes) for name, sizes in found.items()}
    return replace(rules.scope, constants={**rules.scope.constants, **lists})


def _with_found_sizes(scope: Scope, ranks: Sequence[RankShapes], hits: Sequence[_Hit]) -> Scope:
    """The scope with every size that shapes tell: from dimensions with one unknown size, until nothing new is found."""
    shapes: dict[tuple[int, tuple[tuple[str, int | str], ...]], list[tuple[int, ...]]] = {}
    by_rule: dict[int, Rule] = {}
    for hit in hits:
        if isinstance(hit.rule.dims, tuple):
            names = tuple(sorted((k, v) for k, v in hit.holes.items()))
            by_rule[id(hit.rule)] = hit.rule
            shapes.setdefault((id(hit.rule), names), []).append(ranks[hit.rank].tensors[hit.tensor].shape)
    waiting = [(by_rule[key[0]], found) for key, found in shapes.items()]
    while True:
        sizes: dict[str, int] = {}
        for rule, found in waiting:
            if isinstance(rule.dims, tuple) and all(len(shape) == len(rule.dims) for shape in found):
                _find_sizes(rule.dims, scope, found, sizes)
        if not sizes:
            return scope
        scope = scope.with_sizes(sizes)


def _find_sizes(dims: Sequence[t.Factor], scope: Scope, shapes: Sequence[tuple[int, ...]], sizes: dict[str, int]) -> None:
    for axis, factor in enumerate(dims):
        names = {size.name for size in unknown_sizes(factor, scope)}
        if len(names) == 1 and not names & sizes.keys():
            (name,) = names
            mean = Fraction(sum(shape[axis] for shape in shapes), len(shapes))
            size = solved(factor, scope, name, mean)
            if size is not None:
                sizes[name] = size


# -- pieces ------------------------------------------------------------------------------------------------------------


def _holders(hit: _Hit, rules: Rules, scope: Scope, ranks: Sequence[RankShapes]) -> Iterator[tuple[str, Holder]]:
    """(whole name, holder) of a tensor: one, or as many as it has numbers stacked."""
    rule = hit.rule
    tensor = ranks[hit.rank].tensors[hit.tensor]
    names = global_names(rule, hit.holes, scope, hit.at)
    target = rule.tied or rule.whole
    if cat_of(rule.dims) is not None:
        rank = ranks[hit.rank]
        for part in Orders(rules, scope, hit.at, rank.listings).parts(rule, tensor.shape):
            yield part.name, Holder(hit.rank, hit.tensor, rule, part.held, hit.at)
        return
    if isinstance(rule.dims, str):
        held = _as_it_is(tensor.shape)
        yield filled(target, names), Holder(hit.rank, hit.tensor, rule, held, hit.at)
        return
    stacked = [label for label in labels_of(rule.dims) if label in {hole.name for hole in target.holes}]
    ranges = [range(_label_extent(label, rule.dims, scope, hit.at)[0]) for label in stacked]
    for indices in product(*ranges):
        chosen = dict(zip(stacked, indices, strict=True))
        held = lower(rule.dims, scope, hit.at, chosen=chosen)
        if held.local != tensor.shape:
            raise scope.fault(
                f"tensor {tensor.name!r}, {ranks[hit.rank].where or dict(hit.at)}: expected shape {held.local} by the program, "
                f"found {tensor.shape}",
                rule.at,
            )
        numbers = {label: _label_extent(label, rule.dims, scope, hit.at)[1][index] for label, index in chosen.items()}
        yield filled(target, {**names, **numbers}), Holder(hit.rank, hit.tensor, rule, held, hit.at)


def _as_it_is(shape: tuple[int, ...]) -> HeldParts:
    return lower([t.Number(extent) for extent in shape], Scope(), {})


def _label_extent(label: str, dims: Sequence[t.Factor], scope: Scope, at: Mapping[str, int]) -> tuple[int, tuple[int, ...]]:
    """Of a stacked dimension: how many numbers the rank has, and which they are in the whole."""
    factor = labelled(label, dims)
    extent = Lowering(scope, at, {}).extent(factor)
    return extent.local, tuple(whole_index(extent, k) for k in range(extent.local))


def _require_flat(hits: Sequence[_Hit], rules: Rules, scope: Scope, ranks: Sequence[RankShapes]) -> None:
    """Every rank has its flat tensors, whether anything of an array stands in them or not."""
    found: dict[tuple[int, str], list[Holder]] = {}
    for hit in hits:
        if cat_of(hit.rule.dims) is not None:
            tensor = ranks[hit.rank].tensors[hit.tensor]
            holder = Holder(hit.rank, hit.tensor, hit.rule, _as_it_is(tensor.shape), hit.at)
            found.setdefault((id(hit.rule), tensor.name), []).append(holder)
    for (_, name), holders in found.items():
        require_all(name, holders, rules, scope)


# -- arrays ------------------------------------------------------------------------------------------------------------


def _array(name: str, holders: list[Holder], rules: Rules, scope: Scope) -> WholeArray:
    first = holders[0]
    for other in holders[1:]:
        if (other.held.whole, other.held.true) != (first.held.whole, first.held.true):
            raise scope.fault(
                f"array {name!r}: shape {first.held.whole} by line {first.rule.at.line}, {other.held.whole} by this line",
                other.rule.at,
            )
    by_rule: dict[int, list[Holder]] = {}
    for holder in holders:
        by_rule.setdefault(id(holder.rule), []).append(holder)
    if len(by_rule) > 1 and not any(holder.rule.tied for holder in holders):
        lines = sorted({holder.rule.at.line for holder in holders})
        raise scope.fault(
            f"array {name!r} is made by several rules, of lines {lines}; only 'tied' ones may", holders[-1].rule.at
        )
    for group in by_rule.values():
        if cat_of(group[0].rule.dims) is None:
            require_all(name, group, rules, scope)
        else:
            require_whole(name, first.held.whole, group, scope)
    return WholeArray(name, first.held.whole, first.held.true, tuple(holders))
