"""What a save reports of the checkpoint that it made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint at `path`, absolute or a URL. `nbytes` counts array bytes of all ranks; times in seconds, of
    this rank.

    `attempt` identifies this try to write it; `notes` say what else was found or done (drafts swept or left). `stall_s` is how
    long the call kept its caller: of a save that blocks all of it, of one beside training what staging took. A large state is
    written while it is staged: `write_s` then begins within `stall_s`.
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
