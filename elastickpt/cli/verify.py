"""`ckpt-convert verify`: whether checkpoints are whole, every byte of them. [CLI-30..32]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.exitcodes import DAMAGED, DONE, FAILED, UNSAFE, UNSUPPORTED, code_of, code_of_kind, gravest
from elastickpt.cli.grid import Column, GridLine, Row, Span, grid
from elastickpt.cli.output import Progress, byte_bar, say, say_error, screen_width, show, show_json
from elastickpt.cli.text import nbytes_text, plural, printable
from elastickpt.errors import CheckpointError, NotACheckpoint

if TYPE_CHECKING:
    from elastickpt.loading.checkpoint import Checkpoint
    from elastickpt.loading.verify import Problem

SCHEMA = "ckpt-convert.verify/1"
MAX_PROBLEMS = 1000  # of one checkpoint that are listed [CLI-30]

_EXAMPLES = """\
examples:
  ckpt-convert verify out/run/step-0000000100
  ckpt-convert verify runs/llama --quiet && echo all sound
  ckpt-convert verify runs/llama@latest runs/llama@900
  ckpt-convert verify step-100 --json | jq '.checkpoints[].problems[].kind'

exit codes:
  0 sound   1 failed, or no checkpoint   2 usage   3 damage found   4 unsupported   5 refused as unsafe
  130 interrupted; of several checkpoints' codes the gravest: 5, 3, 4, 1
"""
_STATUS = {DONE: "sound", DAMAGED: "damaged", UNSUPPORTED: "unsupported", UNSAFE: "unsafe", FAILED: "failed"}


@dataclass(frozen=True, slots=True)
class PathResult:
    """What came of one path. `error` is what kept it from being looked at, unless that is damage, a problem of its own."""

    path: str
    step: int | None
    arrays: int
    files: int
    nbytes: int
    problems: tuple[Problem, ...]
    error: CheckpointError | None = None

    @property
    def code(self) -> int:
        """The exit code of this path alone."""
        return gravest(code_of_kind(problem.kind) for problem in self.problems)

    @property
    def status(self) -> str:
        return _STATUS[self.code]


@dataclass(frozen=True, slots=True)
class _Target:
    """A checkpoint to verify: what it is called, how it is opened, whether what was asked for is still there."""

    path: str
    open: Callable[[], Checkpoint]
    stands: Callable[[], bool] = lambda: True


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(subparsers, "verify", help="check every byte of checkpoints and runs", examples=_EXAMPLES, run=run)
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="folder or URL of a checkpoint, RUN@STEP, or a run with all its checkpoints"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def run(args: argparse.Namespace) -> int:
    """Verifies one checkpoint after the other; the exit code."""
    outcomes = []
    for target in (target for path in args.paths for target in _targets(path)):
        with byte_bar(target.path, shown=sys.stderr.isatty() and not args.quiet) as progress:
            outcome = _verified(target, progress)
        if outcome.problems and not target.stands():
            say(f"note: {printable(target.path)}: removed from its run meanwhile")
            continue
        outcomes.append(outcome)
        if not args.json:
            show(_lines(outcome))
        _say_error(outcome)
    if args.json:
        show_json({"schema": SCHEMA, "checkpoints": [_json(outcome) for outcome in outcomes]})
    return gravest(outcome.code for outcome in outcomes)


def _targets(path: str) -> Iterator[_Target]:
    """What a PATH stands for: a checkpoint, or every one of a run that counts, live ones first. [CLI-33]"""
    from elastickpt.runs.opening import RunAt, open_path

    try:
        found = open_path(path)
        if isinstance(found, RunAt) and not found.entries:
            raise NotACheckpoint(f"{path}: a run without a checkpoint")
    except CheckpointError as error:
        problem = error  # `error` ends with this block, the target is opened later
        yield _Target(path, lambda: _raise(problem))
        return
    if not isinstance(found, RunAt):
        checkpoint = found
        yield _Target(path, lambda: checkpoint)
        return
    for entry in found.entries:
        yield _Target(f"{path}@{entry.step}.{entry.epoch}", partial(found.open, entry), partial(found.stands, entry))


def _raise(problem: CheckpointError) -> Checkpoint:
    raise problem


def _verified(target: _Target, progress: Progress) -> PathResult:
    from elastickpt.loading.verify import Problem

    step = None
    try:
        checkpoint = target.open()
        step = checkpoint.step
        report = checkpoint.verify(progress=progress)
    except CheckpointError as error:
        reason = None if code_of(type(error)) == DAMAGED else error
        return PathResult(target.path, step, 0, 0, 0, (Problem(error.kind, error.message),), reason)
    return PathResult(target.path, step, report.arrays, report.files, report.nbytes, report.problems)


def _lines(outcome: PathResult) -> Iterator[GridLine]:
    style = "green" if outcome.code == DONE else "bold red"
    yield Span(outcome.status, style), Span("  "), Span(printable(outcome.path), "bold"), Span(_said(outcome))
    if outcome.error is not None:
        return  # it is said on stderr
    columns = (Column("", style="red"), Column("", flexible=True))
    rows = [Row((one.kind, printable(one.message)), "  ") for one in outcome.problems[:MAX_PROBLEMS]]
    yield from grid(columns, rows, width=screen_width(), titled=False)
    if len(outcome.problems) > MAX_PROBLEMS:
        yield (Span(f"  … and {len(outcome.problems) - MAX_PROBLEMS:,} more", "dim"),)


def _said(outcome: PathResult) -> str:
    """What stands behind the path."""
    if outcome.error is not None:
        return ""
    step = "" if outcome.step is None else f"step {outcome.step:,}, "
    seen = f"{plural(outcome.arrays, 'array')}, {plural(outcome.files, 'file')}, {nbytes_text(outcome.nbytes)}"
    found = f"{plural(len(outcome.problems), 'problem')} in " if outcome.problems else ""
    return f"  {step}{found}{seen}"


def _say_error(outcome: PathResult) -> None:
    if outcome.error is not None:
        say_error(outcome.error, path=outcome.path)


def _json(outcome: PathResult) -> dict[str, object]:
    listed = outcome.problems[:MAX_PROBLEMS]
    return {
        "path": outcome.path,
        "status": outcome.status,
        "step": outcome.step,
        "arrays": outcome.arrays,
        "files": outcome.files,
        "nbytes": outcome.nbytes,
        "problems": [{"kind": problem.kind, "message": problem.message} for problem in listed],
        "problems_left_out": len(outcome.problems) - len(listed),
    }
