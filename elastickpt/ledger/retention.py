"""Which commits of a run are kept, and why; and the rules as words. Decides only; `removal` does. [RUN-65, RUN-80..87]

1. Rules walk the live branch, newest first, and pass over damaged ones, which take no good one's place.
2. No rule given: all are kept.
3. The newest good one is kept whatever the rules and limits say; so is the newest that was verified.
4. An abandoned commit is kept until the live branch has a good commit at its step or above: before that nobody has got as far.
   A damaged or broken one is kept while it is newer than the newest good one.
5. Then limits: what is older than `max_age_s` goes; while the rest is above `max_nbytes`, abandoned ones go, then live ones by
   rising step, those kept as best last.

Words: `last=3,every=1000,best=loss:2:min`. What is written reads back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal, cast, get_args

from elastickpt.errors import Refused
from elastickpt.ledger.branch import CommitEntry
from elastickpt.ledger.names import AttemptId

BestMode = Literal["min", "max"]


def _require_count(name: str, value: int | None) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise Refused(f"{name}={value!r}: expected None or an integer from 1 on")


def _is_text(value: str) -> bool:
    """Whether a record can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Best:
    """The `n` checkpoints with the least or the greatest value of a metric; NaN is no value.

    Args:
        metric: Its name in `Run.save(metrics=...)`.
        n: How many.
        mode: "min" or "max".

    Raises:
        Refused: A value means nothing.

    Examples:
        >>> keep = ek.Keep(last=1, best=ek.Best("accuracy", n=3, mode="max"))
    """

    metric: str
    n: int = 1
    mode: BestMode = "min"

    def __post_init__(self) -> None:
        if type(self.metric) is not str or not _is_text(self.metric):
            raise Refused(f"Best metric {self.metric!r}: expected the name of a metric")
        _require_count("Best n", self.n)
        if self.mode not in get_args(BestMode):
            raise Refused(f"Best mode {self.mode!r}: expected 'min' or 'max'")


@dataclass(frozen=True, slots=True)
class Keep:
    """What of a run is kept; a checkpoint goes when no rule names it. The newest good one always stays.

    Args:
        last: The newest ones, so many.
        every: Those of steps that are divisible by it.
        best: The best by a metric.
        max_age_s: Nothing that is older, in seconds.
        max_nbytes: Not more bytes in all: the oldest go first, the best last.

    Raises:
        Refused: A value means nothing.

    Examples:
        >>> keep = ek.Keep(last=3, every=1000, max_nbytes=2_000_000_000_000)
    """

    last: int | None = None
    every: int | None = None
    best: Best | None = None
    max_age_s: float | None = None
    max_nbytes: int | None = None

    def __post_init__(self) -> None:
        _require_count("Keep last", self.last)
        _require_count("Keep every", self.every)
        _require_count("Keep max_nbytes", self.max_nbytes)
        if self.max_age_s is not None and not self.max_age_s > 0:
            raise Refused(f"Keep max_age_s={self.max_age_s!r}: expected None or seconds above 0")


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a commit is kept; `reasons` say why, or why not, and are never empty."""

    id: AttemptId
    kept: bool
    reasons: tuple[str, ...]


def judge(
    keep: Keep,
    entries: Sequence[CommitEntry],
    *,
    now: float,
    verified: Mapping[AttemptId, bool],
    in_use: Collection[AttemptId] = (),
) -> tuple[Judgement, ...]:
    """A verdict for each of the entries, which are as `history` returns them, in their order.

    `now` in seconds since 1970; `verified`: what is known of checkpoints that were read whole, good or damaged; `in_use`: being
    loaded, or read from, at this moment.
    """
    return _Judgement(keep, entries, now, verified, in_use).verdicts()


def removable(verdicts: Sequence[Judgement]) -> tuple[AttemptId, ...]:
    """Those that are not kept, oldest first."""
    return tuple(sorted(verdict.id for verdict in verdicts if not verdict.kept))


class _Judgement:
    def __init__(
        self,
        keep: Keep,
        entries: Sequence[CommitEntry],
        now: float,
        verified: Mapping[AttemptId, bool],
        in_use: Collection[AttemptId],
    ) -> None:
        self.keep, self.entries, self.now, self.verified = keep, entries, now, verified
        live = sorted((one for one in entries if one.state == "live"), key=lambda one: one.step, reverse=True)
        self.live = live
        self.good = [one for one in live if one.commit is not None and verified.get(one.id, True)]
        self.reasons: dict[AttemptId, list[str]] = {one.id: [] for one in entries}
        self.against: dict[AttemptId, str] = {}
        self.bound = {one.id for one in self.good[:1]} | {one.id for one in entries if one.id in in_use}
        self.bound |= {one.id for one in [one for one in self.good if verified.get(one.id)][:1]}
        for one in entries:
            if one.id in in_use:
                self.reasons[one.id].append("in use")

    def verdicts(self) -> tuple[Judgement, ...]:
        self._rules()
        self._good_ones()
        self._aside()
        self._limits()
        return tuple(self._verdict(one.id) for one in self.entries)

    def _verdict(self, attempt: AttemptId) -> Judgement:
        if attempt in self.against:
            return Judgement(attempt, False, (self.against[attempt],))
        reasons = self.reasons[attempt]
        return Judgement(attempt, bool(reasons), tuple(reasons) or ("no rule keeps it",))

    def _rules(self) -> None:
        keep = self.keep
        if keep.last is None and keep.every is None and keep.best is None:
            for one in self.entries:
                self.reasons[one.id].append("no rule given: all are kept")
            return
        for one in self.good[: keep.last or 0]:
            self.reasons[one.id].append(f"last {keep.last}")
        for one in self.good:
            if keep.every is not None and one.step % keep.every == 0:
                self.reasons[one.id].append(f"every {keep.every}")
        if keep.best is not None:
            for one in best_of(keep.best, self.good):
                self.reasons[one.id].append(f"best {keep.best.n} by {keep.best.metric} ({keep.best.mode})")

    def _good_ones(self) -> None:
        for one in self.good[:1]:
            self.reasons[one.id].insert(0, "newest")
        for one in [one for one in self.good if self.verified.get(one.id)][:1]:
            self.reasons[one.id].append("newest that was verified")

    def _aside(self) -> None:
        reached = self.good[0].step if self.good else -1
        for one in self.entries:
            damaged = one.commit is None or not self.verified.get(one.id, True)
            if one.step > reached and one.state == "abandoned":
                self.reasons[one.id].append("abandoned; the live branch has not reached its step")
            elif one.step > reached and damaged:
                self.reasons[one.id].append("damaged; nothing newer is good")

    def _limits(self) -> None:
        keep = self.keep
        kept = [one for one in self.entries if self.reasons[one.id]]
        for one in kept:
            if keep.max_age_s is not None and one.time is not None and self.now - one.time > keep.max_age_s:
                self._drop(one, f"older than {keep.max_age_s:g} s")
        if keep.max_nbytes is None:
            return
        kept = [one for one in kept if one.id not in self.against]
        total = sum(one.nbytes or 0 for one in kept)
        best = {one.id for one in best_of(keep.best, self.good)} if keep.best is not None else set()
        for one in sorted(kept, key=lambda one: (one.id in best, one.state == "live", one.id)):
            if total <= keep.max_nbytes:
                break
            if self._drop(one, f"above {keep.max_nbytes} bytes in all"):
                total -= one.nbytes or 0

    def _drop(self, one: CommitEntry, why: str) -> bool:
        if one.id in self.bound:
            return False
        self.against[one.id] = why
        return True


def best_of(best: Best, entries: Sequence[CommitEntry]) -> tuple[CommitEntry, ...]:
    """The best of the entries by a metric, best first; of equal ones the newer. Those without a value are none."""
    sign = 1.0 if best.mode == "min" else -1.0
    valued = [(sign * value, -one.step, one) for one in entries for name, value in one.metrics if name == best.metric]
    ranked = sorted((found for found in valued if not isnan(found[0])), key=lambda found: found[:2])
    return tuple(one for _, _, one in ranked[: best.n])


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
        return Best(_unescaped(value), 1, cast("BestMode", mode))
    return Best(_unescaped(metric), int(n), cast("BestMode", mode))


def _escaped(metric: str) -> str:
    """A comma would end the word."""
    return metric.replace("%", "%25").replace(",", "%2C")


def _unescaped(text: str) -> str:
    return text.replace("%2C", ",").replace("%25", "%")
