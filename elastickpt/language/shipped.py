"""The programs and name maps that come with the package, parsed."""

from __future__ import annotations

from functools import cache

from elastickpt.language.parse import parse
from elastickpt.language.shelf import names_text, program_text
from elastickpt.language.tree import Program


@cache
def shipped_program(name: str) -> Program:
    """Raises Refused for a name that is none."""
    return parse(program_text(name), name=f"{name}.ucl")


@cache
def shipped_names(name: str) -> Program:
    """Raises Refused for a name that is none."""
    return parse(names_text(name), name=f"{name}.ucl")
