"""`ckpt-convert convert`: from one format, layout or naming to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elastickpt.cli.command import Subparsers, add_command
from elastickpt.cli.conversion_words import cast, mesh, number, size
from elastickpt.cli.exitcodes import DONE, FAILED, code_of
from elastickpt.cli.grid import GridLine, Span
from elastickpt.cli.output import byte_bar, say, say_error, show, show_json
from elastickpt.cli.text import nbytes_text, plural, printable, shape_text
from elastickpt.errors import CheckpointError, Refused
from elastickpt.language.shelf import name_maps, purpose

if TYPE_CHECKING:
    from elastickpt.convert.conversion import Conversion
    from elastickpt.convert.engine import Converted
    from elastickpt.convert.options import Options

SCHEMA = "ckpt-convert.convert/1"

_EXAMPLES = """\
examples:
  ckpt-convert convert megatron_run/ universal/                        what it is, is found out
  ckpt-convert convert universal/ meg/ --to megatron --mesh pp=2,tp=4  reshard for another layout
  ckpt-convert convert universal/ hf/ --to safetensors --names llama-hf --config source_hf/
  ckpt-convert convert dcp_dir/ out/ --rules my.ucl --set vocab=101 --dry-run

formats: universal, dcp, safetensors (hf), torch (plain), megatron (megatron-legacy)

name maps, each read in whichever direction fits:
{maps}

Megatron: axes are pp, tp, and v for virtual stages. Uneven, empty and virtual stages of SOURCE are found; those of OUT are
even, or --set stages=3,2,2,1 says how many layers each has. Experts need rules of your own: begin with --show-rules.

exit codes:
  0 done   1 failed, or refused by program or content   2 usage   3 damage found   4 unsupported   5 refused as unsafe
  130 interrupted
"""


def add(subparsers: Subparsers) -> None:
    """Declares the command."""
    maps = "\n".join(f"  {name:14} {purpose(name)}" for name in name_maps())
    parser = add_command(subparsers, "convert", help="convert a checkpoint", examples=_EXAMPLES.format(maps=maps), run=run)
    parser.add_argument("source", metavar="SOURCE", help="file, folder or URL of a checkpoint of any format, or RUN@STEP")
    parser.add_argument("out", metavar="OUT", help="what is made: nothing, or an empty folder, may stand there")
    parser.add_argument("--from", dest="source_format", metavar="F", help="the format of SOURCE (default: found out)")
    parser.add_argument("--to", dest="target_format", metavar="F", help="the format of OUT (default: universal)")
    parser.add_argument("--step", type=int, metavar="N", help="the step to take of a SOURCE that holds several")
    parser.add_argument(
        "--rules", metavar="FILE", help="the program of SOURCE, or of OUT where SOURCE is universal: how ranks' tensors lie"
    )
    parser.add_argument("--rules-out", metavar="FILE", help="the program of OUT where neither side is universal")
    parser.add_argument(
        "--names",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="a name map of those below, or a file; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=number,
        metavar="KEY=VALUE",
        help="a constant that no file states: vocab=101, stages=3,2,2,1",
    )
    parser.add_argument(
        "--mesh", type=mesh, default={}, metavar="AXIS=N,...", help="the sizes of OUT's axes (default: SOURCE's, else 1)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="only what matches, by SOURCE's names")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="all but what matches")
    parser.add_argument("--cast", action="append", default=[], type=cast, metavar="STATE=TYPE", help="another element type")
    parser.add_argument("--weights", choices=("value", "master"), help="where there are masters: which become the weights")
    parser.add_argument("--config", metavar="DIR", help="a folder whose config and tokenizer files go along")
    parser.add_argument("--shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a safetensors file (5GB)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work (1)")
    parser.add_argument("--show-rules", action="store_true", help="print the program that is used, and end")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, array by array; read no tensor")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def run(args: argparse.Namespace) -> int:
    """Converts; the exit code."""
    try:
        return _run(args)
    except CheckpointError as error:
        if args.json:
            show_json({"schema": SCHEMA, "source": args.source, "error": {"kind": error.kind, "message": error.message}})
        say_error(error, path=args.source)
        code = code_of(type(error))
        return FAILED if isinstance(error, Refused) else code


def _run(args: argparse.Namespace) -> int:
    from elastickpt.convert.conversion import open_source, prepare, program_in_use, read_scalar, unread_scalar
    from elastickpt.convert.engine import carry_out
    from elastickpt.language.printer import print_program

    options = options_of(args)
    if args.show_rules:
        program = program_in_use(options)
        if program is None:
            raise Refused(f"{args.source}: neither side needs a program")
        sys.stdout.write(print_program(program))
        return DONE
    source = open_source(options, scalar=unread_scalar if args.dry_run else read_scalar)
    conversion = prepare(options, source)
    if not args.quiet and not args.json:
        for text in source.contents.said:
            say(f"note: {printable(text)}")
    if args.dry_run:
        _report(args, conversion, None)
        return DONE
    with byte_bar(args.out, shown=sys.stderr.isatty() and not args.quiet) as progress:
        done = carry_out(
            conversion, progress=progress, say=lambda text: None if args.quiet else say(f"note: {printable(text)}")
        )
    _report(args, conversion, done)
    return DONE


def options_of(args: argparse.Namespace) -> Options:
    """The command line as options; a run stands for its newest checkpoint, or that of `--step`."""
    from elastickpt.convert.options import Options

    twice = [name for k, (name, _) in enumerate(args.set) if name in dict(args.set[:k])]
    if twice:
        raise Refused(f"--set {twice[0]} is given twice")
    if not 1 <= args.workers <= 256:
        raise Refused(f"--workers {args.workers}: expected 1 to 256")
    return Options(
        source=resolved(args.source, args.step),
        out=args.out,
        source_format=args.source_format,
        target_format=args.target_format,
        step=args.step,
        rules=args.rules,
        rules_out=args.rules_out,
        names=tuple(args.names),
        constants={name: value for name, value in args.set if not isinstance(value, float)},
        settings={name: value for name, value in args.set if isinstance(value, float)},
        mesh=args.mesh,
        only=tuple(args.only),
        skip=tuple(args.skip),
        casts=dict(args.cast),
        weights=args.weights,
        config=args.config,
        shard_nbytes=args.shard_size,
        workers=args.workers,
    )


def resolved(path: str, step: int | None = None) -> str:
    """The folder that a PATH of a run stands for; any other path as it is."""
    import os

    from elastickpt.runs.opening import choose, open_checkpoint

    if "://" in path or not os.path.exists(path):
        return open_checkpoint(path).path if choose(path) is not None else path
    if os.path.isdir(os.path.join(path, "commits")):
        return open_checkpoint(path, step=step).path if step is not None else open_checkpoint(f"{path}@latest").path
    return path


def _report(args: argparse.Namespace, conversion: Conversion, done: Converted | None) -> None:
    if args.json:
        show_json(_json(args, conversion, done))
        return
    if args.quiet:
        return
    if done is None:
        show(_plan_lines(conversion))
    for one in conversion.not_carried:
        say(f"not carried: {printable(one.name)}: {printable(one.reason)}")
    for note in done.notes if done else ():
        say(f"note: {printable(note)}")
    if done is not None:
        show([(Span(f"{args.out}: {conversion.target}, {plural(done.arrays, 'array')}, {nbytes_text(done.nbytes)}", ""),)])


def _plan_lines(conversion: Conversion) -> Iterator[GridLine]:
    """What would be written, array by array."""
    for one in conversion.contents.arrays.values():
        true = f", true {shape_text(one.true)}" if one.true is not None and one.true != one.node.shape else ""
        yield (Span(f"{printable(str(one.id))}  {one.node.dtype}  {shape_text(one.node.shape)}{true}", ""),)
    if conversion.form is not None:
        for plan in conversion.form.plans:
            yield (Span(f"file {printable(plan.path)}  {plural(len(plan.slots), 'tensor')}  {nbytes_text(plan.nbytes)}", ""),)


def _json(args: argparse.Namespace, conversion: Conversion, done: Converted | None) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "source": args.source,
        "out": args.out,
        "from": conversion.source.format,
        "to": conversion.target,
        "dry_run": done is None,
        "step": conversion.contents.step,
        "nbytes": conversion.nbytes,
        "resumed": done.resumed if done else 0,
        "said": [*conversion.source.contents.said, *(done.said if done else ())],
        "notes": list(done.notes) if done else [],
        "not_carried": [{"name": one.name, "reason": one.reason} for one in conversion.not_carried],
        "arrays": [
            {
                "section": one.id.section,
                "item": one.id.item,
                "name": one.id.name,
                "state": one.id.state,
                "dtype": one.node.dtype,
                "shape": list(one.node.shape),
                "true_shape": None if one.true is None else list(one.true),
            }
            for one in conversion.contents.arrays.values()
        ],
        "files": [] if conversion.form is None else [{"path": p.path, "nbytes": p.nbytes} for p in conversion.form.plans],
    }
