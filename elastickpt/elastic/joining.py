"""A process as a member of its job: the connection to the coordinator, and the tasks of the thread that trains.

`join()` connects and starts one thread, which holds the connection, sends beats, and runs the table of `membership`. What the
thread that trains sees of it is `duties.Duties`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from elastickpt.elastic import environment, membership
from elastickpt.elastic.calling import connected
from elastickpt.elastic.duties import TaskOutcome, TaskOver
from elastickpt.elastic.limits import LEAVING_S, MAX_BEAT_S
from elastickpt.elastic.line import Line
from elastickpt.elastic.membership import Act, Compute, Form, LoopEnded, Made, Member, Mend, Mended, Stop
from elastickpt.elastic.messages import (
    OWN_CODE,
    Ask,
    End,
    FromMember,
    Held,
    Join,
    Put,
    Quit,
    Reached,
    Rebuild,
    RecoveryPoint,
    Terms,
    View,
    Welcome,
    to_member,
)
from elastickpt.elastic.progress import Progress
from elastickpt.elastic.stream import Stream
from elastickpt.errors import CheckpointError, DeadlineExceeded, RecoveryFailed, Refused, Superseded
from elastickpt.ranks.messages import encode
from elastickpt.ranks.threads import later

if TYPE_CHECKING:
    from elastickpt.elastic.stages import Place

log = logging.getLogger(__name__)

_INTERRUPTED = (Form, Mend, Compute)
SUPERSEDED = 76  # the code of a job of whose run a newer claim exists


class JobTask:
    """One act; see `duties.Task`."""

    def __init__(self, act: Act, generation: int) -> None:
        self.act, self.generation = act, generation
        self.over = False
        self.taken = False


class JobExchange:
    """See `duties.Exchange`."""

    def __init__(self, job: Job, task: JobTask) -> None:
        self._job, self._task = job, task

    def set(self, key: str, value: bytes) -> None:
        self._job._say(Put(self._task.generation, key, value))

    def get(self, key: str, *, limit_s: float) -> bytes:
        return self.get_all((key,), limit_s=limit_s)[0]

    def get_all(self, keys: Sequence[str], *, limit_s: float) -> list[bytes]:
        return self._job._ask(self._task, tuple(keys), limit_s)


class Job:
    """This process's part in a job, as `join` gives it. Attributes may be read from any thread; the rest is for the thread that
    trains. A `PipelineTrainer` gets its tasks from it, and is all that most scripts need.

    Examples:
        A script for `elastickpt-run --stages 1`:

        >>> with ek.elastic.join() as job:
        ...     with job.phase("reading the corpus", limit_s=120):
        ...         corpus = [torch.ones(4)] * 3
        ...     print(job.place.stages, job.end)
        ...     job.require_good_end()
        1 None
        >>> job.close()  # as the end of the block has done
        >>> job.end.reason
        ''
    """

    def __init__(self, stream: Stream, who: Join, *, leaves: Callable[[], None] | None = None) -> None:
        self.uid, self._leaves = who.uid, leaves
        stream.send(encode(who))
        self._changing = threading.Condition()
        self._member = Member(who.uid)
        self._task: JobTask | None = None
        self._at_work: JobTask | None = None  # what the thread that trains took last; it may be over
        self._interrupt: Callable[[], None] = _nothing
        self._leave: Callable[[], None] = self._leave_quietly
        self._welcome: Welcome | None = None
        self._end: End | None = None
        self._epoch, self._interrupting = 0, False
        self._held: dict[tuple[int, str], bytes] = {}
        self._progress = Progress()
        self._reached: set[tuple[int, RecoveryPoint]] = set()
        self._line = Line(stream, beat=self._beat, hear=self._hear, lost=self._lost)
        self._line.open()

    # -- what a user sees

    @property
    def rank(self) -> int | None:
        """The number of the place that this process holds; None for a spare."""
        return self._member.stage

    @property
    def place(self) -> Place | None:
        """What this process holds; None for a spare."""
        from elastickpt.elastic.stages import Place  # imports torch

        view, stage = self._member.view, self._member.stage
        return None if view is None or stage is None else Place(stage, len(view.places))

    @property
    def epoch(self) -> int:
        """The claim of the run under which this job goes on; 0 before the first step."""
        return self._epoch

    @property
    def generation(self) -> int:
        """The number of the newest view; 0 for a spare."""
        return self._member.generation

    @property
    def forms(self) -> bool:
        """Whether every place of the newest view is held."""
        view = self._member.waiting or self._member.view
        return view is not None and view.complete

    @contextmanager
    def phase(self, name: str, *, limit_s: float | None = None) -> Iterator[None]:
        """Within it, something must move every `limit_s` seconds, else this process counts as stalled and its place as lost.
        The time of a phase that is over does not count for the next one.

        Args:
            name: What messages and events call it.
            limit_s: None: as its own history says.

        Raises:
            Refused: `limit_s` is not above 0.
        """
        try:
            with self._progress.declared(name, limit_s):
                self._line.beat_now()
                yield
        finally:
            self._line.beat_now()

    # -- what a trainer sees: duties.Duties

    def declare(self, terms: Terms) -> None:
        self._say(terms)

    def next_task(self) -> JobTask:
        while (task := self._take_task()) is None:
            self._line.hear_until(lambda: not (self._interrupting or self._task is None or self._task.taken))
        if isinstance(task.act, Form):
            self._reach("unblocked")
        return task

    def _take_task(self) -> JobTask | None:
        with self._changing:
            if self._interrupting or self._task is None or self._task.taken:
                return None
            self._task.taken, self._at_work = True, self._task
            return self._task

    def done(self, task: JobTask, outcome: TaskOutcome) -> None:
        with self._changing:
            if not task.over and task is self._task:
                self._progress.moves()
                self._turn(outcome)

    def exchange(self, task: JobTask) -> JobExchange:
        return JobExchange(self, task)

    def on_interrupt(self, call: Callable[[], None]) -> None:
        self._interrupt = call

    def on_leaving(self, call: Callable[[], None]) -> None:
        self._leave = call

    def began(self) -> None:
        self._progress.moves()
        self._reach("first_microbatch")

    def progress(self) -> None:
        self._progress.moves()

    def own_code(self) -> AbstractContextManager[None]:
        return self._progress.working(OWN_CODE)

    def loop_body(self) -> AbstractContextManager[None]:
        return self._progress.working("")

    def waiting(self) -> AbstractContextManager[None]:
        return self._progress.working(None)

    # -- the end

    @property
    def end(self) -> End | None:
        """Why the job is over; None while it is not."""
        return self._end

    def require_good_end(self) -> None:
        """Returns where the job is not over, or was done, or was asked to end. Not blocking.

        Raises:
            RecoveryFailed: The job has ended for a reason, which the error has.
            Superseded: Another job has the run.
        """
        end = self._end
        if end is not None and end.code == SUPERSEDED:
            raise Superseded(end.message)
        if end is not None and end.reason:
            raise RecoveryFailed(f"{end.reason}: {end.message}", reason=end.reason, code=end.code)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                if self._end is None:
                    self._leave()
                self.require_good_end()
            elif self._end is None:
                text = "".join(traceback.format_exception(error))
                self._say(Quit(error.kind if isinstance(error, CheckpointError) else "", text))
                environment.say_is_told(error)
            elif self._end.culprit == self.uid or isinstance(error, RecoveryFailed | Superseded):
                environment.say_is_told(error)
        finally:
            self.close()

    def _leave_quietly(self) -> None:
        """For who trains nothing: takes part until the end."""
        while not isinstance(act := (task := self.next_task()).act, Stop):
            outcomes: dict[type, TaskOutcome] = {Form: Made(), Mend: Mended(), Compute: LoopEnded()}
            self.done(task, outcomes[type(act)])

    def close(self) -> None:
        """Ends the thread and the connection. The second call does nothing.

        Raises nothing.
        """
        self._line.close()

    # -- the thread of the job

    def wait_until_in(self) -> None:
        """Blocks until this process is known to hold a place or to be a spare. Raises RecoveryFailed if the job is over."""
        with self._changing:
            self._changing.wait_for(lambda: self._welcome is not None or self._end is not None)
        if self._welcome is None:
            self.require_good_end()

    def _lost(self, why: str) -> None:
        """In the thread that hears: nothing more will be heard."""
        if self._end is not None:
            return
        self._take(End(75, "coordinator-lost", why))
        if self._leaves is not None:
            later("elastickpt-leave", LEAVING_S, self._leaves)

    def _beat(self) -> tuple[bytes, float]:
        return encode(self._progress.beat()), MAX_BEAT_S if self._welcome is None else self._welcome.beat_s

    def _hear(self, data: bytes) -> None:
        message = to_member(data)
        if isinstance(message, Welcome):
            with self._changing:
                self._welcome = message
                self._changing.notify_all()
        elif isinstance(message, Held):
            with self._changing:
                self._held[message.generation, message.key] = message.value
                self._changing.notify_all()
        else:
            self._take(message)

    def _take(self, message: membership.MemberEvent) -> None:
        with self._changing:
            if isinstance(message, End):
                self._end = self._end or message
            elif isinstance(message, View):
                self._held = {key: value for key, value in self._held.items() if key[0] >= message.generation}
            elif isinstance(message, Rebuild):
                self._epoch = message.epoch
            before = self._task
            try:
                self._turn(message)
            except membership.CannotFollow as torn:
                log.error("this member cannot go on: %s", torn)
                self._end = End(1, "step-failed", f"our own mistake: {torn}")
                self._turn(self._end)
            over = before is not None and before.over and before.taken and isinstance(before.act, _INTERRUPTED)
            self._interrupting = over or (isinstance(message, View) and self.forms)
        if self._interrupting:
            try:
                self._interrupt()
            except Exception:
                log.exception("what was to be interrupted goes on")
            with self._changing:
                self._interrupting = False
                self._changing.notify_all()

    def _turn(self, event: membership.MemberEvent) -> None:
        """One row of the table, in which both threads take turns."""
        before = self._member
        self._member, said, act = membership.after(before, event)
        if act is not None or self._member.duty is not before.duty:
            if self._task is not None:
                self._task.over = True
            self._task = None if act is None else JobTask(act, self._member.generation)
        for message in said:
            self._say(message)
        self._changing.notify_all()

    def _say(self, message: FromMember) -> None:
        self._line.say(encode(message))

    def _reach(self, point: RecoveryPoint) -> None:
        """In the thread that trains, whose task counts: of a newer view, which may be known by now, it has begun nothing."""
        if self._at_work is None:
            return
        reached = (self._at_work.generation, point)
        if reached not in self._reached:
            self._reached = {one for one in self._reached if one[0] == reached[0]} | {reached}
            self._say(Reached(*reached))

    def _ask(self, task: JobTask, keys: tuple[str, ...], limit_s: float) -> list[bytes]:
        self._say(Ask(task.generation, keys))
        wanted = [(task.generation, key) for key in keys]
        self._line.hear_until(lambda: task.over or all(one in self._held for one in wanted), limit_s)
        with self._changing:
            if task.over:
                raise TaskOver(f"generation {task.generation} is over")
            for one in wanted:
                if one not in self._held:
                    raise DeadlineExceeded(f"nobody set {one[1]!r} of generation {task.generation} within {limit_s:g} s")
            return [self._held[one] for one in wanted]


def join(endpoint: str | None = None) -> Job:
    """Takes a place in a job, or waits beside it as a spare.

    To be used in a `with` block. Returns once this process holds a place or is a spare, and blocks until then. An error that
    leaves the block is the loss of this place.

    Args:
        endpoint: Where the coordinator of the job listens; by default where the launcher says.

    Returns:
        This process's part in the job.

    Raises:
        Refused: This process was not started by `elastickpt-run`, and no endpoint was given.
        RecoveryFailed: The job is over.

    Examples:
        >>> with ek.elastic.join() as job:  # in a script that `elastickpt-run` has started: elsewhere there is no job
        ...     print(job.rank)
        Traceback (most recent call last):
        elastickpt.errors.Refused: elastic.join: no coordinator: expected a process started by elastickpt-run, or an endpoint
    """
    here = environment.told()
    where = here.endpoint if endpoint is None else endpoint
    if here.torchrun and not here.uid:
        raise Refused("this process was started by torchrun, which elastic.join cannot use yet: start it by elastickpt-run")
    if not where:
        raise Refused("elastic.join: no coordinator: expected a process started by elastickpt-run, or an endpoint")
    uid = here.uid or f"{socket.gethostname()}-{os.getpid()}"
    host = here.host or socket.gethostname()
    who = Join(uid, os.getpid(), host, here.zone)
    job = Job(connected(where, here.token), who, leaves=_leave_now if here.uid else None)
    try:
        job.wait_until_in()
    except BaseException:
        job.close()
        raise
    return job


def _leave_now() -> None:
    os._exit(75)


def _nothing() -> None:
    """Nobody waits for interrupts."""
