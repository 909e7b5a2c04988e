"""A report as tables for people."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .compare import Row, rows, title
from .records import FLOORS, Durability, Report

DURABILITY_WORDS: dict[Durability, str] = {
    "power": "files and directories synced",
    "files": "files synced, directories not",
    "none": "nothing synced",
    "floor": "floor",
}


def print_report(report: Report, console: Console) -> None:
    """Print entrants, measures by setting, memory, and notes."""
    console.print(render(report))


def render(report: Report) -> RenderableType:
    """The whole report as one renderable."""
    machine = report.machine
    places = ", ".join(name if name == kind else f"{name} = {kind}" for name, kind in machine.places)
    head = Text(
        f"{report.date}: {machine.cores} cores, {machine.memory_gb} GB, {places}, {machine.system}, "
        f"Python {machine.python}, torch {machine.torch}. {report.repeats} repeats, medians. Cold: {report.cold_by}."
    )
    parts: list[RenderableType] = [head, _entrants(report), _measures(report)]
    if report.memories:
        parts.append(_memories(report))
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def unsynced_names(report: Report) -> frozenset[str]:
    """Contestants whose saves sync nothing, so that their save times are no durable save's."""
    return frozenset(entrant.name for entrant in report.entrants if entrant.durability == "none")


def _entrants(report: Report) -> Table:
    table = Table(title="who takes part", title_justify="left")
    for column in ("contestant", "version", "durability of a save", "settings"):
        table.add_column(column, overflow="fold")
    for entrant in report.entrants:
        if entrant.absent_because:
            table.add_row(entrant.name, "-", "-", Text(f"absent: {entrant.absent_because}"))
        else:
            table.add_row(entrant.name, entrant.version, DURABILITY_WORDS[entrant.durability], Text(entrant.settings))
    return table


def _measures(report: Report) -> Table:
    table = Table(title="slowest rank, first start to last end", title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for column in ("median s", "min..max s", "GB/s", "ms/tensor", "of floor", "of own", "read/needed", "× same layout"):
        table.add_column(column, justify="right", no_wrap=True)
    unsynced = unsynced_names(report)
    for setting, group in groupby(rows(report.measures), key=lambda row: row.setting):
        table.add_section()
        table.add_row(Text(title(setting), style="bold"))
        for row in group:
            table.add_row(*_cells(row, unsynced))
    return table


def _cells(row: Row, unsynced: frozenset[str]) -> tuple[str | Text, ...]:
    floor = row.contestant in FLOORS
    remark = " (not durable)" if row.contestant in unsynced and row.setting.case.endswith("save") else ""
    name = Text(f"  {row.contestant}{remark}", style="dim" if floor else "")
    if row.spread is None:
        return (Text(f"  {row.contestant}: failed, see the notes", style="red"),)
    spread, small = row.spread, row.setting.case.startswith("small")
    return (
        name,
        f"{spread.median:.3f}",
        f"{spread.low:.3f}..{spread.high:.3f}",
        "" if small or row.setting.case == "slow-down" else _number(row.gigabytes_per_s),
        _number(row.ms_per_tensor, digits=3) if small else "",
        _number(row.of_floor),
        _number(row.of_own),
        _number(row.read_share),
        _number(row.of_same_layout),
    )


def _memories(report: Report) -> Table:
    table = Table(
        title="growth of a rank's memory in a save (beside: with its writers), of its own state", title_justify="left"
    )
    for column in ("contestant", "ranks", "state MB", "first save MB", "later saves MB", "kept MB", "× state"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for memory in report.memories:
        if memory.error:
            table.add_row(memory.contestant, str(memory.ranks), Text(f"failed: {memory.error}"[:60], style="red"))
            continue
        numbers = (memory.state_nbytes, memory.first_peak_nbytes, memory.later_peak_nbytes, memory.kept_nbytes)
        share = memory.later_peak_nbytes / memory.state_nbytes
        cells = [f"{number / 1e6:.0f}" for number in numbers]
        table.add_row(memory.contestant, str(memory.ranks), *cells, f"{share:.2f}")
    return table


def _number(value: float | None, *, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
