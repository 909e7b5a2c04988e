"""From text to tree. Whatever the text, it returns a program or raises ProgramFault. [LANG-1]"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any

from lark import Lark, Token, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError
from lark.indenter import DedentError, Indenter

from elastickpt.errors import LimitExceeded, ProgramFault
from elastickpt.language import tree as t
from elastickpt.language.faults import fault, unexpected
from elastickpt.language.patterns import placed_at

MAX_TEXT_NBYTES = 1 << 20
MAX_NESTING = 32
GRAMMAR = "ucl.lark"
_HOLE = re.compile(r"\{[^{}]*\}")
_SIMPLE_HOLE = re.compile(r"\*?[A-Za-z_][A-Za-z0-9_]*")
_FUNCTIONS = {"min": 2, "max": 2, "ceil": 2}
VERSION = 1


class _Indents(Indenter):
    """Blocks by indentation; `line` is the one that it looks at, for messages."""

    line = 1
    NL_type = "_NL"
    OPEN_PAREN_types: list[str] = []  # noqa: RUF012  # lark declares it so
    CLOSE_PAREN_types: list[str] = []  # noqa: RUF012
    INDENT_type = "_INDENT"
    DEDENT_type = "_DEDENT"
    tab_len = 8

    def handle_NL(self, token: Token) -> Iterator[Token]:  # lark's name
        self.line = token.end_line or 1
        return super().handle_NL(token)


def grammar_text() -> str:
    """The grammar, as the specification quotes it."""
    return (files("elastickpt.language") / GRAMMAR).read_text("utf-8")


@lru_cache(maxsize=1)
def _indents() -> _Indents:
    return _Indents()


@lru_cache(maxsize=1)
def _parsers() -> tuple[Lark, Lark]:
    """For programs, and for the share inside a hole of a name."""
    grammar = grammar_text()
    common: dict[str, Any] = {"parser": "lalr", "lexer": "contextual", "maybe_placeholders": True}
    return (
        Lark(grammar, start="start", postlex=_indents(), propagate_positions=True, **common),
        Lark(grammar, start="factor", propagate_positions=True, **common),
    )


def parse(text: str, *, name: str = "program") -> t.Program:
    """The program. `name` is for messages. Raises ProgramFault with line, column and caret; LimitExceeded above 1 MiB."""
    if len(text) > MAX_TEXT_NBYTES:
        raise LimitExceeded(f"{name}: {len(text)} characters, the limit is {MAX_TEXT_NBYTES}")
    deepest = max(map(_nesting, text.splitlines()), default=0)
    if deepest > MAX_NESTING:
        raise LimitExceeded(f"{name}: {deepest} parentheses inside each other, the limit is {MAX_NESTING}")
    text = text if text.endswith("\n") else text + "\n"
    try:
        found = _Builder(text, name).transform(_parsers()[0].parse(text))
    except VisitError as error:
        if isinstance(error.orig_exc, ProgramFault):
            raise error.orig_exc from None
        raise
    except UnexpectedInput as error:
        raise unexpected(error, text, name) from None
    except DedentError as error:
        at = t.TextPlace(_indents().line, 1)
        raise fault(f"the indentation fits no block above: {error}", at=at, source=text, name=name) from None
    except RecursionError:
        raise LimitExceeded(f"{name}: nested too deeply") from None
    if found.version != VERSION:
        raise fault(
            f"version {found.version}; this release reads version {VERSION}", at=t.TextPlace(1, 5), source=text, name=name
        )
    program: t.Program = found
    return program


def _nesting(line: str) -> int:
    depth = most = 0
    for character in line:
        depth += (character == "(") - (character == ")")
        most = max(most, depth)
    return most


def _first_place(parts: tuple[t.Product, ...]) -> t.TextPlace:
    return next((one.at for part in parts for one in part.factors), t.NOWHERE)


def _at(token: Token) -> t.TextPlace:
    return t.TextPlace(token.line or 0, token.column or 0, len(token))


@v_args(inline=True)
class _Builder(Transformer[Token, Any]):
    """Builds the tree bottom-up; one method for each rule of the grammar."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__()
        self._source, self._name = source, name

    def start(self, *children: Any) -> t.Program:
        version, *statements = children
        return t.Program(int(version), tuple(statements), self._source, self._name)

    # -- statements

    def needs(self, *needs: t.Need) -> t.Needs:
        return t.Needs(needs)

    def need(self, name: Token, *rest: Any) -> t.Need:
        *others, default = rest
        return t.Need(str(name), default, tuple(map(str, others)), at=_at(name))

    def list(self, *values: t.Expr | None) -> t.SizeList:
        return t.SizeList(tuple(value for value in values if value is not None))

    def found(self) -> t.SizeList:
        return t.SizeList(None)

    def let(self, name: Token, value: t.Expr) -> t.Let:
        return t.Let(str(name), value, at=_at(name))

    def mesh(self, name: Token, *axes: tuple[str, int | None] | None) -> t.MeshLine:
        found = [axis for axis in axes if axis is not None]
        return t.MeshLine(str(name), tuple(axis for axis, _ in found), tuple(size for _, size in found), at=_at(name))

    def axis(self, name: Token, size: Token | None) -> tuple[str, int | None]:
        return str(name), None if size is None else int(size)

    def split(self, axis: Token, slow: Token, fast: Token, sized: Token, size: t.Expr) -> t.Split:
        return t.Split(str(axis), (str(slow), str(fast)), str(sized), size, at=_at(axis))

    def chunks(self, axis: Token, size: t.Expr) -> t.Chunks:
        return t.Chunks(str(axis), size, at=_at(axis))

    def on(self, mesh: Token) -> t.On:
        return t.On(str(mesh), at=_at(mesh))

    def order(self, name: Token, by: Any) -> t.Order:
        return t.Order(str(name).strip('"'), by, at=_at(name))

    def order_names(self, name: Token, *members: t.OrderMember) -> t.Order:
        return t.Order(str(name).strip('"'), t.Names(members), at=_at(name))

    def member(self, group: Token | None, name: Token, dims: _Dims | None) -> t.OrderMember:
        return t.OrderMember(self._pattern(name), None if dims is None else dims.factors, group is not None)

    def listing(self, name: Token) -> str:
        return str(name)

    def kinds(self, *kinds: Token) -> tuple[str, ...]:
        return tuple(map(str, kinds))

    def within(self, *children: Any) -> t.Within:
        tokens = [child for child in children if isinstance(child, Token)]
        body = tuple(child for child in children if isinstance(child, t.RuleLine))
        return t.Within(tuple(map(self._pattern, tokens)), body, at=_at(tokens[0]))

    def line(self, pattern: Token, *rest: Any) -> t.RuleLine:
        tokens = [one for one in rest if isinstance(one, Token)]
        dims = next((one for one in rest if isinstance(one, _Dims)), None)
        arrow = next((one for one in rest if isinstance(one, t.Arrow)), None)
        body = tuple(one for one in rest if isinstance(one, t.RuleLine))
        clauses = tuple(one for one in rest if isinstance(one, t.Clause))
        whole = self._pattern(tokens[0]) if tokens else None
        factors = None if dims is None else dims.factors
        return t.RuleLine(self._pattern(pattern), whole, factors, clauses, arrow, body, at=_at(pattern))

    def arrow(self, pattern: Token, *rest: Any) -> t.Arrow:
        dims = next((one for one in rest if isinstance(one, _Dims)), None)
        clauses = tuple(one for one in rest if isinstance(one, t.Clause))
        return t.Arrow(self._pattern(pattern), None if dims is None else dims.factors, clauses)

    # -- dimensions

    def any_dims(self, *_: Any) -> _Dims:
        return _Dims("...")

    def dims(self, *factors: t.Factor) -> _Dims:
        scalar = len(factors) == 1 and isinstance(factors[0], t.Sum) and factors[0].parts == (t.Product((t.Number(0),)),)
        return _Dims(() if scalar else factors)

    def factor(self, inner: t.Factor, *cuts: Any) -> t.Factor:
        for wrap in cuts:
            inner = wrap(inner)
        return inner

    def size(self, name: Token) -> t.Size:
        return t.Size(str(name), at=_at(name))

    def number(self, value: Token) -> t.Number:
        return t.Number(int(value), at=_at(value))

    def sum(self, *parts: t.Product) -> t.Sum:
        return t.Sum(parts, at=_first_place(parts))

    def product(self, label: Token | None, *factors: t.Factor) -> t.Product:
        return t.Product(factors, None if label is None else str(label).rstrip("= \t"))

    def pad(self, size: t.Size | t.Cat, *rest: Any) -> t.Pad:
        *cuts, multiple = rest
        inner: t.Factor = size
        for wrap in cuts:
            inner = wrap(inner)
        if isinstance(inner, t.Deal) or (isinstance(size, t.Cat) and cuts):
            raise self._fault("expected pad(size), pad(size/axis, n) or pad(cat(order), n)", size.at)
        return t.Pad(inner, multiple, at=size.at)  # type: ignore[arg-type]  # a size, a cat or cuts of a size

    def cat(self, order: Token, each: t.Expr | None) -> t.Cat:
        return t.Cat(str(order), each, at=_at(order))

    def cut(self, *children: Any) -> Any:
        axes = tuple(child for child in children if isinstance(child, Token))
        mode: t.SplitMode = next((child for child in children if not isinstance(child, Token) and child is not None), "even")
        return lambda inner: t.Cut(inner, tuple(map(str, axes)), mode, at=_at(axes[0]))

    def deal(self, axis: Token) -> Any:
        return lambda inner: t.Deal(inner, str(axis), at=_at(axis))

    def chunk(self) -> str:
        return "chunk"

    def balanced(self) -> str:
        return "balanced"

    def sizes(self, *values: t.Expr) -> t.Sizes:
        return t.Sizes(values)

    def sizes_named(self, name: Token) -> t.Sizes:
        return t.Sizes(str(name))

    # -- clauses

    def hold(self, word: Any, *axes: Token) -> t.Hold:
        return t.Hold(str(word), tuple(map(str, axes)), at=_at(word))  # type: ignore[arg-type]  # the terminal is these words

    def optional(self) -> t.Flag:
        return t.Flag("optional")

    def drop(self) -> t.Flag:
        return t.Flag("drop")

    def equal(self) -> t.Flag:
        return t.Flag("equal")

    def tied(self, to: Token) -> t.TiedClause:
        return t.TiedClause(self._pattern(to), at=_at(to))

    def stored(self, by: t.Expr, exponents: tuple[tuple[str, int], ...] | None) -> t.Stored:
        return t.Stored(by, exponents or ())

    def exponents(self, *found: tuple[str, int]) -> tuple[tuple[str, int], ...]:
        return found

    def exponent(self, state: Token, power: Token) -> tuple[str, int]:
        return str(state), int(power)

    def condition(self, condition: t.Condition) -> t.If:
        return t.If(condition)

    def cast(self, dtype: Token) -> t.CastClause:
        return t.CastClause(str(dtype), at=_at(dtype))

    # -- arithmetic

    def comparison(self, left: t.Expr, sign: Any, right: t.Expr | None) -> t.Condition:
        return t.Condition(left, None if sign is None else str(sign), right)  # type: ignore[arg-type]

    def constant(self, name: Token) -> t.Constant:
        return t.Constant(str(name), at=_at(name))

    def axis_size(self, axis: Token) -> t.AxisSize:
        return t.AxisSize(str(axis), at=_at(axis))

    def call(self, function: Token, *arguments: t.Expr) -> t.FunctionCall:
        if _FUNCTIONS.get(str(function)) != len(arguments):
            known = ", ".join(f"{name} of {count}" for name, count in _FUNCTIONS.items())
            raise self._fault(f"function {function!s} of {len(arguments)}: expected one of {known}", _at(function))
        return t.FunctionCall(str(function), arguments, at=_at(function))

    def add(self, left: t.Expr, right: t.Expr) -> t.Arithmetic:
        return t.Arithmetic("+", left, right, at=left.at)

    def subtract(self, left: t.Expr, right: t.Expr) -> t.Arithmetic:
        return t.Arithmetic("-", left, right, at=left.at)

    def multiply(self, left: t.Expr, right: t.Expr) -> t.Arithmetic:
        return t.Arithmetic("*", left, right, at=left.at)

    def divide(self, left: t.Expr, right: t.Expr) -> t.Arithmetic:
        return t.Arithmetic("/", left, right, at=left.at)

    def remainder(self, left: t.Expr, right: t.Expr) -> t.Arithmetic:
        return t.Arithmetic("%", left, right, at=left.at)

    # -- names

    def _pattern(self, token: Token) -> t.Pattern:
        text, at = str(token), _at(token)
        if text.startswith('"'):
            return t.Pattern((text[1:-1],), at=at)
        pieces: list[str | t.Hole] = []
        end = 0
        for found in _HOLE.finditer(text):
            if found.start() > end:
                pieces.append(text[end : found.start()])
            pieces.append(self._hole(found[0][1:-1], t.TextPlace(at.line, at.column + found.start(), len(found[0]))))
            end = found.end()
        if end < len(text):
            pieces.append(text[end:])
        names = [piece.name for piece in pieces if isinstance(piece, t.Hole)]
        if len(set(names)) != len(names):
            raise self._fault(f"a hole stands twice in {text}", at)
        return t.Pattern(tuple(pieces), at=at)

    def _hole(self, text: str, at: t.TextPlace) -> t.Hole:
        name, colon, share = text.partition(":")
        name = name.strip()
        if not _SIMPLE_HOLE.fullmatch(name) or (colon and (name.startswith("*") or not share.strip())):
            raise self._fault(f"expected {{i}}, {{i: share}} or {{*text}}, found {{{text}}}", at)
        if not colon:
            return t.Hole(name.lstrip("*"), None, name.startswith("*"), at=at)
        try:
            factor = _Builder(self._source, self._name).transform(_parsers()[1].parse(share))
        except UnexpectedInput:
            raise self._fault(f"expected a share as {{i: layers/pp}}, found {{{text}}}", at) from None
        return t.Hole(name, placed_at(factor, at), at=at)

    def _fault(self, message: str, at: t.TextPlace) -> ProgramFault:
        return fault(message, at=at, source=self._source, name=self._name)


class _Dims:
    """Dimensions under way: none is not the same as not stated."""

    def __init__(self, factors: Any) -> None:
        self.factors = factors
