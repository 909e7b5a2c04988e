"""What `inspect` shows of a run to people: its checkpoints, and its epochs where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator

from elastickpt.cli.facts import approximate_since
from elastickpt.cli.grid import Column, GridLine, Row, Span, grid
from elastickpt.cli.run_facts import CheckpointFact, KeepFact, RunFacts, layout_text
from elastickpt.cli.text import age_text, nbytes_text, plural, printable, time_text
from elastickpt.ledger.history import EpochEntry, Finding
from elastickpt.ledger.retention import Judgement, Keep

_CHECKPOINTS = (
    Column("step", "right", style="bold"),
    Column("epoch", "right"),
    Column("branch", style="green"),
    Column("age", "right"),
    Column("bytes", "right"),
    Column("ranks", "right", optional=1),
    Column("layout", style="magenta", optional=2),
    Column("metrics", style="cyan", flexible=True, optional=3),
    Column("verified", flexible=True),
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


def run_lines(facts: RunFacts, *, width: int | None) -> Iterator[GridLine]:
    """The run as a whole, a row for each checkpoint, then one for each epoch, newest first."""
    yield (Span(printable(facts.path), "bold"), Span(f"  {_said(facts)}", "dim"))
    if facts.keep is not None and facts.keep.epoch is not None:
        yield (Span(f"keeps {printable(facts.keep.words)}", ""), Span(f"  {_whose(facts.keep)}", "dim"))
    if facts.checkpoints:
        yield ()
        yield from grid(_CHECKPOINTS, [_checkpoint(fact, facts) for fact in facts.checkpoints], width=width)
    if facts.epochs:
        yield ()
        yield from grid(_EPOCHS, [_epoch(epoch) for epoch in facts.epochs], width=width)


def _said(facts: RunFacts) -> str:
    if not facts.checkpoints:
        return "a run without a checkpoint"
    aside = len(facts.checkpoints) - facts.live
    abandoned = f", {aside:,} abandoned" if aside else ""
    damaged = f", {facts.damaged:,} damaged" if facts.damaged else ""
    newest = next((fact.manifest for fact in facts.checkpoints if fact.entry.state == "live" and fact.manifest), None)
    since = None if newest is None else approximate_since(newest)
    approximate = "" if since is None else f", approximate since step {since:,}"
    said = f"a run: {plural(facts.live, 'checkpoint')} on the live branch{abandoned}{damaged}, {nbytes_text(facts.nbytes)}"
    return said + approximate


def _whose(keep: KeepFact) -> str:
    unknown = "; this release does not understand them" if keep.keep is None else ""
    return f"the rules of epoch {keep.epoch}{unknown}"


def _verified(found: Finding | None) -> str:
    """What the newest restore that looked at it said. [CLI-29]"""
    if found is None:
        return "-"
    said = {
        "verified": f"at epoch {found.epoch}'s restore",
        "damaged": f"damaged: {found.kind}",
        "unread": f"unread: {found.kind}",
    }
    return said[found.outcome]


def _kept(verdict: Judgement | None, keep: KeepFact | None) -> str:
    if verdict is None or keep is None:
        return ""
    if keep.keep == Keep():
        return "all kept"
    return f"{'yes' if verdict.kept else 'no'}: {', '.join(verdict.reasons)}"


def _problem(fact: CheckpointFact) -> str:
    """What is wrong now; else what was when a restore passed it over."""
    if fact.problem is not None:
        return f"{fact.problem.message} [{fact.problem.kind}]"
    if fact.found is None or not fact.found.kind:
        return ""
    return f"epoch {fact.found.epoch} passed it over: {' '.join(fact.found.message.split())}"


def _checkpoint(fact: CheckpointFact, facts: RunFacts) -> Row:
    entry, manifest = fact.entry, fact.manifest
    cells = (
        str(entry.step),
        str(entry.epoch),
        entry.state,
        "" if entry.time is None else age_text(facts.now - entry.time),
        "" if entry.nbytes is None else nbytes_text(entry.nbytes),
        "" if manifest is None else f"{manifest.world_size:,}",
        "" if manifest is None else layout_text(manifest.meshes),
        ", ".join(f"{name} {value:g}" for name, value in entry.metrics),
        _verified(fact.found),
        _kept(fact.verdict, facts.keep),
        _problem(fact),
    )
    return Row(tuple(map(printable, cells)), style="bold red" if fact.damaged else "")


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
