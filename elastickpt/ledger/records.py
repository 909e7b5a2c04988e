"""The small objects under `commits/`, as values and as bytes: canonical JSON that ends with its own digest. [RUN-10..19]

Each is created once, whole, and never rewritten. Each repeats what its name says, so that one under another's name is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from elastickpt.errors import LimitExceeded, Malformed, Refused
from elastickpt.format.canonical_json import parse
from elastickpt.format.decode_values import decode_value
from elastickpt.format.digest import check_seal, seal
from elastickpt.format.encode_fragments import check_version
from elastickpt.format.encode_values import encode_value
from elastickpt.format.records import FORMAT_VERSION
from elastickpt.format.strict_reading import StrictObject, text
from elastickpt.format.values import as_real, described
from elastickpt.format.version import MAX_FILE_NBYTES, MAX_MANIFEST_NBYTES
from elastickpt.ledger.names import MAX_NUMBER, AttemptId, adopted_name, claim_name, found_name, parse_id, start_name

MAX_OBJECT_NBYTES = MAX_MANIFEST_NBYTES  # an adopted object may list 10^6 commits; the others are small

Metrics = tuple[tuple[str, float], ...]  # by name
_KIND = re.compile("[a-z]+(-[a-z]+)*")


@dataclass(frozen=True, slots=True)
class Claimer:
    """Who claims: where its trainer answers and with which token, its host, process id and when that process started, in the
    host's clock ticks. `time` of the claim in seconds since 1970. The token is new for each claim."""

    address: str
    token: str
    host: str
    pid: int
    start: int
    time: float


@dataclass(frozen=True, slots=True)
class Claim:
    epoch: int
    by: Claimer


@dataclass(frozen=True, slots=True)
class Adopted:
    """Which commits of older epochs count from this epoch on; `below` is the epoch whose commits were added, 0 for none."""

    epoch: int
    token: str
    below: int
    commits: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class Void:
    """The epoch was closed by a newer claim before it adopted anything."""

    epoch: int
    by: int


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A commit that a restore did not take, and the error for which it did not."""

    id: AttemptId
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a restore found out about the commits that it looked at: whether it verified what it loaded, and what it passed
    over, each commit once. `time` in seconds since 1970."""

    time: float
    verified: bool
    passed: tuple[PassedOver, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochStart:
    """The commit that an epoch continued from; None: from nothing. `keep`: its job's rules of retention, in words; `found`:
    what its restore found out. None where the writer of the object did not say."""

    epoch: int
    continued: AttemptId | None
    keep: str | None = None
    found: Found | None = None


@dataclass(frozen=True, slots=True)
class CommitRegister:
    """A register that says: this checkpoint exists. `digest` is that of its manifest; `nbytes` of its arrays;
    `time` in seconds since 1970; `metrics` known at the commit."""

    id: AttemptId
    digest: str
    nbytes: int
    time: float
    metrics: Metrics = ()


@dataclass(frozen=True, slots=True)
class AbortRegister:
    """A register that says: this attempt never will be a checkpoint."""

    id: AttemptId
    reason: str


@dataclass(frozen=True, slots=True)
class LaterMetrics:
    """Metrics of a commit that became known after it; `number` counts them, a higher one overrides."""

    id: AttemptId
    number: int
    metrics: Metrics


def metrics_of(values: Iterable[tuple[str, object]]) -> Metrics:
    """Metrics by name, each once. Raises Refused for a value that is no number, or has a dimension."""
    found: dict[str, float] = {}
    for name, value in values:
        number = as_real(value)
        if type(name) is not str or number is None:
            raise Refused(f"metric {name!r}: expected a name and a number without a dimension, found {described(value)}")
        found[name] = number
    return tuple(sorted(found.items()))


# -- bytes -----------------------------------------------------------------------------------------------------------------


def encode_claim(claim: Claim) -> bytes:
    by = claim.by
    about = {"address": by.address, "token": by.token, "host": by.host, "pid": by.pid, "start": by.start, "time": by.time}
    data = _seal("claim", {"epoch": claim.epoch, **about})
    decode_claim(data, epoch=claim.epoch)
    return data


def decode_claim(data: bytes, *, epoch: int) -> Claim:
    """A claim under the name of `epoch`. Raises Damaged kinds, Unsupported; so do the functions below for theirs."""
    members = _open(data, "claim", where=claim_name(epoch))
    _same(members, "epoch", epoch)
    by = Claimer(
        address=members.text("address"),
        token=members.text("token"),
        host=members.text("host"),
        pid=members.integer("pid"),
        start=members.integer("start"),
        time=_time(members),
    )
    members.close()
    return Claim(epoch, by)


def encode_adopted(adopted: Adopted | Void) -> bytes:
    if isinstance(adopted, Void):
        return _seal("adopted", {"epoch": adopted.epoch, "void": True, "by": adopted.by})
    about = {"epoch": adopted.epoch, "void": False, "token": adopted.token, "below": adopted.below}
    data = _seal("adopted", {**about, "commits": [str(one) for one in adopted.commits]})
    decode_adopted(data, epoch=adopted.epoch)
    return data


def decode_adopted(data: bytes, *, epoch: int) -> Adopted | Void:
    members = _open(data, "adopted", where=adopted_name(epoch))
    _same(members, "epoch", epoch)
    void = members.take("void")
    if void is True:
        found = Void(epoch, members.integer("by", low=epoch + 1, high=MAX_NUMBER))
        members.close()
        return found
    if void is not False:
        raise Malformed(f"{members.where}/void: expected true or false")
    token, below = members.text("token"), members.integer("below", high=epoch - 1)
    commits = tuple(_id(one, where=f"{members.where}/commits") for one in members.texts("commits"))
    members.close()
    if any(one.epoch > below for one in commits) or list(commits) != sorted(set(commits)):  # [RUN-15]
        raise Malformed(f"{members.where}/commits: expected commits of epochs up to {below}, rising, each once")
    return Adopted(epoch, token, below, commits)


def encode_start(start: EpochStart) -> bytes:
    about: dict[str, object] = {"epoch": start.epoch, "continued": None if start.continued is None else str(start.continued)}
    if start.keep is not None:
        about["keep"] = start.keep
    if start.found is not None:
        about["found"] = _of_found(start.found)
    data = _seal("start", about)
    decode_start(data, epoch=start.epoch)
    return data


def decode_start(data: bytes, *, epoch: int) -> EpochStart:
    members = _open(data, "start", where=start_name(epoch))
    _same(members, "epoch", epoch)
    told = members.take("continued")
    continued = (
        None if told is None else _older(told, epoch, where=f"{members.where}/continued")
    )  # [RUN-16] chains of starts end
    keep = members.text("keep") if members.has("keep") else None  # [RUN-65]
    found = _found(members.members("found"), epoch, continued) if members.has("found") else None
    members.close()
    return EpochStart(epoch, continued, keep, found)


def encode_nothing_loaded(epoch: int, found: Found) -> bytes:
    """Of an epoch that did not start, as nothing loaded. [RUN-69]"""
    data = _seal("found", {"epoch": epoch, "found": _of_found(found)})
    decode_nothing_loaded(data, epoch=epoch)
    return data


def decode_nothing_loaded(data: bytes, *, epoch: int) -> Found:
    members = _open(data, "found", where=found_name(epoch))
    _same(members, "epoch", epoch)
    found = _found(members.members("found"), epoch, None)
    members.close()
    return found


def _of_found(found: Found) -> dict[str, object]:
    passed = [{"id": str(one.id), "kind": one.kind, "message": one.message} for one in found.passed]
    return {"time": found.time, "verified": found.verified, "passed": passed}


def _found(members: StrictObject, epoch: int, continued: AttemptId | None) -> Found:
    time, verified = _time(members), members.take("verified")
    if type(verified) is not bool or (verified and continued is None):
        raise Malformed(f"{members.where}/verified: expected true or false, and false where nothing was loaded")
    passed = tuple(_passed(StrictObject(one, where=f"{members.where}/passed"), epoch) for one in members.sequence("passed"))
    members.close()
    ids = [one.id for one in passed]
    if continued in ids or len(set(ids)) != len(ids):  # [RUN-66]
        raise Malformed(f"{members.where}/passed: expected each commit once, and not the one that was taken")
    return Found(time, verified, passed)


def _passed(members: StrictObject, epoch: int) -> PassedOver:
    attempt = _older(members.take("id"), epoch, where=f"{members.where}/id")
    kind, message = members.text("kind"), members.text("message")
    if _KIND.fullmatch(kind) is None:
        raise Malformed(f"{members.where}/kind: expected the kind of an error, found {kind[:80]!r}")
    members.close()
    return PassedOver(attempt, kind, message)


def encode_register(register: CommitRegister | AbortRegister) -> bytes:
    attempt = register.id
    if isinstance(register, AbortRegister):
        data = _seal("register", {"id": str(attempt), "says": "abort", "reason": register.reason})
    else:
        about = {"id": str(attempt), "says": "commit", "folder": attempt.folder, "manifest": register.digest}
        more = {"nbytes": register.nbytes, "time": register.time, "metrics": _encoded(register.metrics)}
        data = _seal("register", {**about, **more})
    decode_register(data, attempt=attempt)
    return data


def decode_register(data: bytes, *, attempt: AttemptId) -> CommitRegister | AbortRegister:
    members = _open(data, "register", where=attempt.register)
    _same(members, "id", str(attempt))
    says = members.text("says")
    if says == "abort":
        abort = AbortRegister(attempt, members.text("reason"))
        members.close()
        return abort
    if says != "commit":
        raise Malformed(f"{members.where}/says: expected 'commit' or 'abort', found {says!r}")
    _same(members, "folder", attempt.folder)  # [RUN-14] a register leads nowhere else
    digest = members.text("manifest")
    if len(digest) != 32 or set(digest) - set("0123456789abcdef"):
        raise Malformed(f"{members.where}/manifest: expected 32 lower-case hex digits, found {digest[:40]!r}")
    nbytes = members.integer("nbytes", high=MAX_FILE_NBYTES)
    commit = CommitRegister(attempt, digest, nbytes, _time(members), _metrics(members))
    members.close()
    return commit


def encode_metrics(later: LaterMetrics) -> bytes:
    data = _seal("metrics", {"id": str(later.id), "number": later.number, "metrics": _encoded(later.metrics)})
    decode_metrics(data, attempt=later.id, number=later.number)
    return data


def decode_metrics(data: bytes, *, attempt: AttemptId, number: int) -> LaterMetrics:
    members = _open(data, "metrics", where=attempt.metrics(number))
    _same(members, "id", str(attempt))
    _same(members, "number", number)
    later = LaterMetrics(attempt, number, _metrics(members))
    members.close()
    return later


def _seal(kind: str, members: dict[str, object]) -> bytes:
    return seal({"format": f"elastickpt-{kind}", "version": FORMAT_VERSION, **members}, where=kind)


def _open(data: bytes, kind: str, *, where: str) -> StrictObject:
    if len(data) > MAX_OBJECT_NBYTES:
        raise LimitExceeded(f"{where}: {len(data)} bytes, the limit is {MAX_OBJECT_NBYTES}")
    check_seal(data, where=where)  # [RUN-10]
    members = StrictObject(parse(data, where=where), where=where)
    check_version(members, f"elastickpt-{kind}")
    members.take("digest")
    return members


def _same(members: StrictObject, name: str, expected: int | str) -> None:
    """The object says what its name says. [RUN-11]"""
    found = members.take(name)
    if type(found) is not type(expected) or found != expected:
        raise Malformed(f"{members.where}/{name}: expected {expected!r} (in the name), found {str(found)[:80]!r}")


def _id(value: str, *, where: str) -> AttemptId:
    found = parse_id(value)
    if found is None:
        raise Malformed(f"{where}: expected STEP-EPOCH-ATTEMPT, found {value[:80]!r}")
    return found


def _older(value: object, epoch: int, *, where: str) -> AttemptId:
    found = _id(text(value, where=where), where=where)
    if found.epoch >= epoch:
        raise Malformed(f"{where}: expected a commit of an epoch before {epoch}, found {found}")
    return found


def _time(members: StrictObject) -> float:
    value = members.take("time")
    if not isinstance(value, float) or not isfinite(value):
        raise Malformed(f"{members.where}/time: expected seconds since 1970 with a fraction, found {str(value)[:80]!r}")
    return value


def _encoded(metrics: Metrics) -> dict[str, object]:
    return {name: encode_value(value, where=f"metric {name}") for name, value in metrics}


def _metrics(members: StrictObject) -> Metrics:
    value = members.take("metrics")
    where = f"{members.where}/metrics"
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object")
    found: list[tuple[str, float]] = []
    for name, one in value.items():
        number = decode_value(one, where=f"{where}/{name}")
        if not isinstance(number, float):
            raise Malformed(f"{where}/{name}: expected a number with a fraction, found {str(number)[:80]!r}")
        found.append((text(name, where=where), number))
    return tuple(sorted(found))
