"""Rules of retention as words: `last=3,every=1000,best=loss:2:min`. What is written reads back. [RUN-65]"""

from __future__ import annotations

from typing import cast

from elastickpt.errors import Refused
from elastickpt.ledger.retention import Best, Keep, Mode

ALL = "all"
_NAMES = "last=N, every=N, best=METRIC[:N[:min|max]], max_age_s=SECONDS, max_nbytes=N"
EXPECTED = f"expected {ALL}, or some of {_NAMES}, with commas between"


def words_of(keep: Keep) -> str:
    """The rules in words, in one way only; `keep_of` makes the same rules of them."""
    words = [f"{name}={value}" for name, value in (("last", keep.last), ("every", keep.every)) if value is not None]
    if keep.best is not None:
        words.append(f"best={_escaped(keep.best.metric)}:{keep.best.n}:{keep.best.mode}")
    if keep.max_age_s is not None:
        words.append(f"max_age_s={float(keep.max_age_s)!r}")
    if keep.max_nbytes is not None:
        words.append(f"max_nbytes={keep.max_nbytes}")
    return ",".join(words) or ALL


def keep_of(text: str) -> Keep:
    """The rules that the words say. Raises Refused for words that say none."""
    if text == ALL:
        return Keep()
    words: dict[str, str] = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals or name in words:
            raise Refused(f"{word!r}: {EXPECTED}")
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
        raise Refused(f"{text!r}: {problem}; {EXPECTED}") from None
    if words:
        raise Refused(f"{', '.join(words)}: {EXPECTED}")
    return keep


def _int(value: str | None) -> int | None:
    return None if value is None else int(value)


def _best(value: str | None) -> Best | None:
    """ "loss", "loss:2" or "loss:2:max"; names of metrics may have colons of their own before these."""
    if value is None:
        return None
    mode = "min"
    if value.endswith((":min", ":max")):
        value, _, mode = value.rpartition(":")
    metric, colon, n = value.rpartition(":")
    if not colon or not n.isdecimal():
        return Best(_unescaped(value), 1, cast("Mode", mode))
    return Best(_unescaped(metric), int(n), cast("Mode", mode))


def _escaped(metric: str) -> str:
    """A comma would end the word."""
    return metric.replace("%", "%25").replace(",", "%2C")


def _unescaped(text: str) -> str:
    return text.replace("%2C", ",").replace("%25", "%")
