"""`ckpt-convert check`: whether a program or a name map is right, by itself and against checkpoints."""

from __future__ import annotations

import argparse
import sys

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.conversion_words import constant, mesh
from elastickpt.cli.convert import resolved
from elastickpt.cli.exitcodes import DIFFERENT, DONE, FAILED, code_of
from elastickpt.cli.grid import Span
from elastickpt.cli.output import byte_bar, say_error, show, show_json
from elastickpt.cli.text import printable
from elastickpt.errors import CheckpointError, Refused

SCHEMA = "ckpt-convert.check/1"

_EXAMPLES = """\
examples:
  ckpt-convert check my.ucl
  ckpt-convert check my.ucl --against megatron_run/ --set vocab=101
  ckpt-convert check my.ucl --against tp2/ --against tp4/      one step at two degrees: the wholes must be equal

exit codes:
  0 right   1 errors in the program, or failed   2 usage   3 to 5 as convert   6 the wholes differ   130 interrupted
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(subparsers, "check", help="check a program of the language", examples=_EXAMPLES, run=run)
    parser.add_argument("file", metavar="FILE", help="a program or a name map, or the name of a shipped one")
    parser.add_argument("--against", action="append", default=[], metavar="PATH", help="a checkpoint; may be repeated")
    parser.add_argument("--set", action="append", default=[], type=constant, metavar="KEY=VALUE", help="a constant")
    parser.add_argument("--mesh", type=mesh, default={}, metavar="AXIS=N,...", help="sizes of axes")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Checks; the exit code."""
    try:
        found = _check(args)
    except CheckpointError as error:
        if args.json:
            problem = {"kind": error.kind, "message": error.message}
            show_json({"schema": SCHEMA, "file": args.file, "right": False, "error": problem, "differences": []})
        say_error(error, path=args.file)
        return FAILED if isinstance(error, Refused) else code_of(type(error))
    if args.json:
        show_json({"schema": SCHEMA, "file": args.file, "right": not found, "error": None, "differences": found})
    else:
        show([(Span(printable(one), ""),) for one in found] or [(Span(f"{printable(args.file)}: right", ""),)])
    return DIFFERENT if found else DONE


def _check(args: argparse.Namespace) -> list[str]:
    """What differs between the wholes. Raises ProgramFault kinds for what is wrong with the program."""
    from elastickpt.convert.checking import check_against, check_alone

    check_alone(args.file, dict(args.set), args.mesh)
    if not args.against:
        return []
    paths = [resolved(path) for path in args.against]
    with byte_bar(args.file, shown=sys.stderr.isatty() and not args.quiet) as progress:
        return check_against(args.file, paths, dict(args.set), progress=progress)
