"""What a text that does not follow the grammar is told: what was found, and what could stand there. [LANG-3]"""

from __future__ import annotations

from lark import UnexpectedInput

from elastickpt.errors import ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.faults import fault


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
    return fault(f"found {what}, expected one of: {words}", at=t.TextPlace(line, column, length), source=text, name=name)


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
