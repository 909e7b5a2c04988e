"""Names with holes: what they match, how they are filled, joined and counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from elastickpt.language import tree as t


def regex_of(pattern: t.Pattern) -> re.Pattern[str]:
    """Matches the names that a pattern stands for, with a group for each hole."""
    text = "".join(
        re.escape(piece) if isinstance(piece, str) else f"(?P<{piece.name}>{'.+' if piece.any_text else '0|[1-9][0-9]{0,8}'})"
        for piece in pattern.pieces
    )
    return re.compile(text, re.DOTALL)


def filled(pattern: t.Pattern, values: Mapping[str, int | str]) -> str:
    """The name with its holes filled."""
    return "".join(piece if isinstance(piece, str) else str(values[piece.name]) for piece in pattern.pieces)


def joined(first: t.Pattern, second: t.Pattern) -> t.Pattern:
    """One name behind the other."""
    pieces = [*first.pieces, *second.pieces]
    if len(first.pieces) and len(second.pieces) and isinstance(pieces[len(first.pieces) - 1], str):
        at = len(first.pieces)
        left, right = pieces[at - 1], pieces[at]
        if isinstance(left, str) and isinstance(right, str):
            pieces[at - 1 : at + 1] = [left + right]
    return t.Pattern(tuple(pieces), at=second.at)


def known_names(program: t.Program, names: Iterable[tuple[str, str]]) -> int:
    """How many of these (container, name) the program has a rule for, conditions and constants aside."""
    finders = []
    for block in (one for one in program.statements if isinstance(one, t.Within)):
        within = [regex_of(one) for one in block.containers]
        finders += [(within, regex_of(pattern)) for line in block.body for pattern in _patterns(line, t.Pattern(()))]
    return sum(
        any(finder.fullmatch(name) and any(one.fullmatch(container) for one in within) for within, finder in finders)
        for container, name in names
    )


def _patterns(line: t.RuleLine, outer: t.Pattern) -> Iterator[t.Pattern]:
    own = joined(outer, line.pattern)
    if not line.body:
        yield own
    for inner in line.body:
        yield from _patterns(inner, own)


def placed_at(factor: t.Factor, at: t.TextPlace) -> t.Factor:
    """A factor inside a hole, with the hole's place: it was parsed by itself."""
    inner = {one.name: getattr(factor, one.name) for one in fields(factor)}
    moved: dict[str, Any] = {"at": at} if "at" in inner else {}
    if isinstance(factor, t.Cut | t.Deal):
        moved["inner"] = placed_at(factor.inner, at)
    elif isinstance(factor, t.Sum):
        moved["parts"] = tuple(
            replace(part, factors=tuple(placed_at(one, at) for one in part.factors)) for part in factor.parts
        )
    return replace(factor, **moved)
