"""`ckpt-convert`. What a command needs is imported when it runs, so that `--help` comes at once. [CLI-4, CLI-12]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from elastickpt.cli import adopt, check, convert, diff, inspect, references, verify
from elastickpt.cli.exitcodes import FAILED, INTERRUPTED, PIPE_CLOSED
from elastickpt.cli.output import discard_stdout, prepare, say
from elastickpt.format.version import RELEASE

_EXAMPLES = """\
examples:
  ckpt-convert inspect out/run/step-0000000100         what is in it
  ckpt-convert verify out/run/step-0000000100          whether it is whole
  ckpt-convert inspect runs/llama                      the checkpoints of a run
  ckpt-convert convert megatron_run/ universal/        convert it
  ckpt-convert diff step-100 step-200                  compare two
  ckpt-convert inspect --help                          more about a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one command line; the exit code of spec/cli.md. Errors of this library are told, not raised."""
    prepare()
    try:
        arguments = parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
    except SystemExit as end:  # of argparse: 0 after --help, 2 for bad usage
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return PIPE_CLOSED
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    found = argparse.ArgumentParser(
        prog="ckpt-convert",
        description="Look into checkpoints, check, convert and compare them; have a run count those whose registers it lost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {RELEASE}")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspect.add(commands)
    verify.add(commands)
    adopt.add(commands)
    convert.add(commands)
    diff.add(commands)
    check.add(commands)
    references.add(commands)
    return found
