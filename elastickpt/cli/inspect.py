"""`ckpt-convert inspect`: what is in a checkpoint, or in a run. Reads records only, never arrays. [CLI-20..28]"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command, keep_argument
from elastickpt.cli.exitcodes import DONE, USAGE, code_of
from elastickpt.cli.output import say, say_error, screen_width, show, show_json
from elastickpt.cli.text import printable
from elastickpt.errors import CheckpointError

if TYPE_CHECKING:
    from elastickpt.cli.facts import Facts
    from elastickpt.loading.checkpoint import Checkpoint
    from elastickpt.runs.opening import RunAt

SCHEMA = "ckpt-convert.inspect/1"

_EXAMPLES = """\
examples:
  ckpt-convert inspect out/run/step-0000000100
  ckpt-convert inspect step-100 --name '*.attn.*' --name 'head.weight/exp_avg'
  ckpt-convert inspect step-100 --format table | less -S
  ckpt-convert inspect step-100 --writers --values
  ckpt-convert inspect step-100 --json | jq '.arrays[] | select(.nbytes > 1e9) | .name'
  ckpt-convert inspect s3://bucket/run/step-100
  ckpt-convert inspect runs/llama                       the checkpoints of a run
  ckpt-convert inspect runs/llama --epochs --keep last=3,every=1000,best=loss:2:min
  ckpt-convert inspect runs/llama@900                   step 900 of its live branch; @900.3 of epoch 3, @latest
"""

# What a run has no part of, and what only a run has: the attribute of each option, and its value where it was not given.
_OF_CHECKPOINTS: dict[str, object] = {
    "format": "tree",
    "all": False,
    "name": [],
    "values": False,
    "writers": False,
    "fragments": False,
}
_OF_RUNS: dict[str, object] = {"keep": None, "epochs": False}


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(subparsers, "inspect", help="say what is in a checkpoint or a run", examples=_EXAMPLES, run=run)
    parser.add_argument("path", metavar="PATH", help="folder or URL of a checkpoint or a run, or RUN@STEP")
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
    parser.add_argument("--keep", type=keep_argument, metavar="RULES", help="of a run: say what these rules would keep")
    parser.add_argument("--epochs", action="store_true", help="of a run: also show who claimed it, and when")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def run(args: argparse.Namespace) -> int:
    """Shows the checkpoint or the run; the exit code."""
    from elastickpt.loading.checkpoint import Checkpoint
    from elastickpt.runs.opening import open_path

    try:
        found = open_path(args.path)
        wrong = _misplaced(args, found)
        if wrong:
            say(f"error: {printable(args.path)}: {wrong}")
            return USAGE
        return _show_checkpoint(args, found) if isinstance(found, Checkpoint) else _show_run(args, found)
    except CheckpointError as error:
        if args.json:
            show_json({"schema": SCHEMA, "path": args.path, "error": {"kind": error.kind, "message": error.message}})
        say_error(error, path=args.path)
        return code_of(type(error))


def _misplaced(args: argparse.Namespace, found: Checkpoint | RunAt) -> str:
    """Options that were given and are of the other kind, and what they are of; "" for none. [CLI-28]"""
    from elastickpt.loading.checkpoint import Checkpoint

    options, of = _OF_CHECKPOINTS, "of a checkpoint, and this is a run: name one with RUN@STEP"
    if isinstance(found, Checkpoint):
        options, of = _OF_RUNS, "of a run, and this is a checkpoint"
    given = [f"--{name}" for name, absent in options.items() if getattr(args, name) != absent]
    return f"{', '.join(given)}: {of}" if given else ""


def _show_run(args: argparse.Namespace, found: RunAt) -> int:
    from elastickpt.cli.run_facts import run_facts
    from elastickpt.cli.run_json import run_json
    from elastickpt.cli.run_text import run_lines

    facts = run_facts(found, now=time.time(), keep=args.keep, epochs=args.epochs)
    if args.json:
        show_json(run_json(facts))
    else:
        show(list(run_lines(facts, width=screen_width())))
    return facts.code


def _show_checkpoint(args: argparse.Namespace, found: Checkpoint) -> int:
    from elastickpt.cli.facts import Facts

    facts = Facts(found, names=args.name)
    (_show_json if args.json else _show_text)(args, facts)
    if not facts.arrays and args.name:
        say(f"note: no array matches {printable(' or '.join(args.name))}")
    return DONE


def _show_json(args: argparse.Namespace, facts: Facts) -> None:
    from elastickpt.cli import inspect_json

    found = {"schema": SCHEMA, "path": args.path, "place": facts.place, **inspect_json.checkpoint_json(facts)}
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
