"""A writer's part in the attempts of a job, be it a process or a thread: it writes portions, and takes part in the decision."""

from __future__ import annotations

import socket
from collections.abc import Callable

from elastickpt.commit.attempt import Attempt, Verdict
from elastickpt.commit.attest import DraftContents, EncodedContents, completing, decode_values, find_attestation, leave_contents
from elastickpt.commit.ballot import CommitBallot
from elastickpt.commit.links import Seat, say_farewell
from elastickpt.commit.outcome import AttemptStanding, Patience, look
from elastickpt.errors import CheckpointError, RankFailure, WriterLost
from elastickpt.ranks.team import failure_of
from elastickpt.storage.store import Store, is_in_memory
from elastickpt.writer.arena import Arena, ArenaSource
from elastickpt.writer.arena_plan import WriterStructure
from elastickpt.writer.messages import Enroll, PortionDone, Say, Write
from elastickpt.writer.share import share_of, write_share
from elastickpt.writer.submissions import done_of
from elastickpt.writer.write_files import WatchBytes

TellJob = Callable[[int, Verdict], None]


class AttemptWorker:
    """`stores` opens a store by its URL; `tell` is told of every decided job, from another thread."""

    def __init__(self, seat: Seat, listener: socket.socket | None, stores: Callable[[str], Store], tell: TellJob) -> None:
        self._seat = seat
        self._rank = seat.ranks[seat.member]
        self._leaves_contents = seat.member == 0 and len(seat.candidates) > 1
        self._stores = stores
        self._tell_trainer = tell
        self._enrolled: dict[str, _Enrolled] = {}
        self._marks: dict[str, socket.socket] = {}
        patience = Patience(limit_s=seat.limits.adopt_s)
        self._ballot = CommitBallot(seat, listener, stores, self._tell, patience=patience)

    def hold(self, attempt: str, mark: socket.socket) -> None:
        """Somebody works on the attempt as long as the mark is open: until it is decided."""
        earlier, self._marks[attempt] = self._marks.get(attempt), mark
        if earlier is not None:
            earlier.close()

    def begin(self, enroll: Enroll, structure: WriterStructure | None) -> None:
        """This writer takes part in the attempt of a job from now on. Does not block."""
        attempt = enroll.attempt
        enrolled = self._enrolled.setdefault(attempt.id, _Enrolled(enroll, structure))
        enrolled.jobs.append(enroll.job)
        self._ballot.enroll(attempt, enrolled.contents)

    def carry_out(self, job: Write, structure: WriterStructure, arena: Arena, *, watch: WatchBytes) -> PortionDone:
        """Writes the portion, and says so or why not. Blocking. Raises what `write_share` and `watch` raise."""
        attempt = job.attempt

        def watch_both(nbytes: int) -> None:
            if self._ballot.settled(attempt.id):
                raise CheckpointError(f"{attempt.draft.folder}: the attempt is decided already")
            watch(nbytes)

        try:
            watch_both(0)
            store = self._stores(attempt.store)
            if job.repeated and look(store, attempt) is not AttemptStanding.OPEN:
                raise WriterLost(f"{attempt.draft.folder}: the attempt was decided before this writer process began")
            if self._leaves_contents and job.portion == 0:
                self._leave_contents(store, attempt, repeated=job.repeated)
            done = perform(store, job, structure, arena, watch=watch_both)
        except Exception as error:
            self._ballot.say(attempt.id, failure_of(error, self._rank))
            raise
        if done.file:
            self._ballot.say(attempt.id, done.file)
        return done

    def _leave_contents(self, store: Store, attempt: Attempt, *, repeated: bool) -> None:
        """Before this member attests, so that its attestation says that they are whole. Not behind that: another committer may
        have removed them, as it is about to commit. [SAVE-85]"""
        enrolled = self._enrolled.get(attempt.id)
        contents = None if enrolled is None else enrolled.encoded()
        if contents is None:
            return  # it is decided
        if not repeated:
            leave_contents(store, attempt, contents)
        elif find_attestation(store, attempt, 0) is None:
            leave_contents(store, attempt, contents, create=completing(store))

    def fail(self, job: Write, error: CheckpointError) -> None:
        """The portion cannot be written."""
        self._ballot.say(job.attempt.id, failure_of(error, self._rank))

    def repeat(self, say: Say) -> None:
        """Says what was said before, or what its trainer found."""
        if say.attested is not None:
            self._ballot.say(say.attempt, say.attested)
        elif say.failed is not None:
            self._ballot.say(say.attempt, RankFailure(self._rank, *say.failed))
        self._ballot.find_out(say.attempt)

    def settle(self, attempt: str, kind: str, message: str) -> None:
        """The team is gone: what became of the attempt is found out, or it is aborted for that reason. Does not block."""
        self._ballot.settle(attempt, RankFailure(self._rank, kind, message))

    @property
    def at_work(self) -> bool:
        """Whether it takes part in an attempt that is not decided."""
        return bool(self._enrolled)

    def join(self, limit_s: float) -> bool:
        """Whether all attempts were decided within the limit. Blocking."""
        return self._ballot.join(limit_s)

    def depart(self) -> None:
        """The trainer is gone, or its team is, and all that it gave is decided: the others need not wait for what it had not
        given. Blocking for moments."""
        say_farewell(self._seat)

    def leave(self) -> None:
        """The same, and then it takes no part any more."""
        self.depart()
        self.close()

    def close(self) -> None:
        self._ballot.close()

    def _tell(self, key: str, verdict: Verdict) -> None:
        held = self._marks.pop(key, None)
        if held is not None:
            held.close()
        enrolled = self._enrolled.pop(key, None)
        for job in () if enrolled is None else enrolled.jobs:
            self._tell_trainer(job, verdict)


class _Enrolled:
    """An attempt in which this writer takes part, and for which of the trainer's jobs: what is written of it, and its
    withdrawal."""

    def __init__(self, enroll: Enroll, structure: WriterStructure | None) -> None:
        self._values = enroll.values
        self._structure = structure
        self.jobs: list[int] = []

    def contents(self) -> DraftContents | None:
        """Those of the checkpoint, if this writer is the first to commit it. By the thread that commits."""
        outline = None if self._structure is None else self._structure.outline
        return None if outline is None else DraftContents(outline, decode_values(self._values))

    def encoded(self) -> EncodedContents | None:
        """The same for another committer."""
        if self._structure is None or not self._structure.encoded_outline:
            return None
        return EncodedContents(self._structure.encoded_outline, self._values)


def perform(store: Store, job: Write, structure: WriterStructure, arena: Arena, *, watch: WatchBytes) -> PortionDone:
    """The job's portion is written from the arena. Blocking. Raises what `write_share` raises."""
    share = share_of(job.attempt, job.member, structure, job.beside)
    source = ArenaSource(arena, watch)
    if is_in_memory(store):  # no device works meanwhile: a second copy would only take the processor from the trainer's
        source.wait_for(structure.prepared.portions[job.portion].nbytes)
    written = write_share(store, share, job.portion, source, earlier=job.earlier, repeated=job.repeated, watch=watch)
    return done_of(job.job, written)
