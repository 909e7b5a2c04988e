"""What a launcher on a further machine and the coordinator tell each other of workers."""

from __future__ import annotations

import msgspec

from elastickpt.elastic.messages import Join, Message
from elastickpt.errors import Malformed


class Enlist(Message, frozen=True):
    """First: this launcher can start `workers`, and keeps that many alive as it is told."""

    host: str
    zone: str
    workers: int


class Start(Message, frozen=True):
    uid: str


class Kill(Message, frozen=True):
    uid: str


class Started(Message, frozen=True):
    uid: str
    pid: int


class Stopped(Message, frozen=True):
    """The worker's process has ended; `signal` ended it, or it exited with `code`; both are None where that is not known.
    `killed`: by its launcher."""

    uid: str
    signal: int | None
    code: int | None
    killed: bool = False


class Finish(Message, frozen=True):
    """The job is over, with this exit code; no more workers are started."""

    code: int


ToLauncher = Start | Kill | Finish
FromLauncher = Started | Stopped

_first: msgspec.msgpack.Decoder[Join | Enlist] = msgspec.msgpack.Decoder(Join | Enlist)
_to: msgspec.msgpack.Decoder[ToLauncher] = msgspec.msgpack.Decoder(ToLauncher)
_from: msgspec.msgpack.Decoder[FromLauncher] = msgspec.msgpack.Decoder(FromLauncher)


def first_message(data: bytes) -> Join | Enlist:
    """Who has called. Raises Malformed."""
    try:
        return _first.decode(data)
    except msgspec.DecodeError as error:
        raise Malformed(f"the first message of a caller: {error}") from error


def to_launcher(data: bytes) -> ToLauncher:
    """Raises Malformed."""
    try:
        return _to.decode(data)
    except msgspec.DecodeError as error:
        raise Malformed(f"a message of a coordinator: {error}") from error


def from_launcher(data: bytes) -> FromLauncher:
    """Raises Malformed."""
    try:
        return _from.decode(data)
    except msgspec.DecodeError as error:
        raise Malformed(f"a message of a launcher: {error}") from error
