"""What a program's constants are: what files state, and what the command line gives."""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.language import tree as t
from elastickpt.language.rules import needed
from elastickpt.language.scope import ConstantValue, Scope


def constants_for(
    program: t.Program, files: Mapping[str, object], given: Mapping[str, ConstantValue]
) -> dict[str, ConstantValue]:
    """The program's constants, from the files and from the command line. Raises ProgramFault where both state one."""
    found: dict[str, ConstantValue] = {}
    scope = Scope(source=program.source, name=program.name)
    names = {need.name: need for need in needed(program)}
    for name in given:
        if name not in names:
            raise scope.fault(f"--set {name}: the program needs {', '.join(names) or 'no constants'}", t.NOWHERE)
    for name, need in names.items():
        stated = next((v for one in (name, *need.others) if (v := _whole_number(files.get(one))) is not None), None)
        if name in given and stated is not None and given[name] != stated:
            raise scope.fault(f"constant {name!r}: {stated} in the files, {given[name]} by --set", need.at)
        value = given.get(name, stated)
        if value is not None:
            found[name] = value
    return found


def lasting(constants: Mapping[str, ConstantValue]) -> dict[str, ConstantValue]:
    """The constants that are of the whole: lists of sizes are of one mesh, as the mesh is."""
    return {name: value for name, value in constants.items() if isinstance(value, int)}


def _whole_number(value: object) -> ConstantValue | None:
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return tuple(value)
    return None
