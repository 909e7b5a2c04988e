"""Lines of aligned columns, as values: nothing is written here, and the width is whatever the caller says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from elastickpt.cli.text import columns_of

GAP = 2  # blanks between columns
MIN_FLEXIBLE = 12  # columns that a flexible column keeps on the narrowest terminal


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a line that looks one way. `style` is rich's word for it, "" for plain."""

    text: str
    style: str = ""


GridLine = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """What is done where the screen is too narrow: `optional` columns are left out, which is said, the lowest number first;
    then `flexible` ones are broken at blanks into several lines. An `optional` of 0 is never left out.
    """

    title: str
    align: Literal["left", "right"] = "left"
    style: str = ""
    flexible: bool = False
    optional: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One cell a column. `guide` stands before the first cell, `below` in its place on further lines of the row."""

    cells: tuple[str, ...]
    guide: str = ""
    below: str = ""
    style: str = ""  # of the first cell, where it is not its column's


def plain(line: GridLine) -> str:
    """The text of a line without styles."""
    return "".join(span.text for span in line)


def grid(columns: Sequence[Column], rows: Sequence[Row], *, width: int | None, titled: bool = True) -> Iterator[GridLine]:
    """The lines of a table: titles, then rows. `width` None means that nothing is broken or left out.

    Columns in which every cell is empty are left out.
    """
    natural = _natural(columns, rows, titled=titled)
    kept = [k for k in range(len(columns)) if k == 0 or any(row.cells[k] for row in rows)]
    hidden = [] if width is None else _hidden(columns, natural, kept, width)
    kept = [k for k in kept if k not in hidden]
    shown = [columns[k] for k in kept]
    widths = [natural[k] for k in kept]
    if width is not None:
        _shrink(shown, widths, width)
    if titled:
        yield _joined([Span(_padded(c.title, w, c.align), "dim") for c, w in zip(shown, widths, strict=True)])
    for row in rows:
        yield from _row(Row(tuple(row.cells[k] for k in kept), row.guide, row.below, row.style), shown, widths)
    if hidden:
        titles = ", ".join(columns[k].title for k in sorted(hidden))
        yield (Span(f"not shown on {width} columns: {titles} (| less -S shows all)", "dim italic"),)


def _natural(columns: Sequence[Column], rows: Sequence[Row], *, titled: bool) -> list[int]:
    """The width that each column fills when nothing is broken."""
    found = [columns_of(column.title) if titled else 0 for column in columns]
    for row in rows:
        for k, cell in enumerate(row.cells):
            found[k] = max(found[k], columns_of(cell) + (columns_of(row.guide) if k == 0 else 0))
    return found


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _hidden(columns: Sequence[Column], natural: Sequence[int], kept: Sequence[int], width: int) -> list[int]:
    """The columns to leave out, so that the others fit without being broken, or until none can be left out."""
    hidden: list[int] = []
    for k in sorted((k for k in kept if columns[k].optional), key=lambda k: columns[k].optional):
        if _total([natural[j] for j in kept if j not in hidden]) <= width:
            break
        hidden.append(k)
    return hidden


def _shrink(columns: Sequence[Column], widths: list[int], width: int) -> None:
    """Takes from flexible columns, the widest first, until all fit or none can give more."""
    flexible = [k for k, column in enumerate(columns) if column.flexible]
    while flexible and _total(widths) > width:
        widest = max(flexible, key=lambda k: widths[k])
        if widths[widest] <= max(MIN_FLEXIBLE, columns_of(columns[widest].title)):
            break
        widths[widest] -= 1


def _row(row: Row, columns: Sequence[Column], widths: Sequence[int]) -> Iterator[GridLine]:
    broken = []
    for k, (cell, column, width) in enumerate(zip(row.cells, columns, widths, strict=True)):
        room = width - (columns_of(row.guide) if k == 0 else 0)
        broken.append(_broken(cell, room) if column.flexible else [cell])
    for number in range(max(len(cell) for cell in broken)):
        spans = []
        for k, (parts, column, width) in enumerate(zip(broken, columns, widths, strict=True)):
            text = parts[number] if number < len(parts) else ""
            if k == 0:
                guide = row.below if number else row.guide
                spans.append(Span(guide, "dim"))
                width -= columns_of(guide)
            spans.append(Span(_padded(text, width, column.align), (row.style if k == 0 else "") or column.style))
        yield _joined(spans, first=2)


def _broken(text: str, width: int) -> list[str]:
    """Broken at blanks; a word longer than the width stays whole, since a cut name is of no use."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if columns_of(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _padded(text: str, width: int, align: Literal["left", "right"]) -> str:
    blanks = " " * (width - columns_of(text))
    return blanks + text if align == "right" else text + blanks


def _joined(spans: Sequence[Span], *, first: int = 1) -> GridLine:
    """Spans with gaps between them, none before the first `first`, no blanks at the end."""
    line: list[Span] = []
    for k, span in enumerate(spans):
        if k >= first:
            line.append(Span(" " * GAP))
        line.append(span)
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        line[-1] = Span(line[-1].text.rstrip(), line[-1].style)
    return tuple(line)
