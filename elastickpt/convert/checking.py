"""Checks programs: alone, against a checkpoint, and the wholes of one step at two degrees against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from elastickpt.convert.comparing import Side, compare
from elastickpt.convert.conversion import names_of, open_source, program_of
from elastickpt.convert.names import apply_names
from elastickpt.convert.options import Options
from elastickpt.language import tree as t
from elastickpt.language.renaming import equations
from elastickpt.language.rules import declared, needed, resolve
from elastickpt.language.scope import ConstantValue
from elastickpt.language.shelf import name_maps

Progress = Callable[[int, int], None]


def is_map(name: str) -> bool:
    """Whether a file is a name map, not a program."""
    program = names_of(name) if name in name_maps() else program_of(name)
    return any(isinstance(one, t.RuleLine) for one in program.statements)


def check_alone(name: str, given: Mapping[str, ConstantValue], sizes: Mapping[str, int]) -> None:
    """Raises ProgramFault for what is wrong whatever the files hold. Constants that nobody gave count as 1 here."""
    if is_map(name):
        program = names_of(name)
        equations(program, declared(program, {**_ones(program), **given}))
    else:
        program = program_of(name)
        resolve(program, {**_ones(program), **given}, sizes)


def _ones(program: t.Program) -> dict[str, ConstantValue]:
    return {need.name: 1 for need in needed(program) if need.default is None}


def check_against(
    name: str,
    paths: Sequence[str],
    given: Mapping[str, ConstantValue],
    *,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Lays each checkpoint out by the program; of several, what differs between their arrays from the first one's.

    Raises ProgramFault where the program does not fit, ReplicaConflict where ranks contradict it.
    """
    sides = []
    for path in paths:
        if is_map(name):
            source = open_source(Options(path, ""))
            contents, _ = apply_names(source.contents, names_of(name), source.facts, given)
        else:
            source = open_source(Options(path, "", rules=name, constants=given))
            contents = source.contents
        sides.append(Side(contents, source.reading))
    found: list[str] = []
    for path, side in zip(paths[1:], sides[1:], strict=True):
        for one in compare(sides[0], side, progress=progress):
            if one.what not in ("setting", "value"):
                place = "" if one.index is None else f" at {list(one.index)}"
                found.append(f"{one.name}: {one.what}{place}: {one.a or '-'} in {paths[0]}, {one.b or '-'} in {path}")
    return found
