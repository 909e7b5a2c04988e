"""`ckpt-convert references`: where readers of zarr find the chunks of a packed checkpoint. [CLI-45, CLI-46]"""

from __future__ import annotations

import argparse
import os
import sys

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.exitcodes import DONE, FAILED, code_of
from elastickpt.cli.output import say, say_error
from elastickpt.cli.text import plural, printable
from elastickpt.errors import CheckpointError

_EXAMPLES = """\
examples:
  ckpt-convert references out/step-100 -o refs.json
  ckpt-convert references out/step-100 | gzip > refs.json.gz

A save writes references.json into a packed checkpoint itself, up to 1,000 arrays and 20,000 chunks. With zarr-python:
  zarr.open_group("reference://", mode="r", storage_options={"fo": "refs.json", "remote_protocol": "file"})

exit codes:
  0 written   1 failed, or FILE is there   2 usage   3 damage found   130 interrupted
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    help = "write references to the chunks of a packed checkpoint, for readers of zarr"
    parser = add_command(subparsers, "references", help=help, examples=_EXAMPLES, run=run)
    parser.add_argument("path", metavar="PATH", help="folder or URL of a packed checkpoint")
    parser.add_argument("-o", "--output", metavar="FILE", help="a new file; by default stdout")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Makes the references; the exit code."""
    from elastickpt.loading.refer import refer

    try:
        made = refer(args.path, within=os.path.dirname(os.path.abspath(args.output)) if args.output else "")
        if not args.dry_run:
            _write(made.text, args.output)
    except CheckpointError as error:
        say_error(error, path=args.path)
        return code_of(type(error))
    except OSError as error:
        say(f"error: {printable(str(error))}")
        return FAILED
    say(f"{args.path}: references to {plural(made.arrays, 'array')}{', not written' if args.dry_run else ''}")
    for key in made.left_out:
        say(f"left out: {printable(key)}: a chunk of it lies in several packs")
    return DONE


def _write(text: str, output: str | None) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    with open(output, "x", encoding="ascii") as file:
        file.write(text)
