"""What `inspect --json` says of a run. Fixed by spec/schemas/cli-inspect-run.schema.json. [CLI-27]"""

from __future__ import annotations

from elastickpt.cli.run_facts import CheckpointFact, RunFacts
from elastickpt.format.encode_values import encode_value
from elastickpt.ledger.history import EpochEntry, Finding

Json = dict[str, object]
SCHEMA = "ckpt-convert.inspect-run/1"


def run_json(facts: RunFacts) -> Json:
    """The checkpoints, live ones first, and the epochs where they were asked for."""
    found: Json = {
        "schema": SCHEMA,
        "path": facts.path,
        "total": {
            "checkpoints": len(facts.checkpoints),
            "live": facts.live,
            "abandoned": len(facts.checkpoints) - facts.live,
            "damaged": facts.damaged,
            "nbytes": facts.nbytes,
        },
        "keep": None if facts.keep is None else {"rules": facts.keep.words, "epoch": facts.keep.epoch},
        "checkpoints": [_checkpoint(fact) for fact in facts.checkpoints],
    }
    if facts.epochs:
        found["epochs"] = [_epoch(epoch) for epoch in facts.epochs]
    return found


def _checkpoint(fact: CheckpointFact) -> Json:
    entry, manifest = fact.entry, fact.manifest
    meshes = manifest.meshes if manifest is not None else ()
    about: Json = {
        "step": entry.step,
        "epoch": entry.epoch,
        "attempt": entry.attempt,
        "folder": entry.folder,
        "state": entry.state,
        "time": entry.time,
        "nbytes": entry.nbytes,
        "metrics": {name: encode_value(value, where=f"metric {name}") for name, value in entry.metrics},
        "world_size": None if manifest is None else manifest.world_size,
        "meshes": [{"name": mesh.name, "axes": list(mesh.axes), "sizes": list(mesh.sizes)} for mesh in meshes],
        "problem": None if fact.problem is None else {"kind": fact.problem.kind, "message": fact.problem.message},
        "found": None if fact.found is None else _found(fact.found),
    }
    if fact.verdict is not None:
        about |= {"kept": fact.verdict.kept, "reasons": list(fact.verdict.reasons)}
    return about


def _found(found: Finding) -> Json:
    about: Json = {"outcome": found.outcome, "epoch": found.epoch, "time": found.time}
    return about | {"kind": found.kind or None, "message": found.message if found.kind else None}


def _epoch(epoch: EpochEntry) -> Json:
    by = epoch.by
    return {
        "epoch": epoch.epoch,
        "state": epoch.state,
        "host": None if by is None else by.host,
        "pid": None if by is None else by.pid,
        "time": None if by is None else by.time,
        "continued": None if epoch.continued is None else epoch.continued.folder,
        "problems": list(epoch.problems),
    }
