"""`ckpt-convert inspect`: what is in a checkpoint. Reads records only, never arrays. [CLI-20..24]"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.exitcodes import DONE, code_of
from elastickpt.cli.output import say, say_error, screen_width, show, show_json
from elastickpt.cli.text import printable
from elastickpt.errors import CheckpointError

if TYPE_CHECKING:
    from elastickpt.cli.facts import Facts

SCHEMA = "ckpt-convert.inspect/1"

_EXAMPLES = """\
examples:
  ckpt-convert inspect out/run/step-0000000100
  ckpt-convert inspect step-100 --name '*.attn.*' --name 'head.weight/exp_avg'
  ckpt-convert inspect step-100 --format table | less -S
  ckpt-convert inspect step-100 --writers --values
  ckpt-convert inspect step-100 --json | jq '.arrays[] | select(.nbytes > 1e9) | .name'
  ckpt-convert inspect s3://bucket/run/step-100
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(subparsers, "inspect", help="say what is in a checkpoint", examples=_EXAMPLES, run=run)
    parser.add_argument("path", metavar="PATH", help="folder or URL of a checkpoint")
    parser.add_argument("--format", choices=("tree", "table"), default="tree", help="how to show arrays (default: tree)")
    parser.add_argument("--all", action="store_true", help="in a tree, show equal numbered siblings one by one")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="GLOB",
        help="only arrays whose name matches, with or without item and state; may be repeated",
    )
    parser.add_argument("--values", action="store_true", help="also show plain values, each rank's own too")
    parser.add_argument("--writers", action="store_true", help="also show what each rank wrote")
    parser.add_argument("--fragments", action="store_true", help="also show every stored piece: who, which box, where")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def run(args: argparse.Namespace) -> int:
    """Shows the checkpoint; the exit code."""
    from elastickpt.cli.facts import Facts
    from elastickpt.load.checkpoint import open_checkpoint

    try:
        facts = Facts(open_checkpoint(args.path), names=args.name)
        (_show_json if args.json else _show_text)(args, facts)
    except CheckpointError as error:
        if args.json:
            show_json({"schema": SCHEMA, "path": args.path, "error": {"kind": error.kind, "message": error.message}})
        say_error(error, path=args.path)
        return code_of(type(error))
    if not facts.arrays and args.name:
        say(f"note: no array matches {printable(' or '.join(args.name))}")
    return DONE


def _show_json(args: argparse.Namespace, facts: Facts) -> None:
    from elastickpt.cli import inspect_json

    found = {"schema": SCHEMA, "path": args.path, **inspect_json.checkpoint_json(facts)}
    if args.values:
        found |= inspect_json.values_json(facts)
    if args.writers:
        found |= inspect_json.writers_json(facts)
    if args.fragments:
        found |= inspect_json.fragments_json(facts)
    show_json(found)


def _show_text(args: argparse.Namespace, facts: Facts) -> None:
    from elastickpt.cli import inspect_text

    width = screen_width()
    lines = list(inspect_text.header(args.path, facts, width=width))
    lines.append(())
    if args.format == "table":
        lines += inspect_text.array_table(facts, width=width)
    else:
        lines += inspect_text.array_tree(facts, collapse=not args.all, width=width)
    lines += inspect_text.optimizer_lines(facts, width=width)
    if args.values:
        lines += inspect_text.value_lines(facts, width=width)
    if args.writers:
        lines += inspect_text.writer_lines(facts, width=width)
    if args.fragments:
        lines += inspect_text.fragment_lines(facts, width=width)
    show(lines)  # only now, so that damage found on the way leaves no half of an answer [CLI-24]
