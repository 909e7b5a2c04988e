"""The lines of a program in the order in which files have what they name: optimizers count by it. [LANG-28]"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from elastickpt.language import tree as t

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
