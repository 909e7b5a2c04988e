"""What is wrong with a program: said with line, column and a caret. [LANG-3]"""

from __future__ import annotations

from elastickpt.errors import ProgramFault
from elastickpt.language.tree import TextPlace


def fault(message: str, *, at: TextPlace, source: str = "", name: str = "") -> ProgramFault:
    """The error for what stands at a place of the program's text; `message` says what was expected and what was found."""
    return ProgramFault(located(message, at=at, source=source, name=name))


def located(message: str, *, at: TextPlace, source: str = "", name: str = "") -> str:
    """The message with its place, as far as that is known.

    megatron.ucl:12:34: axis 'dp' is not in mesh dense (pp, tp)
        norm.weight              h   same dp
                                          ^^
    """
    if at.line < 1:
        return f"{name or 'program'}: {message}"
    lines = source.splitlines()
    where = f"{name or 'program'}:{at.line}:{at.column}: {message}"
    if at.line > len(lines):
        return where
    text = lines[at.line - 1].replace("\t", " ")
    caret = " " * (at.column - 1) + "^" * max(1, min(at.length, len(text) - at.column + 1))
    return f"{where}\n    {text}\n    {caret}"
