"""Applies name maps to contents: arrays, optimizer rows and ties get their new names together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from elastickpt.convert.constants import constants_for
from elastickpt.convert.contents import Array, Contents, NameGroups
from elastickpt.convert.nodes import Cast, Mapped, Node, Term
from elastickpt.errors import Refused
from elastickpt.foreign.listing import NotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import value_digest
from elastickpt.format.tables import TableName, TableRow
from elastickpt.language import tree as t
from elastickpt.language.patterns import known_names
from elastickpt.language.renaming import Equation, Link, NamedShape, equations, fitting, left_out, link, renamed
from elastickpt.language.rules import declared, needed
from elastickpt.language.scope import ConstantValue


def apply_names(
    contents: Contents, program: t.Program, facts: Mapping[str, object], given: Mapping[str, ConstantValue]
) -> tuple[Contents, dict[str, ConstantValue]]:
    """The contents under the map's names; constants come from the source's `facts` and from the command line.
    The map's constants come with them, as a later program may need them.

    Every parameter must be in the map, and every array that it makes must be made wholly, once. Raises ProgramFault, Refused.
    """
    names = {need.name for need in needed(program)}
    wanted = {name: value for name, value in given.items() if name in names}
    scope = declared(program, constants_for(program, facts, wanted))
    parameters = contents.parameters()
    arrays = {one.id: one for one in contents.arrays.values() if one.id.section != "params"}
    rows: dict[str, dict[TableName, TableRow]] = {}
    orders: dict[str, NameGroups] = {}
    tied: list[tuple[TableName, ...]] = []
    lost: list[NotCarried] = []
    for item in dict.fromkeys(item for item, _ in parameters):
        shapes = [NamedShape(name, *_shape(states), item) for (of, name), states in parameters.items() if of == item]
        lines = fitting(equations(program, scope), [one.name for one in shapes])
        links = link(lines, shapes, scope)
        for array in _made_of(item, links, contents, program):
            if array.id in arrays:
                raise Refused(f"{program.name}: it gives the name {array.id} twice")
            arrays[array.id] = array
        for optimizer, of_optimizer in contents.rows.items():
            own = {name: row for name, row in of_optimizer.items() if name[0] == item}
            rows.setdefault(optimizer, {}).update(_rows(own, links))
            if own and optimizer in contents.orders:
                orders[optimizer] = tuple(_order(some, links) for some in contents.orders[optimizer])
        dropped = left_out(lines, [one.name for one in shapes])
        tied += _tied([group for group in contents.tied if group[0][0] == item], lines, links, dropped)
        lost += [NotCarried(f"{item}/{name}", f"the map {program.name} drops it") for name in dropped]
    renewed = replace(
        contents, arrays=arrays, rows=rows, tied=tuple(tied), orders=orders, not_carried=(*contents.not_carried, *lost)
    )
    return renewed, dict(scope.constants)


def leads_to(program: t.Program, names: Sequence[str], target: t.Program) -> bool:
    """Whether a map has these names, and makes those of another program of most of them."""
    ones: dict[str, ConstantValue] = {need.name: 1 for need in needed(program) if need.default is None}
    lines = fitting(equations(program, declared(program, ones)), names)
    found = {name: renamed([one for one in lines if one.left.label is None] or lines, name) for name in names}
    made = {("model", new) for name, new in found.items() if new is not None and new != name}
    return len(made) * 2 > len(names) and known_names(target, made) * 2 > len(names)


def _made_of(item: str, links: Sequence[Link], contents: Contents, program: t.Program) -> Iterator[Array]:
    by_target: dict[str, list[Link]] = {}
    for one in links:
        by_target.setdefault(one.target, []).append(one)
    for target, parts in by_target.items():
        yield from _made(target, parts, item, contents, program)


def _order(names: Sequence[str], links: Sequence[Link]) -> tuple[str, ...]:
    """An order under new names; what is split follows each other, what is joined stands where its first part stood."""
    targets: dict[str, dict[str, None]] = {}
    for one in links:
        targets.setdefault(one.source, {})[one.target] = None
    return tuple(dict.fromkeys(target for name in names for target in targets.get(name, ())))


def _shape(states: Mapping[str, Array]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    one = states.get("value") or states.get("master") or next(iter(states.values()))
    return one.node.shape, one.true


def _made(target: str, parts: Sequence[Link], item: str, contents: Contents, program: t.Program) -> list[Array]:
    """The arrays of one new name: one for each state that its sources have."""
    sources = {part.source: contents.parameters_of(item, part.source) for part in parts}
    first = sources[parts[0].source]
    for source, states in sources.items():
        if states.keys() != first.keys():
            raise Refused(f"{target}: {source} has the states {', '.join(states)}, {parts[0].source} {', '.join(first)}")
    if any(part.shape != parts[0].shape for part in parts):
        raise Refused(f"{program.name}: it gives {target!r} the shapes {', '.join(str(part.shape) for part in parts)}")
    if parts[0].keeps and len(parts) > 1:
        raise Refused(f"{program.name}: {target!r} would be made of {', '.join(p.source for p in parts)}: it is given twice")
    if not parts[0].keeps and sum(prod(part.extents) for part in parts) != prod(parts[0].shape):
        count = sum(prod(part.extents) for part in parts)
        raise Refused(f"{program.name}: {target!r} has {prod(parts[0].shape)} elements, its sources give {count}")
    return [_array(target, item, state, parts, sources) for state in first]


def _array(target: str, item: str, state: str, parts: Sequence[Link], sources: Mapping[str, Mapping[str, Array]]) -> Array:
    identity = ArrayId("params", item, target, state)
    first = sources[parts[0].source][state]
    if parts[0].keeps:
        return Array(identity, _cast(first.node, parts[0].cast, state), first.true, first.attributes)
    for part in parts:
        source, value = sources[part.source][state], _shape(sources[part.source])[0]
        if source.node.shape != value:
            raise Refused(f"state {state!r} of {part.source}: shape {source.node.shape} is not its value's, {value}")
    dtypes = {sources[part.source][state].node.dtype for part in parts}
    if len(dtypes) > 1:
        raise Refused(f"{target} {state}: its parts have the types {', '.join(sorted(dtypes))}")
    terms = tuple(Term(sources[p.source][state].node, p.extents, p.at, p.to) for p in parts)
    node = Mapped(parts[0].shape, first.node.dtype, terms)
    return Array(identity, _cast(node, parts[0].cast, state), None, first.attributes)


def _cast(node: Node, dtype: str | None, state: str) -> Node:
    return node if dtype is None or state != "value" or dtype == node.dtype else Cast(node, dtype)


def _rows(rows: Mapping[TableName, TableRow], links: Sequence[Link]) -> dict[TableName, TableRow]:
    targets: dict[str, list[str]] = {}
    for one in links:
        targets.setdefault(one.source, []).append(one.target)
    found: dict[TableName, TableRow] = {}
    for (item, name), row in rows.items():
        for target in dict.fromkeys(targets.get(name, ())):
            known = found.setdefault((item, target), dict(row))
            for key, value in row.items():
                if value_digest(known.get(key)) != value_digest(value):
                    raise Refused(f"{target}: {key[1]} is {known.get(key)!r} for one of its parts, {value!r} for {name}")
    return found


def _tied(
    groups: Sequence[tuple[TableName, ...]], lines: Sequence[Equation], links: Sequence[Link], dropped: Sequence[str]
) -> list[tuple[TableName, ...]]:
    parts: dict[str, int] = {}
    for one in links:
        parts[one.target] = parts.get(one.target, 0) + 1
    targets = {one.source: one.target for one in links if parts[one.target] == 1}
    found = []
    for group in groups:
        names = []
        for item, name in group:
            new = targets.get(name) or renamed(lines, name)
            if new is None and name not in dropped:
                raise Refused(f"tied name {name!r}: the map does not say what becomes of it")
            if new is not None:
                names.append((item, new))
        if len(names) > 1:
            found.append(tuple(names))
    return found
