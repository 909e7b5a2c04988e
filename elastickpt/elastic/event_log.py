"""The events of a job, as JSON lines: `member`, `recovery` and `ended`. Members are only ever added. [REC-40..44]"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from elastickpt.elastic.messages import End, Join
from elastickpt.elastic.recovery import Lost, Recovery
from elastickpt.errors import Refused


class EventLog:
    """Appends to a file; nowhere without one. A line is written whole, by one call of the kernel. Raises Refused where
    the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = None if path is None else os.open(path, flags, 0o644)
        except OSError as error:
            raise Refused(f"--events {path}: cannot be written: {error.strerror}") from error

    def write(self, event: dict[str, object]) -> None:
        if self._file is not None:
            os.write(self._file, json.dumps(event, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def member_event(who: Join, stage: int | None, stages: int, *, epoch: int, generation: int) -> dict[str, object]:
    """At a registration, and at every change of place; a spare's `place` is null."""
    place = None if stage is None else {"stage": stage, "stages": stages, "shard": 0, "replica": 0}
    named = {"event": "member", "uid": who.uid, "pid": who.pid, "host": who.host, "zone": who.zone}
    return {**named, "place": place, "epoch": epoch, "generation": generation, "time": time.time()}


def recovery_event(recovery: Recovery) -> dict[str, object]:
    """`seconds` are cumulative, from the last sign of life."""
    members = asdict(recovery)
    members["from"] = recovery.source.to_json()
    del members["source"]
    members["lost"] = [_lost_json(one) for one in recovery.lost]
    return {"event": "recovery", **members}


def _lost_json(lost: Lost) -> dict[str, object]:
    members = asdict(lost)
    del members["source"]
    if not lost.traceback:
        del members["traceback"]
    return {**members, "from": lost.source.to_json()}


def ended_event(end: End, step: int) -> dict[str, object]:
    """`why` begins with the word of `RecoveryFailed`, where there is one."""
    why = f"{end.reason}: {end.message}" if end.reason else end.message
    return {"event": "ended", "code": end.code, "step": step, "why": why, "time": time.time()}
