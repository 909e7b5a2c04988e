"""A report as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .judge import BAD, Outcome
from .records import Kind, Report, Tally

TITLES: Mapping[Kind, str] = {
    "power": "what is left after a power cut, by loading it",
    "save": "what is left after one process was killed in a save, by loading it",
    "flips": "what a load gives after one bit of the checkpoint was flipped",
}
OUTCOMES: Mapping[Kind, tuple[Outcome, ...]] = {
    "power": ("silently wrong", "lost", "hang", "error", "new", "old", "does not mount"),
    "save": ("silently wrong", "lost", "hang", "error", "new", "old"),
    "flips": ("silently wrong", "lost", "hang", "crash", "detected", "harmless"),
}


def render(report: Report) -> RenderableType:
    """The whole report as one renderable."""
    machine = report.machine
    head = Text(
        f"{report.date}: {machine.cores} cores, {machine.memory_gb} GB, {machine.system}, "
        f"Python {machine.python}, torch {machine.torch}. {report.options}"
    )
    notes = [Text(f"absent: {name}: {why}") for name, why in report.absent.items()]
    return Group(head, _entrants(report), _outcomes(report), *_bad(report), *notes)


def _entrants(report: Report) -> Table:
    table = Table(title="who takes part", title_justify="left")
    for column in ("contestant", "version", "settings", "run"):
        table.add_column(column, overflow="fold")
    for one in report.tallies:
        table.add_row(one.contestant, one.version, Text(one.settings), Text(one.notes))
    return table


def _outcomes(report: Report) -> Table:
    table = Table(title=TITLES[report.kind], title_justify="left")
    table.add_column("contestant", no_wrap=True)
    outcomes = OUTCOMES[report.kind]
    for column in ("cases", *outcomes):
        table.add_column(column, justify="right")
    if report.kind == "save":
        table.add_column("next save failed", justify="right")
        table.add_column("next save in the same job after a dead writer", justify="right")
    for one in report.tallies:
        table.add_section()
        last = (_bad_number(one.next_save_failed), _saved_on(one)) if report.kind == "save" else ()
        table.add_row(Text(one.contestant, style="bold" if one.is_clean else "bold red"), *_cells(one.counts, outcomes), *last)
        for group, counts in one.groups.items():
            table.add_row(Text(f"  {group}", style="dim"), *_cells(counts, outcomes))
    return table


def _cells(counts: Mapping[str, int], outcomes: Sequence[Outcome]) -> list[Text]:
    cells = [Text(str(sum(counts.values())))]
    for outcome in outcomes:
        number = counts.get(outcome, 0)
        cells.append(_bad_number(number) if outcome in BAD else Text(str(number or "")))
    return cells


def _bad_number(number: int) -> Text:
    return Text(str(number or ""), style="red")


def _saved_on(one: Tally) -> Text:
    text = f"{one.saved_on} of {one.helpers_dead}" if one.helpers_dead else ""
    return Text(text, style="red" if one.saved_on < one.helpers_dead else "")


def _bad(report: Report) -> list[RenderableType]:
    return [_examples(one) for one in report.tallies if one.bad]


def _examples(one: Tally) -> Table:
    table = Table(title=f"{one.contestant}: the first of each", title_justify="left")
    for column in ("number", "outcome", "what was done", "what was found"):
        table.add_column(column, overflow="fold")
    for case in one.bad:
        later = (("next save", case.next_save), ("next save in the same job", case.same_job))
        found = "; ".join(filter(None, (case.detail, *(f"{which}: {why}" for which, why in later if why))))
        table.add_row(str(case.number), case.outcome, Text(case.how), Text(found[:300]))
    return table
