"""How a command declares itself to the parser, and the arguments that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from elastickpt.errors import Refused

if TYPE_CHECKING:
    from elastickpt.ledger.retention import Keep

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    subparsers: Subparsers, name: str, *, help: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """The parser of a new command; `run` carries it out and gives the exit code."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def keep_argument(text: str) -> Keep:
    """The rules that the words say. Raises argparse's error for bad usage."""
    from elastickpt.ledger.retention import keep_of

    try:
        return keep_of(text)
    except Refused as problem:
        raise argparse.ArgumentTypeError(problem.message) from None
