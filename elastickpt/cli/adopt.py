"""`ckpt-convert adopt`: whole checkpoints of a run that no register names count again. [CLI-40..42]"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.exitcodes import code_of, code_of_kind, gravest
from elastickpt.cli.grid import Span
from elastickpt.cli.output import byte_bar, say, say_error, show, show_json
from elastickpt.cli.text import plural, printable
from elastickpt.errors import CheckpointError

if TYPE_CHECKING:
    from elastickpt.runs.adopting import AdoptReport

SCHEMA = "ckpt-convert.adopt/1"

_EXAMPLES = """\
examples:
  ckpt-convert adopt runs/llama                            all that verify
  ckpt-convert adopt runs/llama step-0000000900.3.1        only this one

For a run whose objects under commits/ were lost, which a job refuses to go on with, and for a folder that a crash left without
its register. Every byte is verified before anything is changed; no folder is changed or removed at all.

exit codes:
  0 all were adopted, or there was nothing to adopt   1 failed, or a job holds the run   2 usage
  3 some do not verify; the others were adopted   130 interrupted
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(
        subparsers, "adopt", help="have whole checkpoints of a run count that no register names", examples=_EXAMPLES, run=run
    )
    parser.add_argument("run_path", metavar="RUN", help="folder of a run")
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help="only these folders of it; by default all")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def run(args: argparse.Namespace) -> int:
    """Adopts; the exit code."""
    from elastickpt.runs.adopting import adopt

    try:
        with byte_bar(args.run_path, shown=sys.stderr.isatty() and not args.quiet) as progress:
            report = adopt(args.run_path, folders=args.folders or None, progress=lambda _, done, total: progress(done, total))
    except CheckpointError as error:
        if args.json:
            show_json({"schema": SCHEMA, "path": args.run_path, "error": {"kind": error.kind, "message": error.message}})
        say_error(error, path=args.run_path)
        return code_of(type(error))
    if args.json:
        show_json(_json(report))
    else:
        _show(report)
    return gravest(code_of_kind(one.kind) for one in report.left)


def _show(report: AdoptReport) -> None:
    path = printable(report.path)
    lines = []
    for folder in report.adopted:
        where = "on the live branch" if folder in report.live else "abandoned"
        lines.append((Span("adopted", "green"), Span("  "), Span(f"{path}/{folder}", "bold"), Span(f"  {where}")))
    for one in report.left:
        said = f"  {printable(one.reason)} [{one.kind}]"
        lines.append((Span("left", "bold red"), Span("     "), Span(f"{path}/{one.folder}", "bold"), Span(said)))
    show(lines)
    if report.epoch:
        say(f"{path}: {plural(len(report.adopted), 'checkpoint')} adopted by epoch {report.epoch}")
    elif not report.left:
        say(f"{path}: nothing to adopt: no whole checkpoint is without a register")


def _json(report: AdoptReport) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "path": report.path,
        "epoch": report.epoch,
        "adopted": [{"folder": one, "state": "live" if one in report.live else "abandoned"} for one in report.adopted],
        "left": [{"folder": one.folder, "kind": one.kind, "message": one.reason} for one in report.left],
    }
