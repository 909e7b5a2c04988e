"""`--keep`: rules of retention on a command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from elastickpt.errors import Refused

if TYPE_CHECKING:
    from elastickpt.ledger.retention import Keep


def keep_argument(text: str) -> Keep:
    """The rules that the words say. Raises argparse's error for bad usage."""
    from elastickpt.ledger.retention import keep_of

    try:
        return keep_of(text)
    except Refused as problem:
        raise argparse.ArgumentTypeError(problem.message) from None
