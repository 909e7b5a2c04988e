"""What is wrong with a program: said with line, column and a caret; of a text that does not follow the grammar, what was found
and what could stand there. [LANG-3]"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastickpt.errors import ProgramFault
from elastickpt.language.tree import TextPlace

if TYPE_CHECKING:
    from lark import UnexpectedInput


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


def unexpected(error: UnexpectedInput, text: str, name: str) -> ProgramFault:
    """The error for a text that the grammar's parser refused."""
    line, column = max(getattr(error, "line", 1) or 1, 1), max(getattr(error, "column", 1) or 1, 1)
    token = getattr(error, "token", None)
    what = repr(str(token)) if token is not None and str(token).strip() else "what stands here"
    if token is not None and token.type == "$END":
        line, column, what = len(text.splitlines()) or 1, 1, "the end of the text"
    expected = getattr(error, "accepts", None) or getattr(error, "expected", None) or getattr(error, "allowed", None) or ()
    words = ", ".join(sorted({_WORDS.get(one, one.strip("_").lower()) for one in expected if one != "COMMENT"})[:12])
    length = len(str(token)) if token is not None and "\n" not in str(token) else 1
    return fault(f"found {what}, expected one of: {words}", at=TextPlace(line, column, length), source=text, name=name)


_WORDS = {
    "NAME": "a name",
    "INT": "a number",
    "PATTERN": "a name of a tensor",
    "_NL": "the end of the line",
    "_INDENT": "an indented block",
    "_DEDENT": "the end of the block",
    "$END": "the end of the text",
    "LABEL": "a label",
    "HOLD": "same, first, last, any, average",
    "KIND": "matrices, vectors, all",
    "COMPARE": "a comparison",
    "ELLIPSIS": "...",
    "LPAR": "(",
    "RPAR": ")",
    "COMMA": ",",
    "EQUAL": "=",
    "VBAR": "|",
    "SLASH": "/",
    "PERCENT": "%",
    "PLUS": "+",
    "MINUS": "-",
    "STAR": "*",
    "COLON": ":",
}
