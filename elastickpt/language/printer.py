"""The canonical text of a program: `parse(print_program(tree)) == tree`. [LANG-2]"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from elastickpt.language import tree as t
from elastickpt.language.scope import ConstantValue

_PLAIN = re.compile(r'[^\s{}#"()/,=+|]+')
_INDENT = "    "


def print_program(program: t.Program) -> str:
    """The canonical text."""
    return "\n".join((f"ucl {program.version}", *(line for one in program.statements for line in _statement(one)))) + "\n"


def filled_in(program: t.Program, constants: Mapping[str, ConstantValue], sizes: Mapping[str, int]) -> t.Program:
    """The program with these constants and sizes of axes as its own: it needs nothing more."""
    statements: list[t.Statement] = []
    for one in program.statements:
        if isinstance(one, t.Needs):
            one = t.Needs(tuple(_filled(need, constants) for need in one.needs))
        elif isinstance(one, t.MeshLine):
            one = replace(one, sizes=tuple(sizes.get(a, size) for a, size in zip(one.axes, one.sizes, strict=True)))
        statements.append(one)
    return replace(program, statements=tuple(statements))


def _filled(need: t.Need, constants: Mapping[str, ConstantValue]) -> t.Need:
    value = constants.get(need.name)
    if isinstance(value, tuple) and value:
        return replace(need, default=t.SizeList(tuple(map(t.Number, value))), others=())
    return replace(need, default=t.Number(value), others=()) if isinstance(value, int) and value >= 0 else need


def _statement(one: t.Statement) -> Iterator[str]:
    match one:
        case t.Needs(needs):
            yield "needs " + ", ".join(map(_need, needs))
        case t.Let(name, value):
            yield f"let {name} = {expr_text(value)}"
        case t.MeshLine(name, axes, sizes):
            said = (axis if size is None else f"{axis} {size}" for axis, size in zip(axes, sizes, strict=True))
            yield f"mesh {name} = {', '.join(said)}".rstrip()
        case t.Split(axis, into, sized, size):
            yield f"split {axis} = {into[0]}, {into[1]} where |{sized}| = {expr_text(size)}"
        case t.Chunks(axis, size):
            yield f"chunks {axis} = {expr_text(size)}"
        case t.On(mesh):
            yield f"on {mesh}"
        case t.Order():
            yield from _order(one)
        case t.Within(containers, body):
            yield "in " + " or ".join(map(pattern_text, containers))
            for line in body:
                yield from _line(line, 1)
        case t.RuleLine():
            yield from _line(one, 0)


def _need(need: t.Need) -> str:
    names = " or ".join((need.name, *need.others))
    return names if need.default is None else f"{names} = {_default(need.default)}"


def _default(default: t.Expr | t.SizeList) -> str:
    if not isinstance(default, t.SizeList):
        return expr_text(default)
    if default.values is None:
        return "found"
    return f"({', '.join(map(expr_text, default.values))}{',' if len(default.values) == 1 else ''})"


def _order(order: t.Order) -> Iterator[str]:
    name = order.name if order.name.isidentifier() else f'"{order.name}"'
    if isinstance(order.by, str):
        yield f"order {name} = listing {order.by}"
    elif isinstance(order.by, t.Names):
        yield f"order {name}:"
        for member in order.by.members:
            words = [*(["group"] if member.begins else []), pattern_text(member.name)]
            yield _INDENT + "  ".join((*words, *([] if member.dims is None else [dims_text(member.dims)])))
    else:
        yield f"order {name} = {', '.join(map(str, order.by))}"


def _line(line: t.RuleLine, depth: int) -> Iterator[str]:
    words = [pattern_text(line.pattern)]
    if line.whole is not None:
        words.append(f"as {pattern_text(line.whole)}")
    words.extend(_tail(line.dims, line.clauses))
    if line.arrow is not None:
        words.append(f"-> {pattern_text(line.arrow.pattern)}")
        words.extend(_tail(line.arrow.dims, line.arrow.clauses))
    yield _INDENT * depth + "  ".join(words)
    for inner in line.body:
        yield from _line(inner, depth + 1)


def _tail(dims: object, clauses: tuple[t.Clause, ...]) -> Iterator[str]:
    if dims is not None:
        yield dims_text(dims)
    for clause in clauses:
        yield clause_text(clause)


def dims_text(dims: object) -> str:
    """Dimensions as they are written; `(0)` is no axis at all."""
    if isinstance(dims, str):
        return dims
    return "  ".join(map(factor_text, dims)) or "(0)" if isinstance(dims, tuple) else ""


def factor_text(factor: t.Factor) -> str:
    match factor:
        case t.Size(name):
            return name
        case t.Number(value):
            return str(value)
        case t.Pad(size, multiple):
            return f"pad({factor_text(size)})" if multiple is None else f"pad({factor_text(size)}, {expr_text(multiple)})"
        case t.Sum(parts):
            return f"({' + '.join(map(_product, parts))})"
        case t.Cut(inner, axes, mode):
            along = axes[0] if len(axes) == 1 else f"({' '.join(axes)})"
            return f"{factor_text(inner)}/{along}{_mode(mode)}"
        case t.Deal(inner, axis):
            return f"{factor_text(inner)}%{axis}"
        case t.Cat(order, each):
            return f"cat({order})" if each is None else f"cat({order}, pad {expr_text(each)})"


def _product(product: t.Product) -> str:
    text = " ".join(map(factor_text, product.factors))
    return text if product.label is None else f"{product.label}={text}"


def _mode(mode: t.SplitMode) -> str:
    if isinstance(mode, t.Sizes):
        named = isinstance(mode.values, str)
        return f":{mode.values}" if named else f":({', '.join(map(expr_text, mode.values))})"  # type: ignore[arg-type]
    return "" if mode == "even" else f":{mode}"


def clause_text(clause: t.Clause) -> str:
    match clause:
        case t.Hold(word, axes):
            return f"{word} {', '.join(axes)}"
        case t.Flag(word):
            return word
        case t.TiedClause(to):
            return f"tied {pattern_text(to)}"
        case t.Stored(by, exponents):
            powers = ", ".join(f"{state}: {power}" for state, power in exponents)
            return f"stored /{_value(by)}" + (f" ({powers})" if powers else "")
        case t.If(condition):
            right = "" if condition.right is None else f" {condition.sign} {expr_text(condition.right)}"
            return f"if {expr_text(condition.left)}{right}"
        case t.CastClause(dtype):
            return f"cast {dtype}"


def expr_text(expr: t.Expr) -> str:
    match expr:
        case t.Arithmetic(sign, left, right):
            low = sign in "+-"
            first = expr_text(left) if low or not _is_low(left) else f"({expr_text(left)})"
            second = (
                f"({expr_text(right)})" if isinstance(right, t.Arithmetic) and (not low or _is_low(right)) else expr_text(right)
            )
            return f"{first} {sign} {second}" if low else f"{first}{sign}{second}"
        case _:
            return _value(expr)


def _is_low(expr: t.Expr) -> bool:
    return isinstance(expr, t.Arithmetic) and expr.sign in "+-"


def _value(expr: t.Expr) -> str:
    match expr:
        case t.Number(value):
            return str(value)
        case t.Constant(name):
            return name
        case t.AxisSize(axis):
            return f"|{axis}|"
        case t.FunctionCall(function, arguments):
            return f"{function}({', '.join(map(expr_text, arguments))})"
        case t.Arithmetic():
            return f"({expr_text(expr)})"


def pattern_text(pattern: t.Pattern) -> str:
    text = "".join(piece if isinstance(piece, str) else _hole(piece) for piece in pattern.pieces)
    simple = all(isinstance(piece, t.Hole) or _PLAIN.fullmatch(piece) for piece in pattern.pieces)
    return text if simple and not _reserved(text) else f'"{text}"'


_RESERVED = {"needs", "let", "mesh", "split", "chunks", "on", "order", "in", "ucl", "or", "as", "..."}


def _reserved(text: str) -> bool:
    return text in _RESERVED


def _hole(hole: t.Hole) -> str:
    if hole.any_text:
        return f"{{*{hole.name}}}"
    return f"{{{hole.name}}}" if hole.share is None else f"{{{hole.name}: {factor_text(hole.share)}}}"
