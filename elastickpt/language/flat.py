"""Flat tensors: the tensors of an order laid one after the other, as ZeRO and FSDP hold them. Plan level: shapes, no files.

    pad(cat(o), m)/dp       laid, filled up to a multiple of m, cut       (ZeRO-1 and 2, FSDP1)
    cat(o, pad |dp|)/dp     each filled up to a multiple, cut, then laid  (ZeRO-3)

Padding is on no rank: whatever stands there is nobody's element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from elastickpt.errors import ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.held import HeldParts, flat_part, lower
from elastickpt.language.holders import global_names
from elastickpt.language.orders import plain_name
from elastickpt.language.patterns import filled, regex_of
from elastickpt.language.rules import Rule, Rules
from elastickpt.language.scope import Scope
from elastickpt.language.strands import Coordinate
from elastickpt.layout.placement import balanced, torch_chunk

Shapes = Sequence[tuple[str, tuple[int, ...]]]  # names in an order, with the shapes that the rank has of them


@dataclass(frozen=True, slots=True)
class OrderedTensor:
    """A tensor of an order: the whole array's name, and what the rank holds of it before anything is laid flat."""

    name: str
    held: HeldParts


@dataclass(frozen=True, slots=True)
class Flat:
    """What a rank's flat tensor of `count` elements, padding among them, holds of each array."""

    count: int
    parts: tuple[OrderedTensor, ...]


def cat_of(dims: object) -> t.Cat | None:
    """The order that a tensor of one dimension lays flat; None where it lays none."""
    inner = dims[0] if isinstance(dims, tuple) and len(dims) == 1 else None
    while isinstance(inner, t.Cut | t.Pad):
        inner = inner.inner if isinstance(inner, t.Cut) else inner.size
    return inner if isinstance(inner, t.Cat) else None


@dataclass(frozen=True, slots=True)
class Orders:
    """The orders of a program on one rank. `listings` are those that its files hold."""

    rules: Rules
    scope: Scope
    at: Coordinate
    listings: Mapping[str, Shapes]

    def parts(self, rule: Rule, shape: tuple[int, ...]) -> tuple[OrderedTensor, ...]:
        """What a flat tensor of this shape holds. Raises ProgramFault where its order makes another size."""
        cat = cat_of(rule.dims)
        if cat is None or not isinstance(rule.dims, tuple):
            raise AssertionError("a rule that lays nothing flat")
        flat = lay_flat(rule.dims[0], self.listed(cat), self.scope, self.at)
        if shape != (flat.count,):
            said = f"expected {flat.count} elements of order {cat.order!r} by the program, found shape {shape}"
            raise self.scope.fault(said, rule.at)
        return flat.parts

    def listed(self, cat: t.Cat) -> tuple[OrderedTensor, ...]:
        """The tensors of an order: those of a listing of the files, or those that the order writes out.

        A name that a rule has lies in the whole as that rule says; another one is whole. Raises ProgramFault for an order that
        is none, a listing that the files lack, and a name whose shape nobody states.
        """
        order = self.rules.orders.get(cat.order)
        if order is None:
            raise self.scope.fault(f"order {cat.order!r}: expected one of {', '.join(self.rules.orders) or 'none'}", cat.at)
        if isinstance(order.by, t.Names):
            return tuple(self._written(one) for one in order.by.members)
        if not isinstance(order.by, str):
            raise self.scope.fault(f"order {cat.order!r} counts kinds: expected names, or a listing, to lay flat", cat.at)
        if order.by not in self.listings:
            there = ", ".join(self.listings) or "none"
            raise self.scope.fault(f"listing {order.by!r}: expected one that the files hold ({there})", order.at)
        return tuple(self._held(name, shape) for name, shape in self.listings[order.by])

    def _written(self, member: t.OrderMember) -> OrderedTensor:
        name = plain_name(member.name)
        if member.dims is not None:
            return OrderedTensor(name, lower(member.dims, self.scope, self.at))
        found = self._by_rule(name)
        if found is None:
            raise self.scope.fault(f"{name!r}: no rule states its shape: write its dimensions behind it", member.name.at)
        return found[1]

    def _held(self, name: str, shape: tuple[int, ...]) -> OrderedTensor:
        found = self._by_rule(name)
        if found is None:
            return OrderedTensor(name, lower([t.Number(extent) for extent in shape], Scope(), {}))
        rule, one = found
        if one.held.local != shape:
            raise self.scope.fault(f"{name!r}: expected shape {one.held.local} by the program, found {shape}", rule.at)
        return one

    def _by_rule(self, name: str) -> tuple[Rule, OrderedTensor] | None:
        for rule in self.rules.rules:
            found = regex_of(rule.pattern).fullmatch(name)
            if found is not None and isinstance(rule.dims, tuple) and cat_of(rule.dims) is None and not rule.flag("drop"):
                holes = {hole: int(text) if text.isdecimal() else text for hole, text in found.groupdict().items()}
                whole = filled(rule.whole, global_names(rule, holes, self.scope, self.at))
                return rule, OrderedTensor(whole, lower(rule.dims, self.scope, self.at))
        return None


def lay_flat(factor: t.Factor, order: Sequence[OrderedTensor], scope: Scope, at: Coordinate) -> Flat:
    """What the rank at a coordinate has in a flat tensor of these dimensions.

    Raises ProgramFault for a factor that is no flat one, and for padding that does not divide.
    """
    cuts: list[t.Cut] = []
    inner = factor
    while isinstance(inner, t.Cut):
        cuts.insert(0, inner)
        inner = inner.inner
    if isinstance(inner, t.Cat) and inner.each is not None:
        return _each(order, scope.value(inner.each), cuts, scope, at)
    if isinstance(inner, t.Pad) and isinstance(inner.size, t.Cat):
        step = 1 if inner.multiple is None else scope.value(inner.multiple)
        return _whole(order, step, cuts, scope, at)
    if isinstance(inner, t.Cat):
        return _whole(order, 1, cuts, scope, at)
    raise scope.fault("expected cat(order) or pad(cat(order), n), cut along axes or not", factor.at)


def _step(step: int, scope: Scope, cuts: Sequence[t.Cut]) -> int:
    if step < 1:
        raise scope.fault(f"pad to a multiple of {step}: expected at least 1", cuts[0].at if cuts else t.NOWHERE)
    return step


def _whole(order: Sequence[OrderedTensor], step: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> Flat:
    total = sum(prod(one.held.local) for one in order)
    step = _step(step, scope, cuts)
    low, high = _share(-(-total // step) * step, cuts, scope, at)
    parts, first = [], 0
    for one in order:
        count = prod(one.held.local)
        start, stop = max(low, first), min(high, first + count)
        if start < stop or count == 0:  # an array without elements is on all ranks
            at_once = (start - low, start - first, stop - first) if count else (0, 0, 0)
            parts.append(OrderedTensor(one.name, flat_part(one.held, *at_once)))
        first += count
    return Flat(high - low, tuple(parts))


def _each(order: Sequence[OrderedTensor], step: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> Flat:
    parts, place = [], 0
    step = _step(step, scope, cuts)
    for one in order:
        count = prod(one.held.local)
        low, high = _share(-(-count // step) * step, cuts, scope, at)
        if low < min(high, count) or count == 0:
            parts.append(OrderedTensor(one.name, flat_part(one.held, place, low, min(high, count))))
        place += high - low
    return Flat(place, tuple(parts))


def _share(extent: int, cuts: Sequence[t.Cut], scope: Scope, at: Coordinate) -> tuple[int, int]:
    """The part of [0, extent) that is left after all cuts."""
    low, high = 0, extent
    for cut in cuts:
        ways, index = 1, 0
        for axis in cut.axes:
            size = scope.axis(axis, cut.at)
            ways, index = ways * size, index * size + at.get(axis, 0)
        shares = _shares(high - low, ways, cut, scope)
        low, high = low + shares[index][0], low + shares[index][1]
    return low, high


def _shares(extent: int, ways: int, cut: t.Cut, scope: Scope) -> Sequence[tuple[int, int]]:
    if isinstance(cut.mode, t.Sizes):
        raise _unlike(cut, scope)
    if cut.mode == "chunk":
        return torch_chunk(extent, ways)
    if cut.mode == "even" and extent % ways:
        raise scope.fault(f"{extent} elements cannot be cut evenly {ways} ways: pad them to a multiple", cut.at)
    return balanced(extent, ways)


def _unlike(cut: t.Cut, scope: Scope) -> ProgramFault:
    return scope.fault("a flat tensor is cut evenly, by chunk or balanced", cut.at)
