"""A writer process as its trainer has it: started, spoken to, put down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from elastickpt.commit.links import Seat
from elastickpt.ranks.messages import PeerGone
from elastickpt.ranks.threads import IoPriority, apart
from elastickpt.writer.messages import (
    ArenaHere,
    MarkHere,
    SeatGone,
    SeatHere,
    StructureGone,
    StructureHere,
    Wire,
    WriterMessage,
    WriterSettings,
)
from elastickpt.writer.submissions import Submission

_MAIN = Path(__file__).resolve().parent / "__main__.py"
_SAID_NBYTES = 2000
KNOWN = 4  # structures that a process keeps


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How a writer process behaves.

    It is ready within `start_s`. From then on it sends a beat each `beat_s`, and is presumed dead after `silence_s` without
    one; then it is killed, and waited for at most `reap_s`. After its trainer has ended it lives at most `lease_s`. `hooks`
    are for tests: `WriterSettings.wrap` of the first, second, ... process.
    """

    start_s: float = 60.0
    beat_s: float = 1.0
    silence_s: float = 30.0
    reap_s: float = 10.0
    lease_s: float = 600.0
    niceness: int = 0
    io: IoPriority = "normal"
    hooks: tuple[str, ...] = ()


class Child:
    """One process. `arenas` are those that it was sent; `heard_at` is monotonic."""

    def __init__(self, process: subprocess.Popen[bytes], wire: Wire, errors: int) -> None:
        self.process = process
        self.wire = wire
        self.ready = False
        self.heard_at = time.monotonic()
        self.arenas: set[int] = set()
        self._structures: OrderedDict[str, None] = OrderedDict()  # that it was sent, by digest
        self._seats: set[bytes] = set()  # that it was sent, by secret
        self._seat: bytes | None = None  # the one of the jobs that come
        self._errors = errors

    @classmethod
    def spawn(cls, options: WriterOptions, *, wrap: str = "") -> Self:
        """Starts a process, in a session of its own; returns at once. Raises OSError.

        Its output goes nowhere: an orphan that held the trainer's pipes would keep whoever reads them waiting.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        errors = os.memfd_create("elastickpt-writer-stderr", os.MFD_CLOEXEC)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_MAIN), "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except BaseException:
            os.close(errors)
            ours.close()
            raise
        finally:
            theirs.close()
        child = cls(process, Wire(ours), errors)
        child.wire.limit(options.silence_s)
        with suppress(PeerGone):  # whoever listens next finds out
            child.wire.send(
                WriterSettings(os.getpid(), options.beat_s, options.lease_s, options.niceness, options.io, wrap),
            )
        return child

    def seat(self, seat: Seat, listener: socket.socket | None) -> None:
        """It sits there among the writers of a team. Raises PeerGone."""
        if self._seat != seat.secret:
            given = listener if seat.secret not in self._seats else None
            self._seat = seat.secret
            self._seats.add(seat.secret)
            here = SeatHere(seat.member, seat.ranks, seat.candidates, seat.secret, seat.limits, given is not None)
            self.wire.send(here, descriptors=() if given is None else (given.fileno(),))

    def leave_seat(self, secret: bytes) -> None:
        """It takes no part there any more, once all that it was handed there is decided. Raises PeerGone."""
        if secret in self._seats:
            self._seats.remove(secret)
            self._seat = None if self._seat == secret else self._seat
            self.wire.send(SeatGone(secret))

    def hand(self, submission: Submission) -> None:
        """It is told of the submission, and before of all that this names. Raises PeerGone."""
        structure, arena = submission.structure, submission.arena
        if submission.mark is not None:
            self.wire.send(MarkHere(submission.attempt.id), descriptors=(submission.mark.fileno(),))
        if structure is not None and not _touch(self._structures, structure.digest):
            self.wire.send(StructureHere(structure.digest, structure.prepared.encoded, structure.encoded_outline))
        for old in _oldest(self._structures):
            self.wire.send(StructureGone(old))
        if submission.takes_part:
            self.wire.send(submission.enroll())
        if submission.said is not None or arena is None:
            self.wire.send(submission.say())
        else:
            if arena.number not in self.arenas:
                self.arenas.add(arena.number)
                self.wire.send(ArenaHere(arena.number, arena.nbytes), descriptors=(arena.descriptor,))
            self.wire.send(submission.write())
        if submission.settling is not None:
            self.wire.send(submission.settle())

    def put_down(self, limit_s: float) -> bool:
        """Kills it; whether it is gone for certain, with all that it had begun. Blocking, at most `limit_s`."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        return self.wait(limit_s)

    def wait(self, limit_s: float) -> bool:
        """Whether it has ended within the limit. Only its end as seen by its parent counts: a process that is being killed may
        still have writes under way."""
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> tuple[list[WriterMessage], str]:
        """What a process that is gone had said and nobody has heard, and the end of what it wrote on stderr."""
        messages: list[WriterMessage] = []
        self.wire.limit(0.0)
        with suppress(PeerGone):
            while True:
                messages += [message for message, _ in self.wire.receive()]
        nbytes = os.fstat(self._errors).st_size
        said = os.pread(self._errors, _SAID_NBYTES, max(0, nbytes - _SAID_NBYTES))
        return messages, said.decode(errors="replace").strip()

    def close(self) -> None:
        """Gives up the connection: one that lives finishes by itself. It is reaped when it ends."""
        self.wire.close()
        os.close(self._errors)
        if self.process.poll() is None:
            apart("elastickpt-reap", self.process.wait).start()


def _touch(known: OrderedDict[str, None], digest: str) -> bool:
    """Whether it was known; it is the newest known one now."""
    found = digest in known
    known[digest] = None
    known.move_to_end(digest)
    return found


def _oldest(known: OrderedDict[str, None]) -> list[str]:
    """Those beyond `KNOWN`, which are known no more."""
    return [known.popitem(last=False)[0] for _ in range(len(known) - KNOWN)]
