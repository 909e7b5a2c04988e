"""A bar chart of every contestant's share of the floor."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .compare import Row, rows, title
from .records import FLOORS, Report
from .table import unsynced_names

COLOURS = {"elastickpt": "#1b6ca8", "elastickpt-packed": "#5aa9d6", "dcp": "#d1603d", "tc": "#b8b8b8", "tc+fsync": "#7a7a7a"}


def draw(report: Report, path: Path) -> None:
    """Write a PNG with one group of bars per setting; 1.0 is the floor. Imports matplotlib; raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups, unsynced = _groups(report), unsynced_names(report)
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.22 * sum(len(group) + 1 for _, group in groups)))
    at, ticks, labels = 0.0, [], []
    for name, group in groups:
        for row in group:
            share = row.of_floor or 0.0
            axes.barh(at, share, color=COLOURS.get(row.contestant, "#444444"), height=0.9)
            remark = " (not durable)" if row.contestant in unsynced and row.setting.case.endswith("save") else ""
            axes.text(share + 0.01, at, f"{row.contestant} {share:.2f}{remark}", va="center", fontsize=7)
            at += 1
        ticks.append(at - len(group) / 2 - 0.5)
        labels.append(name)
        at += 1
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the floor's speed (raw files from warm memory, of a stall a copy in memory; same bytes and run)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _groups(report: Report) -> list[tuple[str, list[Row]]]:
    compared = [row for row in rows(report.measures) if row.of_floor is not None and row.contestant not in FLOORS]
    return [(title(setting), list(group)) for setting, group in groupby(compared, key=lambda row: row.setting)]
