"""Units whose bytes follow each other in their file and in memory are read at once: pieces of a part that several ranks held.

A read costs 0.1 ms apart from its bytes, and a job on fewer ranks than wrote finds several small pieces in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elastickpt.layout.reads import Direct
from elastickpt.loading.plan import UNIT_NBYTES, Unit


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` at `offset` of a file that belong at `at` of a destination as they are."""

    offset: int
    at: int
    nbytes: int


def span_of(unit: Unit) -> Span | None:
    """All bytes of a unit, if they lie in a row and belong in a row."""
    piece, step = unit.piece, unit.read.steps[0]
    if len(unit.read.steps) > 1 or not isinstance(step, Direct) or piece.row_nbytes not in (piece.row_stride, piece.nbytes):
        return None
    if unit.start < step.source or unit.end > step.source + step.nbytes:
        return None
    return Span(piece.offset + unit.start, step.target + unit.start - step.source, unit.end - unit.start)


def joined(units: Iterable[Unit]) -> tuple[tuple[Unit, ...], ...]:
    """The units in their order, those together that are read at once: at most `UNIT_NBYTES`, of one file and one target."""
    found: list[list[Unit]] = []
    end: Span | None = None  # all of the last ones, None where nothing can follow them
    for unit in units:
        span = span_of(unit)
        if end is not None and span is not None and _follows(found[-1][-1], unit, end, span):
            found[-1].append(unit)
            end = Span(end.offset, end.at, end.nbytes + span.nbytes)
        else:
            found.append([unit])
            end = span
    return tuple(map(tuple, found))


def _follows(last: Unit, unit: Unit, end: Span, span: Span) -> bool:
    return (
        last.target is unit.target
        and (end.offset + end.nbytes, end.at + end.nbytes) == (span.offset, span.at)
        and end.nbytes + span.nbytes <= UNIT_NBYTES
        and last.file == unit.file
    )
