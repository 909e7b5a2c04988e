"""What a disk was asked for, in order, and every content that a power cut may leave on it. Pure.

A write is durable once a flush came after it was answered. Of those that are not, any subset may be on the disk, each of them
torn between sectors of 512 bytes; what was written to one place later covers what was written there earlier.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

SECTOR = 512
TRIES = 20  # for each state, to draw one that was not drawn before
_RECORD = struct.Struct("<cQI")  # kind, offset, nbytes

Kind = Literal["write", "flush"]
Loss = Literal["nothing lost", "all unflushed lost", "a subset, torn"]


@dataclass(frozen=True, slots=True)
class Request:
    """One write or flush. `end`: the length of the log behind it, by which moments are named."""

    kind: Kind
    end: int
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class CrashState:
    """What is left when power fails after `position`: all up to the request `durable`, and the first bytes of later writes.

    `kept`: (request, bytes of it), by request number.
    """

    position: int
    durable: int
    kept: tuple[tuple[int, int], ...]
    loss: Loss


def write_record(offset: int, data: bytes | memoryview) -> bytes:
    """A write as it stands in the log."""
    return _RECORD.pack(b"W", offset, len(data)) + data


def flush_record() -> bytes:
    """A flush as it stands in the log."""
    return _RECORD.pack(b"F", 0, 0)


def requests(log: bytes) -> list[Request]:
    """The requests of a log, oldest first."""
    found, position = [], 0
    while position < len(log):
        kind, offset, nbytes = _RECORD.unpack_from(log, position)
        start = position + _RECORD.size
        position = start + nbytes
        data = log[start:position]
        found.append(Request("write", position, offset, data) if kind == b"W" else Request("flush", position))
    return found


def crash_states(log: Sequence[Request], after: int, count: int, seed: int) -> list[CrashState]:
    """`count` different states at moments from `after` on, in their order, fewer where a short log has fewer; the same for the
    same seed.

    Every moment with nothing lost and every flush just missed with all unflushed lost come first; a half at most of `count` is
    for them, drawn where there are more. The others are drawn: a moment, a subset of what was unflushed then, tears.
    """
    chance = random.Random(seed)
    regular = list(_regular(log, after))
    if len(regular) > count // 2:
        regular = chance.sample(regular, count // 2)
    found = {(state.position, state.kept): state for state in regular}
    moments = [number for number, request in enumerate(log) if request.end > after and request.kind == "write"]
    for _ in range(TRIES * count if moments else 0):
        if len(found) == count:
            break
        state = _drawn(log, chance.choice(moments), chance)
        found.setdefault((state.position, state.kept), state)
    return sorted(found.values(), key=lambda state: state.position)


def images(log: Sequence[Request], states: Sequence[CrashState], nbytes: int) -> Iterator[bytearray]:
    """The disk's content in each of `states`, which are in order of position; it began as zeros."""
    durable, done = bytearray(nbytes), 0
    for state in states:
        for request in log[done : state.durable]:
            durable[request.offset : request.offset + len(request.data)] = request.data
        done = max(done, state.durable)
        image = bytearray(durable)
        for number, kept in state.kept:
            offset = log[number].offset
            image[offset : offset + kept] = log[number].data[:kept]
        yield image


def _regular(log: Sequence[Request], after: int) -> Iterator[CrashState]:
    durable = 0
    for number, request in enumerate(log):
        if request.kind == "flush":
            durable = number + 1
        if request.end <= after:
            continue
        flushed_next = number + 1 < len(log) and log[number + 1].kind == "flush"
        if request.kind == "flush" or not flushed_next:  # else the next moment has the same content, and promises more
            yield CrashState(request.end, durable, _whole(log, durable, number), "nothing lost")
        if request.kind == "write" and flushed_next:
            yield CrashState(request.end, durable, (), "all unflushed lost")


def _drawn(log: Sequence[Request], moment: int, chance: random.Random) -> CrashState:
    durable = next((number + 1 for number in range(moment, -1, -1) if log[number].kind == "flush"), 0)
    kept = []
    share = chance.choice((0.1, 0.5, 0.9))
    for number, nbytes in _whole(log, durable, moment):
        if chance.random() < share:
            torn = chance.random() < 0.3
            kept.append((number, chance.randrange(SECTOR, nbytes + 1, SECTOR) if torn else nbytes))
    return CrashState(log[moment].end, durable, tuple(kept), "a subset, torn")


def _whole(log: Sequence[Request], durable: int, last: int) -> tuple[tuple[int, int], ...]:
    return tuple((number, len(log[number].data)) for number in range(durable, last + 1) if log[number].kind == "write")
