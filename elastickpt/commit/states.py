"""The life of one attempt to write a checkpoint, as a table. [SAVE-3, SAVE-50..55, SAVE-60]

1. Nothing is a checkpoint before `committed`; a crash in any other state leaves a draft, which no reader takes.
2. Any failure in any state before `committed` leads to `aborted`; there is no way back, the next attempt is another one.
3. `prove` needs every writer's attestation; `record` writes index and manifest once, exclusively; `publish` is one rename.
4. After `committed` nothing is undone: an error while the rename is made durable is reported as such.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    PLANNED = "planned"  # structure agreed, path free
    DRAFTED = "drafted"  # draft folder and token exist; writers write
    ATTESTED = "attested"  # every writer's fragment file is durable
    PROVEN = "proven"  # every element of every array is stored exactly once
    RECORDED = "recorded"  # index, documents and manifest are durable in the draft
    COMMITTED = "committed"  # the draft was renamed to the path
    ABORTED = "aborted"


class Event(StrEnum):
    DRAFT = "draft"
    ATTEST = "attest"
    PROVE = "prove"
    RECORD = "record"
    PUBLISH = "publish"
    FAIL = "fail"


TABLE: dict[tuple[State, Event], State] = {
    (State.PLANNED, Event.DRAFT): State.DRAFTED,
    (State.DRAFTED, Event.ATTEST): State.ATTESTED,
    (State.ATTESTED, Event.PROVE): State.PROVEN,
    (State.PROVEN, Event.RECORD): State.RECORDED,
    (State.RECORDED, Event.PUBLISH): State.COMMITTED,
    (State.PLANNED, Event.FAIL): State.ABORTED,
    (State.DRAFTED, Event.FAIL): State.ABORTED,
    (State.ATTESTED, Event.FAIL): State.ABORTED,
    (State.PROVEN, Event.FAIL): State.ABORTED,
    (State.RECORDED, Event.FAIL): State.ABORTED,
}


class IllegalStep(RuntimeError):
    """Our own mistake: an event that the table does not have."""


class Attempt:
    """Where one attempt stands. Only the committer keeps one."""

    def __init__(self) -> None:
        self._state = State.PLANNED

    @property
    def state(self) -> State:
        return self._state

    def advance(self, event: Event) -> State:
        """The next state. Raises IllegalStep, and stays, for an event that the table does not have here."""
        after = TABLE.get((self._state, event))
        if after is None:
            raise IllegalStep(f"{event} in state {self._state}")
        self._state = after
        return after
