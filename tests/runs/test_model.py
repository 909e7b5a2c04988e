"""The protocol as a model of a few lines: every order of an old writer and new jobs, each step one moment. [RUN-30, RUN-42]

The schedules of the real code say that the code does this; this one says that this is right, with more jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from elastickpt.ledger.epochs import counts
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.records import Adopted, Void

X = AttemptId(20, 1, 1)
Job = tuple[str, int, bool]  # where it is, its epoch, whether it saw X listed
FIRST = Adopted(1, "", 0, ())


class State(NamedTuple):
    writer: str
    jobs: tuple[Job, ...]
    claims: int
    adopted: tuple[Adopted | Void, ...]  # rising
    linked: bool
    acknowledged: bool


def newest(state: State, *, below: int = 99) -> Adopted:
    return [one for one in state.adopted if isinstance(one, Adopted) and one.epoch < below][-1]


def of(state: State, epoch: int) -> Adopted | Void | None:
    return next((one for one in state.adopted if one.epoch == epoch), None)


def put(state: State, record: Adopted | Void) -> tuple[Adopted | Void, ...]:
    """Exclusive creation."""
    if of(state, record.epoch) is not None:
        return state.adopted
    return tuple(sorted((*state.adopted, record), key=lambda one: one.epoch))


def writer_steps(state: State) -> Iterator[State]:
    decided = of(state, state.claims)
    if state.writer == "link":
        yield state._replace(writer="look", linked=True)
    elif state.writer == "look":
        yield state._replace(writer="done", acknowledged=True) if state.claims == 1 else state._replace(writer="wait")
    elif state.writer == "wait" and isinstance(decided, Adopted):
        yield state._replace(writer="done", acknowledged=X in decided.commits)


def job_steps(state: State, number: int, *, closing: bool) -> Iterator[State]:
    where, epoch, saw = state.jobs[number]

    def then(job: Job, **more: object) -> State:
        return state._replace(jobs=(*state.jobs[:number], job, *state.jobs[number + 1 :]), **more)

    open_below = [k for k in range(1, epoch) if of(state, k) is None]
    if where == "begin":
        yield then(("claimed", state.claims + 1, False), claims=state.claims + 1)
    elif where == "claimed" and closing and open_below:
        yield then(("claimed", epoch, False), adopted=put(state, Void(open_below[0], epoch)))
    elif where == "claimed":
        yield then(("listed", epoch, state.linked))
    elif where == "listed":
        below = newest(state, below=epoch)
        taken = (X,) if saw and counts(X, below) else ()
        yield then(("over", epoch, saw), adopted=put(state, Adopted(epoch, "", below.epoch, taken)))


def explore(jobs: int, *, closing: bool, broken: Callable[[State], bool]) -> tuple[int, int]:
    """Number of states, and how many of them are broken."""
    pending = [State("link", (("begin", 0, False),) * jobs, 1, (FIRST,), False, False)]
    known = set(pending)
    found = 0
    while pending:
        state = pending.pop()
        found += broken(state)
        steps = [*writer_steps(state), *(one for n in range(jobs) for one in job_steps(state, n, closing=closing))]
        fresh = {one for one in steps if one not in known}
        known |= fresh
        pending += fresh
    return len(known), found


def lost(state: State) -> bool:
    return state.acknowledged and not counts(X, newest(state))


def back(state: State) -> bool:
    left_out = [one for one in state.adopted if isinstance(one, Adopted) and one.epoch > 1 and X not in one.commits]
    return bool(left_out) and state.linked and counts(X, newest(state))


@pytest.mark.parametrize("broken", [lost, back])
def test_nothing_acknowledged_is_lost_and_nothing_comes_back(broken: Callable[[State], bool]) -> None:
    states, found = explore(3, closing=True, broken=broken)
    assert states > 1000
    assert found == 0


def test_a_job_that_does_not_close_older_claims_brings_commits_back() -> None:
    assert explore(3, closing=False, broken=back)[1] > 0
