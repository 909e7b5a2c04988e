"""Where a trainer and its job meet: what the thread that trains is given to do, and what it says of it.

The job has a thread of its own, which holds the connection to the coordinator and the table of `membership`. The thread that
trains asks for its next task, carries it out, says what came of it, and asks again:

    Form     -> Made, Failed                          Compute  -> Computed, Failed, Erred, LoopEnded
    Mend     -> Mended, NotMended, Failed             TakeStep -> Took
    Stop     -> nothing: `End` without a reason ends the loop quietly, but for code 76, which raises Superseded; else
                RecoveryFailed is raised

A task can be over before it was carried out: a newer view, or the end of the job. Then `Task.over` is true, the thread that
heard so has called whoever wants to know of interrupts, waits of the job's own raise TaskOver, and what is said of the task has
no effect. A TakeStep is never over before it was carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from elastickpt.elastic.job import Choose, Chosen
from elastickpt.elastic.membership import (
    Act,
    Computed,
    Erred,
    Failed,
    LoopEnded,
    Made,
    Mended,
    NotMended,
    Took,
)
from elastickpt.elastic.messages import Commit, Terms
from elastickpt.elastic.recovery import Considered

TaskOutcome = Made | Mended | NotMended | Computed | Took | Failed | Erred | LoopEnded


class TaskOver(Exception):
    """What this thread was at is over: it changes nothing any more, and asks for its next task."""


class Task(Protocol):
    """One act. From any thread."""

    @property
    def act(self) -> Act: ...

    @property
    def over(self) -> bool:
        """Whether something newer has taken its place."""
        ...


class Exchange(Protocol):
    """Bytes by key that members of one view tell each other, as a store for the making of groups. Of a newer view nothing is
    seen, nor of an older one."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, *, limit_s: float) -> bytes:
        """Blocks until somebody has set it. Raises TaskOver as soon as the task is, and DeadlineExceeded."""
        ...

    def get_all(self, keys: Sequence[str], *, limit_s: float) -> list[bytes]:
        """Several at once, in their order, within one limit: one question instead of one after the other."""
        ...


class Duties(Protocol):
    """A job as the thread that trains sees it."""

    def declare(self, terms: Terms) -> None:
        """Says by what this member trains, before its first task is asked for. Not blocking."""
        ...

    def next_task(self) -> Task:
        """Blocks until there is one. Raises nothing of the job: its end is a Stop, the loss of the coordinator too."""
        ...

    def done(self, task: Task, outcome: TaskOutcome) -> None:
        """What came of it; of no effect where the task is over. Not blocking."""
        ...

    def exchange(self, task: Task) -> Exchange:
        """That of the view of this task."""
        ...

    def on_interrupt(self, call: Callable[[], None]) -> None:
        """`call()` from the thread that hears so, quick and raising nothing, whenever a task that is being carried out is over,
        and when a view is whole: what the thread that trains waits for of an older one must end now. Replaces the one
        before."""
        ...

    def on_leaving(self, call: Callable[[], None]) -> None:
        """`call()` from the thread that trains, when the user's `with` block is left without an error and the job is not over:
        it says LoopEnded, and carries out tasks until a Stop. Replaces the one before."""
        ...

    def began(self) -> None:
        """The first microbatch of a Compute begins, of a step or an evaluation; counts as progress. Not blocking."""
        ...

    def progress(self) -> None:
        """Something moved: a microbatch, a piece of a stage. Cheap."""
        ...

    def own_code(self) -> AbstractContextManager[None]:
        """Around what waits for no other member: the user's loader and modules. Who stands still in there is the one who is
        stalled; who stands still outside of it waits for somebody. The phase OWN_CODE, where no other is declared. Cheap."""
        ...

    def loop_body(self) -> AbstractContextManager[None]:
        """Around what the user does between two steps: it waits for no other member, and has no limit but that of a phase that
        is declared."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Within `loop_body`, around what waits for others."""
        ...

    def phase(self, name: str, *, limit_s: float | None = None) -> AbstractContextManager[None]:
        """A declared phase: from progress to progress within it at most `limit_s` seconds, by default what its own history
        says."""
        ...


class Ladder(Protocol):
    """Chooses what lost stages are rebuilt from; in the coordinator's process, in a thread of its own, one call at a time."""

    def choose(self, order: Choose, last: Commit | None) -> tuple[Chosen, tuple[Considered, ...]]:
        """`last`: the newest commit of the job, with the norms by stage. Where the job has not begun, `order.begins`: the
        sources of all stages by `rollback` to the newest checkpoint, or none where there is no checkpoint. May read storage.
        Blocking.

        An error that it raises ends the job, `superseded` with 76.
        """
        ...

    def close(self) -> None:
        """No more questions. The run, if it holds one, is let go."""
        ...


LadderOf = Callable[[Terms, int], Ladder]  # by what the members train, and the number of stages
