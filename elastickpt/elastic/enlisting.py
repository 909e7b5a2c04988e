"""What a launcher on a further machine and the coordinator tell each other of workers."""

from __future__ import annotations

from typing import cast

from elastickpt.elastic.messages import Join
from elastickpt.ranks.messages import Message, decode_from


class Enlist(Message, frozen=True, tag=True):
    """First: this launcher can start `workers`, and keeps that many alive as it is told."""

    host: str
    zone: str
    workers: int


class Start(Message, frozen=True, tag=True):
    uid: str


class Kill(Message, frozen=True, tag=True):
    uid: str


class Started(Message, frozen=True, tag=True):
    uid: str
    pid: int


class Stopped(Message, frozen=True, tag=True):
    """The worker's process has ended; `signal` ended it, or it exited with `code`; both are None where that is not known.
    `killed`: by its launcher."""

    uid: str
    signal: int | None
    code: int | None
    killed: bool = False


class Finish(Message, frozen=True, tag=True):
    """The job is over, with this exit code; no more workers are started."""

    code: int


ToLauncher = Start | Kill | Finish
FromLauncher = Started | Stopped

_FIRST = cast("type[Join | Enlist]", Join | Enlist)
_TO_LAUNCHER = cast("type[ToLauncher]", ToLauncher)
_FROM_LAUNCHER = cast("type[FromLauncher]", FromLauncher)


def first_message(data: bytes) -> Join | Enlist:
    """Who has called. Raises Malformed."""
    return decode_from("caller, its first one", data, _FIRST)


def to_launcher(data: bytes) -> ToLauncher:
    """Raises Malformed."""
    return decode_from("coordinator", data, _TO_LAUNCHER)


def from_launcher(data: bytes) -> FromLauncher:
    """Raises Malformed."""
    return decode_from("launcher", data, _FROM_LAUNCHER)
