"""What a save reports of the checkpoint that it made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        path: Absolute, or a URL.
        step: As it was given.
        attempt: Identifies this try to write it.
        nbytes: Bytes of arrays of all ranks.
        arrays: How many arrays.
        plan_s: Seconds of this rank until it wrote; all times are this rank's.
        write_s: Seconds that it wrote. A large state is written while it is staged: this then begins within `stall_s`.
        commit_s: Seconds from then to the commit.
        stall_s: How long the call kept its caller: a blocking save for all of it, one beside training while it staged.
        notes: What else was found or done, such as drafts that were swept or left.
    """

    path: str
    step: int | None
    attempt: str
    nbytes: int
    arrays: int
    plan_s: float
    write_s: float
    commit_s: float
    stall_s: float
    notes: tuple[str, ...] = ()
