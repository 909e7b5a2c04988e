"""What a trainer and its writer process tell each other: the whole protocol.

    trainer -> writer                                      writer -> trainer
    Hello       first; how to behave                       Ready       answer to Hello: imported and waiting
    ArenaHere   with a descriptor: an arena to read from   Beat        each `beat_s`: alive
    ArenaGone   no job will name it again: unmap it        Progress    bytes of a job's round written so far
    StructureHere   what all saves of a structure share,   Done        the round is written, and after the last one attested
                by digest; sent once
    StructureGone   no job will name it again              Failed      the job ended; nothing more is done for it
    SeatHere    with a descriptor, if it listens: where
                it sits among the job's writers            Decided     what became of the attempt of a job that enrolled
    MarkHere    with a descriptor: the mark of an attempt,
                to be held until that is decided
    Enroll      before Write or Say: take part in the
                decision of a job's attempt
    Write       a round of a job is staged, or begins to be:
                write it
    Say         a job's attempt is attested, or failed
    Cancel      end the job as soon as may be
    Quit        end now, whatever is left

1. Every Write is answered by exactly one Done or Failed, in the order of the Writes, if the writer lives. 2. A Write names only
arenas and structures that came before it. From Write to its answer the writer reads of the arena what this
   says is filled, and waits for more: the trainer may still be filling it.
3. A Write can be repeated (`repeated`), to the same or another writer, once the one before is known to be dead: it puts the
   same bytes in the same places. What the dead one made is completed if it is a part of what this one makes, else it is an
   error.
4. Bytes of a round that is not the last are as durable as asked when Done is sent, so that no later writer needs them again.
5. After the last round of a job that enrolled, or its first that failed, or a Say, comes one Decided. A Say repeats what a
   writer that is gone had said, or says that the trainer takes no part; the arena is no concern of it.
6. When the connection or the trainer's process ends, the writer finishes the last rounds it was given, then ends; at the latest
   `lease_s` later. It ends no attempt before it is decided. Earlier rounds are dropped, and a round that was not staged to its
   end fails: nobody is left to stage what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import msgpack

from elastickpt.commit.attempt import AttemptFields
from elastickpt.errors import Malformed


@dataclass(frozen=True, slots=True)
class Hello:
    """`trainer` is a process id. `niceness` 0 and `io` "normal" leave priorities alone. `wrap` is for tests: a function
    "module:name:argument" that gets each store and the argument, and returns the store to use."""

    trainer: int
    beat_s: float
    lease_s: float
    niceness: int
    io: str
    wrap: str


@dataclass(frozen=True, slots=True)
class ArenaHere:
    arena: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ArenaGone:
    arena: int


@dataclass(frozen=True, slots=True)
class StructureHere:
    """`plan` as `Prepared.encoded`, `outline` as `WriterStructure.encoded_outline`."""

    structure: str
    plan: bytes
    outline: bytes


@dataclass(frozen=True, slots=True)
class StructureGone:
    structure: str


@dataclass(frozen=True, slots=True)
class SeatHere:
    """A `Seat`, with its limits in the order of their fields. `listening`: its listener comes with this message."""

    member: int
    ranks: tuple[int, ...]
    candidates: tuple[str, ...]
    secret: bytes
    limits: tuple[float, ...]
    listening: bool


@dataclass(frozen=True, slots=True)
class MarkHere:
    attempt: str


@dataclass(frozen=True, slots=True)
class Enroll:
    """`attempt` as `Attempt.fields` has it. `structure` by its digest, "" for none: whose outline, and `values`
    (`contents.encode_values`), a committer needs."""

    job: int
    attempt: AttemptFields
    structure: str
    values: bytes


@dataclass(frozen=True, slots=True)
class Write:
    """`attempt` as `Attempt.fields` has it. `beside` as `Share.beside`; `known` are the checksums of all earlier rounds, as
    little-endian 64-bit integers; both are used in the last round."""

    job: int
    attempt: AttemptFields
    structure: str
    round: int
    arena: int
    member: int
    beside: bytes
    known: bytes
    repeated: bool


@dataclass(frozen=True, slots=True)
class Say:
    """`said` of the attempt with this id is an attestation as (path, nbytes, digest), or a failure as (kind, message)."""

    job: int
    attempt: str
    said: tuple[str, int, str] | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Cancel:
    job: int


@dataclass(frozen=True, slots=True)
class Quit:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    pid: int


@dataclass(frozen=True, slots=True)
class Beat:
    pass


@dataclass(frozen=True, slots=True)
class Progress:
    job: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """`checksums` of the round's blocks, and `file` (), unless it was the last one: then () and (path, nbytes, digest)."""

    job: int
    nbytes: int
    checksums: bytes
    file: tuple[str, int, str] | tuple[()]


@dataclass(frozen=True, slots=True)
class Failed:
    job: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Decided:
    """`verdict` as `attempt.encode_verdict` encodes it."""

    job: int
    verdict: bytes


Here = ArenaHere | StructureHere | SeatHere | MarkHere
Gone = ArenaGone | StructureGone
ToWriter = Hello | Here | Gone | Enroll | Write | Say | Cancel | Quit
FromWriter = Ready | Beat | Progress | Done | Failed | Decided
Message = ToWriter | FromWriter
_TYPES: dict[str, type[Message]] = {
    cls.__name__: cls
    for cls in (
        Hello, ArenaHere, ArenaGone, StructureHere, StructureGone, SeatHere, MarkHere, Enroll, Write, Say, Cancel, Quit,
        Ready, Beat, Progress, Done, Failed, Decided,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """The message as msgpack: its name, then its fields in order."""
    values = [getattr(message, field.name) for field in fields(message)]
    return bytes(msgpack.packb([type(message).__name__, *values]))


def decode(data: bytes) -> Message:
    """What `encode` encoded. Raises Malformed for what it never makes."""
    name, *values = msgpack.unpackb(data, use_list=False)
    cls = _TYPES.get(name)
    if cls is None or len(values) != len(fields(cls)):
        raise Malformed(f"message {name!r} with {len(values)} fields between a trainer and its writer process")
    return cls(*values)
