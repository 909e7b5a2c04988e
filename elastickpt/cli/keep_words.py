"""Rules of retention as words of a command line: `last=3,every=1000,best=loss:2:min`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from elastickpt.errors import Refused

if TYPE_CHECKING:
    from elastickpt.runs.retention import Best, Keep, Mode

EXPECTED = "expected some of last=N, every=N, best=METRIC[:N[:min|max]], max_age_s=SECONDS, max_nbytes=N, with commas between"


def keep_of(text: str) -> Keep:
    """The rules that the words say. Raises argparse's error for bad usage."""
    from elastickpt.runs.retention import Keep

    words: dict[str, str] = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals or name in words:
            raise argparse.ArgumentTypeError(f"{word!r}: {EXPECTED}")
        words[name] = value
    try:
        keep = Keep(
            last=_int(words.pop("last", None)),
            every=_int(words.pop("every", None)),
            best=_best(words.pop("best", None)),
            max_age_s=float(words.pop("max_age_s")) if "max_age_s" in words else None,
            max_nbytes=_int(words.pop("max_nbytes", None)),
        )
    except (ValueError, Refused) as problem:
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}; {EXPECTED}") from None
    if words:
        raise argparse.ArgumentTypeError(f"{', '.join(words)}: {EXPECTED}")
    return keep


def _int(value: str | None) -> int | None:
    return None if value is None else int(value)


def _best(value: str | None) -> Best | None:
    """ "loss", "loss:2" or "loss:2:max"; names of metrics may have colons of their own before these."""
    from elastickpt.runs.retention import Best

    if value is None:
        return None
    mode = "min"
    if value.endswith((":min", ":max")):
        value, _, mode = value.rpartition(":")
    metric, colon, n = value.rpartition(":")
    if not colon or not n.isdecimal():
        return Best(value, 1, cast("Mode", mode))
    return Best(metric, int(n), cast("Mode", mode))
