"""How a save beside training goes on one rank, and what follows from each failure in each state. `TABLE` drives it.

    captured --asked--> agreeing --opened--> open --handed over--> writing --written--> attested --committed--> ended
       |                   |                  '----> withdrawn <-----'                     |                      ^
       '-------------------'-------------------------------'-------------------------------'----------------------'

A failure is this rank's own (`failed`), one of the thread that trains while it copies (`not staged`), one of its writer (`not
written`), or one that all ranks are told of by one report (`reported`). A row says who tells the others, and when the arena is
free. What has no row is a fault of this library, and ends the save: nothing goes on by default.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class SaveState(StrEnum):
    CAPTURED = "captured"  # this rank has a proposal, or a reason why not; no other rank was asked
    AGREEING = "agreeing"  # the ranks talk, and nothing exists
    OPEN = "open"  # the attempt exists; this rank's writer has nothing of it
    WRITING = "writing"  # its writer has its share, of which the thread that trains may still copy a part
    ATTESTED = "attested"  # this rank's share is written; the writers decide
    WITHDRAWN = "withdrawn"  # this rank takes no part any more; the writers decide
    ENDED = "ended"  # the handle has its outcome
    LET_GO = "let go"  # and its writer, which still wrote then, reads its arena no more


class Event(StrEnum):
    ASKED = "asked"  # the thread beside training takes it up
    OPENED = "opened"
    HANDED_OVER = "handed over"  # a portion; more may come
    WRITTEN = "written"  # the last portion
    COMMITTED = "committed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # the thread that trains, before any rank was asked
    NOT_STAGED = "not staged"
    NOT_WRITTEN = "not written"
    REPORTED = "reported"


class TellOthers(StrEnum):
    """How the other ranks learn of it."""

    NOBODY = "nobody"  # there is nothing to tell, or they know
    SILENCE = "silence"  # this rank does not make the call: they wait for it as for one that is late
    ROUND = "round"  # it is this rank's part in a round
    LEAVE = "leave"  # this rank leaves the rounds, if no report did; of an attempt that it made nothing is left
    WITHDRAW = "withdraw"  # its writer votes that it failed
    ITS_WRITER = "its writer"  # has voted that it failed


class Room(StrEnum):
    """When the arena is free for the next save, once nobody copies into it."""

    KEPT = "kept"
    FREE = "free"
    WHEN_READ = "when read"  # when the writer has let it go, which is told to end


@dataclass(frozen=True, slots=True)
class Transition:
    then: SaveState
    tell: TellOthers = TellOthers.NOBODY
    room: Room = Room.KEPT


TABLE: Mapping[tuple[SaveState, Event], Transition] = {
    (SaveState.CAPTURED, Event.ASKED): Transition(SaveState.AGREEING),
    (SaveState.CAPTURED, Event.FAILED): Transition(SaveState.CAPTURED, TellOthers.ROUND),
    (SaveState.CAPTURED, Event.INTERRUPTED): Transition(SaveState.ENDED, TellOthers.SILENCE, Room.FREE),
    (SaveState.AGREEING, Event.OPENED): Transition(SaveState.OPEN),
    (SaveState.AGREEING, Event.FAILED): Transition(SaveState.ENDED, TellOthers.LEAVE, Room.FREE),
    (SaveState.AGREEING, Event.NOT_STAGED): Transition(SaveState.AGREEING, TellOthers.ROUND),
    (SaveState.AGREEING, Event.REPORTED): Transition(SaveState.ENDED, TellOthers.LEAVE, Room.FREE),
    (SaveState.OPEN, Event.HANDED_OVER): Transition(SaveState.WRITING),
    (SaveState.OPEN, Event.FAILED): Transition(SaveState.WITHDRAWN, TellOthers.WITHDRAW, Room.FREE),
    (SaveState.OPEN, Event.NOT_STAGED): Transition(SaveState.WITHDRAWN, TellOthers.WITHDRAW, Room.FREE),
    (SaveState.OPEN, Event.REPORTED): Transition(SaveState.WITHDRAWN, TellOthers.WITHDRAW, Room.FREE),
    (SaveState.WRITING, Event.HANDED_OVER): Transition(SaveState.WRITING),
    (SaveState.WRITING, Event.WRITTEN): Transition(SaveState.ATTESTED, TellOthers.NOBODY, Room.FREE),
    # Its writer takes nothing more:
    (SaveState.WRITING, Event.FAILED): Transition(SaveState.WITHDRAWN, TellOthers.WITHDRAW, Room.FREE),
    (SaveState.WRITING, Event.NOT_STAGED): Transition(SaveState.WITHDRAWN, TellOthers.WITHDRAW, Room.WHEN_READ),
    (SaveState.WRITING, Event.NOT_WRITTEN): Transition(SaveState.WITHDRAWN, TellOthers.ITS_WRITER, Room.FREE),
    (SaveState.WRITING, Event.REPORTED): Transition(SaveState.ENDED, TellOthers.NOBODY, Room.WHEN_READ),
    (SaveState.ATTESTED, Event.COMMITTED): Transition(SaveState.ENDED),
    (SaveState.ATTESTED, Event.REPORTED): Transition(SaveState.ENDED),
    (SaveState.WITHDRAWN, Event.REPORTED): Transition(SaveState.ENDED),
    (SaveState.WITHDRAWN, Event.COMMITTED): Transition(SaveState.ENDED),  # its writer had attested before it was given up
    (SaveState.ENDED, Event.WRITTEN): Transition(SaveState.LET_GO, TellOthers.NOBODY, Room.FREE),
    (SaveState.ENDED, Event.NOT_WRITTEN): Transition(SaveState.LET_GO, TellOthers.NOBODY, Room.FREE),
}


class IllegalStep(RuntimeError):
    """Our own mistake: what the table does not have."""


class SaveProgress:
    """Where one save is. Safe from any thread."""

    def __init__(self) -> None:
        self._state = SaveState.CAPTURED
        self._changing = threading.Lock()

    @property
    def state(self) -> SaveState:
        return self._state

    def advance(self, event: Event) -> Transition:
        """What follows. Raises IllegalStep, and stays, where the table has no row."""
        with self._changing:
            row = TABLE.get((self._state, event))
            if row is None:
                raise IllegalStep(f"a save that is {self._state} and then {event}")
            self._state = row.then
            return row

    def end(self) -> SaveState:
        """It has ended, whatever the table says; the state before."""
        with self._changing:
            before, self._state = self._state, SaveState.ENDED
            return before
