"""`ckpt-convert diff`: how two checkpoints differ, across layouts, names and formats."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.conversion_words import constant
from elastickpt.cli.convert import resolved
from elastickpt.cli.exitcodes import DIFFERENT, DONE, FAILED, code_of
from elastickpt.cli.grid import GridLine, Span
from elastickpt.cli.output import byte_bar, say, say_error, show, show_json
from elastickpt.cli.text import printable
from elastickpt.errors import CheckpointError, Refused

if TYPE_CHECKING:
    from elastickpt.convert.comparing import Difference, Side

SCHEMA = "ckpt-convert.diff/1"

_EXAMPLES = """\
examples:
  ckpt-convert diff step-100 step-200
  ckpt-convert diff megatron_run/ universal/
  ckpt-convert diff universal/ hf/ --names llama-hf

exit codes:
  0 equal   1 failed   2 usage   3 damage found   4 unsupported   5 refused as unsafe   6 different   130 interrupted
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    parser = add_command(subparsers, "diff", help="compare two checkpoints", examples=_EXAMPLES, run=run)
    parser.add_argument("a", metavar="A", help="file, folder or URL of a checkpoint of any format, or RUN@STEP")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--names", action="append", default=[], metavar="NAME|FILE", help="a name map for A; may be repeated")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="only what matches, on both sides")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="all but what matches, on both sides")
    parser.add_argument("--set", action="append", default=[], type=constant, metavar="KEY=VALUE", help="a constant")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Compares; the exit code."""
    from elastickpt.convert.comparing import compare

    path = args.a
    try:
        first = _side(args, args.a, args.names)
        path = args.b
        second = _side(args, args.b, [])
        if first.weights_only or second.weights_only:
            say("note: safetensors hold weights only: nothing else is compared")
        with byte_bar(f"{args.a} {args.b}", shown=sys.stderr.isatty() and not args.quiet) as progress:
            found = list(compare(first, second, progress=progress))
    except CheckpointError as error:
        if args.json:
            show_json({"schema": SCHEMA, "a": args.a, "b": args.b, "error": {"kind": error.kind, "message": error.message}})
        say_error(error, path=path)
        return FAILED if isinstance(error, Refused) else code_of(type(error))
    if args.json:
        show_json({"schema": SCHEMA, "a": args.a, "b": args.b, "differences": [_json(one) for one in found]})
    else:
        show(_lines(found, len(first.contents.arrays)))
    return DIFFERENT if found else DONE


def _side(args: argparse.Namespace, path: str, names: list[str]) -> Side:
    from elastickpt.convert.comparing import Side
    from elastickpt.convert.contents import selected
    from elastickpt.convert.conversion import names_of, open_source
    from elastickpt.convert.names import apply_names
    from elastickpt.convert.options import Options
    from elastickpt.convert.refining import with_masters

    only, skip, given = tuple(args.only), tuple(args.skip), dict(args.set)
    source = open_source(Options(resolved(path), "", only=only, skip=skip, constants=given))
    contents = with_masters(source.contents, None)
    contents = selected(contents, only, skip)
    for name in names:
        contents, _ = apply_names(contents, names_of(name), source.facts, given)
    return Side(contents, source.reading, weights_only=source.format == "safetensors")


def _lines(found: list[Difference], arrays: int) -> Iterator[GridLine]:
    for one in found:
        text = f"{printable(one.name)}: {one.what}: {printable(one.a) or '-'} | {printable(one.b) or '-'}"
        if one.index is not None:
            text += f" at {list(one.index)}, at most {one.max_abs:.3g} apart, {one.max_rel:.3g} of the greater"
        yield (Span(text, ""),)
    yield (Span(f"{len(found)} differences" if found else f"equal: {arrays} arrays, settings and values", "bold"),)


def _json(one: Difference) -> dict[str, object]:
    numbers = [None if n is None or n != n or abs(n) == float("inf") else n for n in (one.max_abs, one.max_rel)]
    return {
        "name": one.name,
        "what": one.what,
        "a": one.a,
        "b": one.b,
        "max_abs": numbers[0],
        "max_rel": numbers[1],
        "index": None if one.index is None else list(one.index),
    }
