"""In which order a file counts a rank's parameters: by kinds, by names, or by a listing of the files; and the
order of a program's lines by which optimizers count. [LANG-25, LANG-26, LANG-28]"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from elastickpt.language import tree as t
from elastickpt.language.holders import LocalShape
from elastickpt.language.printer import pattern_text
from elastickpt.language.rules import Rules

_AXES: dict[t.TensorKind, range] = {"matrices": range(2, 33), "vectors": range(2), "all": range(33)}


def plain_name(pattern: t.Pattern) -> str:
    """The text of a name without holes."""
    return pattern_text(pattern).strip('"')


def written_names(order: t.Order) -> tuple[str, ...]:
    """The names of an order that is written out; none of another one."""
    return tuple(name for group in written_groups(order) for name in group)


def written_groups(order: t.Order) -> tuple[tuple[str, ...], ...]:
    """The same, group by group."""
    groups: list[list[str]] = []
    for one in order.by.members if isinstance(order.by, t.Names) else ():
        if one.begins or not groups:
            groups.append([])
        groups[-1].append(plain_name(one.name))
    return tuple(map(tuple, groups))


def counted(
    order: t.Order, rules: Rules, values: Sequence[LocalShape], listings: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """The local names, in the order of `order`. `values` are the rank's parameters in the order of its file.

    Raises ProgramFault for a listing that the files do not have, or a name that the rank does not hold.
    """
    if isinstance(order.by, str):
        if order.by not in listings:
            there = ", ".join(listings) or "none"
            raise rules.scope.fault(f"listing {order.by!r}: expected one that the files hold ({there})", order.at)
        return tuple(listings[order.by])
    if isinstance(order.by, t.Names):
        known = {one.name for one in values}
        names = []
        for member in order.by.members:
            name = plain_name(member.name)
            if name not in known:
                raise rules.scope.fault(f"order {order.name!r} names {name!r}, which is no tensor there", member.name.at)
            if name in names:
                raise rules.scope.fault(f"order {order.name!r} has the name {name!r} twice", member.name.at)
            names.append(name)
        return tuple(names)
    return tuple(one.name for kind in order.by for one in values if len(one.shape) in _AXES[kind])


Places = tuple[int, ...]  # the lines of the blocks around a rule, and its own


def as_in_files(program: t.Program, models: Iterable[Sequence[Places]]) -> t.Program:
    """The program with its lines as the models have them: of each rank and chunk the rules of its tensors, in order.

    Lines of which the files say nothing, and of which they say different things, stay as they are.
    """
    found = [tuple(one) for one in dict.fromkeys(map(tuple, models))]
    statements = (
        replace(one, body=_ordered(one.body, found, 0)) if isinstance(one, t.Within) else one for one in program.statements
    )
    return replace(program, statements=tuple(statements))


def _ordered(lines: tuple[t.RuleLine, ...], models: Sequence[Sequence[Places]], depth: int) -> tuple[t.RuleLine, ...]:
    number = {line.at.line: k for k, line in enumerate(lines)}
    seen = [[number[place[depth]] for place in model if len(place) > depth and place[depth] in number] for model in models]
    order = _merged(len(lines), [list(dict.fromkeys(some)) for some in seen])
    inner = [replace(line, body=_ordered(line.body, models, depth + 1)) if line.body else line for line in lines]
    return tuple(inner[k] for k in order)


def _merged(count: int, sequences: Sequence[Sequence[int]]) -> Sequence[int]:
    """0, 1, ... so that every sequence goes up; what no sequence has stays behind what stands before it."""
    before: dict[int, set[int]] = {k: set() for some in sequences for k in some}
    for some in sequences:
        for first, second in pairwise(some):
            before[second].add(first)
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError:
        return range(count)
    told: list[int] = []
    ready: list[int] = []
    while sorter.is_active():
        ready = sorted((*ready, *sorter.get_ready()))
        first, *ready = ready
        told.append(first)
        sorter.done(first)
    made = list(told)
    for k in range(count):
        if k not in before:
            made.insert(made.index(k - 1) + 1 if k else 0, k)
    return made
