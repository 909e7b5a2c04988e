"""A writer's part in the attempts of a job, be it a process or a thread: it writes rounds, and takes part in the decision."""

from __future__ import annotations

import socket
from collections.abc import Callable

from elastickpt.commit.cases import Case, Verdict
from elastickpt.commit.completing import completing
from elastickpt.commit.contents import Contents, Outline, decode_outline, decode_rest
from elastickpt.commit.draft import Draft
from elastickpt.commit.handed import find_attestation, leave_contents
from elastickpt.commit.settle import Patience, Standing, look
from elastickpt.errors import CheckpointError, Malformed, RankFailure, Refused, WriterLost
from elastickpt.format.records import FileDigest
from elastickpt.ledger.names import parse_id
from elastickpt.ranks.team import failure_of
from elastickpt.storage.store import Store
from elastickpt.writer.arena import Arena
from elastickpt.writer.assembly import Assembly
from elastickpt.writer.carry import Watch
from elastickpt.writer.jobs import perform
from elastickpt.writer.messages import Done, Say, Write
from elastickpt.writer.prepared import Prepared
from elastickpt.writer.seats import Seat
from elastickpt.writer.way import say_farewell

Tell = Callable[[int, Verdict], None]


class Part:
    """`stores` opens a store by its URL; `tell` is told of every decided job, from another thread."""

    def __init__(self, seat: Seat, listener: socket.socket | None, stores: Callable[[str], Store], tell: Tell) -> None:
        self._seat = seat
        self._rank = seat.ranks[seat.member]
        self._leaves_contents = seat.member == 0 and len(seat.candidates) > 1
        self._stores = stores
        self._tell_trainer = tell
        self._jobs: dict[str, list[int]] = {}  # of an attempt: what is written of it, and its withdrawal
        self._decoded: tuple[str, Outline] | None = None
        self._marks: dict[str, socket.socket] = {}
        patience = Patience(limit_s=seat.limits.adopt_s)
        self._assembly = Assembly(seat, listener, stores, self._tell, patience=patience)

    def hold(self, attempt: str, mark: socket.socket) -> None:
        """Somebody works on the attempt as long as the mark is open: until it is decided."""
        earlier, self._marks[attempt] = self._marks.get(attempt), mark
        if earlier is not None:
            earlier.close()

    def begin(self, job: Write | Say, outline: bytes) -> None:
        """This writer takes part in the job's attempt from now on. Does not block."""
        case = case_of(job)
        _, digest, rest, _ = _order(job)
        self._jobs.setdefault(case.key, []).append(job.job)

        def contents() -> Contents | None:
            return decode_rest(rest, self._outline(digest, outline)) if digest else None

        self._assembly.enroll(case, contents)

    def _outline(self, digest: str, encoded: bytes) -> Outline:
        """Decoded, and kept for the next save of the structure. By the thread that commits alone."""
        if self._decoded is None or self._decoded[0] != digest:
            self._decoded = (digest, decode_outline(encoded))
        return self._decoded[1]

    def carry_out(self, job: Write, prepared: Prepared, arena: Arena, outline: bytes, *, watch: Watch) -> Done:
        """Writes the round, and says so or why not. Blocking. Raises what `perform` and `watch` raise."""
        case = case_of(job)

        def watch_both(nbytes: int) -> None:
            if self._assembly.settled(case.key):
                raise CheckpointError(f"{case.draft.folder}: the attempt is decided already")
            watch(nbytes)

        try:
            store = self._stores(job.store)
            if job.repeated and look(store, case) is not Standing.OPEN:
                raise WriterLost(f"{case.draft.folder}: the attempt was decided before this writer process began")
            if self._leaves_contents and job.round == 0:
                self._leave_contents(store, case, job, outline)
            done = perform(store, job, prepared, arena, watch=watch_both)
        except Exception as error:
            self._assembly.say(case.key, failure_of(error, self._rank))
            raise
        if done.file:
            self._assembly.say(case.key, FileDigest(*done.file))
        return done

    def _leave_contents(self, store: Store, case: Case, job: Write, outline: bytes) -> None:
        """Before this member attests, so that its attestation says that they are whole. Not behind that: another committer may
        have removed them, as it is about to commit. [SAVE-85]"""
        if not job.repeated:
            leave_contents(store, case, outline, _order(job)[2])
        elif find_attestation(store, case, 0) is None:
            leave_contents(store, case, outline, _order(job)[2], create=completing(store))

    def fail(self, job: Write, error: CheckpointError) -> None:
        """The round cannot be written."""
        self._assembly.say(case_of(job).key, failure_of(error, self._rank))

    def repeat(self, say: Say) -> None:
        """Says what was said before, or what its trainer found."""
        said = say.said
        what = FileDigest(*said) if len(said) == 3 else RankFailure(self._rank, *said)
        self._assembly.say(case_of(say).key, what)
        self._assembly.find_out(case_of(say).key)

    def join(self, limit_s: float) -> bool:
        """Whether all attempts were decided within the limit. Blocking."""
        return self._assembly.join(limit_s)

    def depart(self) -> None:
        """The trainer is gone and all that it gave is decided: the others need not wait for what it had not given. Blocking."""
        say_farewell(self._seat)

    def close(self) -> None:
        self._assembly.close()

    def _tell(self, key: str, verdict: Verdict) -> None:
        held = self._marks.pop(key, None)
        if held is not None:
            held.close()
        for job in self._jobs.pop(key, ()):
            self._tell_trainer(job, verdict)


def case_of(job: Write | Say) -> Case:
    """The attempt that a job with an order is for."""
    register, _, _, metrics = _order(job)
    attempt = parse_id(register) if register else None
    if register and attempt is None:
        raise Malformed(f"register {register!r} in an order between a trainer and its writer")
    return Case(job.store, Draft(*job.draft), job.durability, attempt, metrics)


def _order(job: Write | Say) -> tuple[str, str, bytes, tuple[tuple[str, float], ...]]:
    if not job.order:
        raise Refused(f"job {job.job} has no order")
    return job.order
