"""Messages in flight, between ranks, trainers and writers: values with types in, the same out; on the wire msgpack.

This is the one codec of what processes tell each other. Records on disk have decoders of their own, in `format`: their bytes
come from anywhere, and what is wrong with them is said exactly. Here both ends belong to one job and one release.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec

from elastickpt.errors import InternalError

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one process tells another: its fields, in order. Where several kinds go over one connection, each is a subclass
    with `tag=True`, whose name goes first. Fields may be messages, frozen dataclasses, tuples and plain values."""


def encode(message: object) -> bytes:
    """The message as bytes: equal messages of equal types give equal bytes. Raises TypeError for what has no fields."""
    return _ENCODER.encode(message)


def decode(data: bytes, what: type[T]) -> T:
    """What `encode` encoded, of the type `what`, every part of it checked. Raises InternalError for anything else."""
    try:
        found: T = _decoder(what).decode(data)  # type: ignore[arg-type]  # a type is hashable
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = getattr(what, "__name__", str(what))
        raise InternalError(
            f"a message between processes of this job: expected {name}, found {len(data)} bytes of something else ({error}); "
            "all processes of a job run one release of elastickpt: if these do, please report it"
        ) from error
    return found


def _plain(value: object) -> object:
    """What a subclass of a plain value is, as users' names and numbers may be. Raises TypeError for anything else."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TypeError(f"no message carries a value of type {type(value).__name__}")


@cache
def _decoder(what: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(what)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
