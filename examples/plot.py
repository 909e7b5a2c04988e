"""The figure of the demo: the loss of each layout over that of the uninterrupted run, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D98200", "#00895F", "#B8589A")  # colour-blind readers tell them apart
RED, INK, FAINT, RIBBON = "#C1121F", "#22272E", "#9AA4AF", "#D5DAE0"
EQUAL = 1e-9  # where equal losses stand on the logarithmic axis


@dataclass(frozen=True)
class Segment:
    """What one layout did: `losses` by step, after it loaded the checkpoint of step `first`; `seam` says how."""

    title: str
    ranks: int
    first: int
    losses: Mapping[int, float]
    seam: str


def draw(segments: Sequence[Segment], reference: Mapping[int, float], path: Path, *, tolerance: float) -> None:
    """Write the figure to `path`. Steps beyond the first one of the next segment were lost; they are drawn as rings."""
    with mpl.rc_context():
        set_style()
        figure = Figure(figsize=(11, 6.6), dpi=160, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        low, high = min(reference.values()), max(reference.values())
        upper.set(yscale="log", ylabel="loss, nats per byte", ylim=(low * 0.92, high * 1.32))
        mark(upper, {value: str(value) for value in range(1, 10) if low * 0.92 < value < high})
        lower.set(yscale="log", ylim=(EQUAL / 2.5, tolerance * 4), xlabel="completed steps", ylabel="relative\ndifference")
        lower.set(xlim=(0, max(reference) + 0.7))
        mark(lower, {EQUAL: "equal", 1e-8: "$10^{-8}$", 1e-6: "$10^{-6}$", 1e-4: "$10^{-4}$"})
        steps = sorted(reference)
        upper.plot(steps, [reference[step] for step in steps], color=RIBBON, linewidth=8, solid_capstyle="round", zorder=1)
        upper.lines[-1].set_label("the run that never stopped")
        ends = [later.first for later in segments[1:]] + [max(reference)]
        for segment, end, colour in zip(segments, ends, COLOURS, strict=False):
            for axes in (upper, lower):
                axes.axvspan(segment.first, end, color=colour, alpha=0.05, linewidth=0)
            draw_segment(upper, segment, end, colour)
            draw_seam(upper, lower, segment, end, colour)
            apart = [max(abs(loss / reference[step] - 1), EQUAL) for step, loss in segment.losses.items()]
            lower.scatter(list(segment.losses), apart, s=14, color=colour, linewidths=0, zorder=3)
        lower.axhline(tolerance, color=RED, linewidth=1, linestyle="--")
        lower.text(0.6, tolerance / 1.6, "allowed", color=RED, fontsize=9, va="top")
        upper.legend(loc="center right", bbox_to_anchor=(1, 0.6), frameon=False)
        figure.suptitle("One training run on four layouts, beside one that never stopped", weight="bold", fontsize=14)
        figure.savefig(path)


def set_style() -> None:
    mpl.rc("font", family="DejaVu Sans", size=10)
    mpl.rc("text", color=INK)
    mpl.rc("axes", edgecolor=FAINT, labelcolor=INK, grid=True, axisbelow=True)
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("xtick", color=INK)
    mpl.rc("ytick", color=INK)
    mpl.rc("grid", color="#E7EBEF")


def mark(axes: Axes, labels: Mapping[float, str]) -> None:
    """Ticks of the vertical axis at these values and nowhere else."""
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_yticks((), minor=True)


def draw_segment(axes: Axes, segment: Segment, end: int, colour: str) -> None:
    """The losses that count as a line, those that were lost with a killed rank as rings, and the kill as a cross."""
    kept = [step for step in segment.losses if step <= end]
    lost = [step for step in segment.losses if step > end]
    axes.plot(kept, [segment.losses[step] for step in kept], color=colour, linewidth=2, marker="o", markersize=3, zorder=3)
    if lost:
        last, values = max(lost), [segment.losses[step] for step in lost]
        axes.scatter(lost, values, s=44, facecolors="none", edgecolors=colour, linewidths=1.2, zorder=4)
        axes.scatter(last, segment.losses[last], s=110, marker="X", color=RED, edgecolors="white", zorder=5)
        axes.annotate(
            f"SIGKILL to one rank\nafter step {last}: {len(lost)} steps\nlost, and done again",
            (last, segment.losses[last]),
            xytext=(24, 66),
            textcoords="offset points",
            color=RED,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": RED, "linewidth": 0.9, "shrinkB": 8},
        )


def draw_seam(upper: Axes, lower: Axes, segment: Segment, end: int, colour: str) -> None:
    """The layout's name over its steps, and a dashed line where it loaded what another layout had saved."""
    x, above = (segment.first + end) / 2, upper.get_xaxis_transform()
    ranks = f"{segment.ranks} rank{'s' if segment.ranks > 1 else ''}"
    upper.text(x, 0.945, segment.title, color=colour, ha="center", weight="bold", fontsize=11, transform=above)
    upper.text(x, 0.9, ranks, color=colour, ha="center", fontsize=9, transform=above)
    if segment.first:
        for axes in (upper, lower):
            axes.axvline(segment.first, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=2)
        upper.text(segment.first + 0.5, 0.84, segment.seam, fontsize=8.5, transform=above)
