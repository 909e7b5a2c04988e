"""What `inspect` shows of a run to people: its checkpoints, and its epochs where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator

from elastickpt.cli.grid import Column, Line, Row, Span, grid
from elastickpt.cli.run_facts import CheckpointFact, RunFacts, layout_text
from elastickpt.cli.text import age_text, nbytes_text, plural, printable, time_text
from elastickpt.runs.epoch_history import EpochEntry

_CHECKPOINTS = (
    Column("step", "right", style="bold"),
    Column("epoch", "right"),
    Column("branch", style="green"),
    Column("age", "right"),
    Column("bytes", "right"),
    Column("ranks", "right", optional=1),
    Column("layout", style="magenta", optional=2),
    Column("metrics", style="cyan", flexible=True, optional=3),
    Column("kept", flexible=True),
    Column("problem", style="red", flexible=True),
)
_EPOCHS = (
    Column("epoch", "right", style="bold"),
    Column("state"),
    Column("claimed"),
    Column("host", optional=1),
    Column("process", "right", optional=2),
    Column("continued from", flexible=True),
    Column("problem", style="red", flexible=True),
)


def run_lines(facts: RunFacts, *, width: int | None) -> Iterator[Line]:
    """The run as a whole, a row for each checkpoint, then one for each epoch, newest first."""
    yield (Span(printable(facts.path), "bold"), Span(f"  {_said(facts)}", "dim"))
    if facts.checkpoints:
        yield ()
        yield from grid(_CHECKPOINTS, [_checkpoint(fact, facts.now) for fact in facts.checkpoints], width=width)
    if facts.epochs:
        yield ()
        yield from grid(_EPOCHS, [_epoch(epoch) for epoch in facts.epochs], width=width)


def _said(facts: RunFacts) -> str:
    if not facts.checkpoints:
        return "a run without a checkpoint"
    aside = len(facts.checkpoints) - facts.live
    abandoned = f", {aside:,} abandoned" if aside else ""
    return f"a run: {plural(facts.live, 'checkpoint')} on the live branch{abandoned}, {nbytes_text(facts.nbytes)}"


def _checkpoint(fact: CheckpointFact, now: float) -> Row:
    entry, manifest, verdict = fact.entry, fact.manifest, fact.verdict
    kept = ""
    if verdict is not None:
        kept = f"{'yes' if verdict.kept else 'no'}: {', '.join(verdict.reasons)}"
    cells = (
        str(entry.step),
        str(entry.epoch),
        entry.state,
        "" if entry.time is None else age_text(now - entry.time),
        "" if entry.nbytes is None else nbytes_text(entry.nbytes),
        "" if manifest is None else f"{manifest.world_size:,}",
        "" if manifest is None else layout_text(manifest.meshes),
        ", ".join(f"{name} {value:g}" for name, value in entry.metrics),
        kept,
        "" if fact.problem is None else f"{fact.problem.message} [{fact.problem.kind}]",
    )
    return Row(tuple(map(printable, cells)))


def _epoch(epoch: EpochEntry) -> Row:
    by = epoch.by
    continued = "" if epoch.continued is None else f"step {epoch.continued.step} of epoch {epoch.continued.epoch}"
    cells = (
        str(epoch.epoch),
        epoch.state,
        "" if by is None else time_text(by.time),
        "" if by is None else by.host,
        "" if by is None else str(by.pid),
        "nothing" if epoch.state == "started" and epoch.continued is None else continued,
        "; ".join(epoch.problems),
    )
    return Row(tuple(map(printable, cells)))
