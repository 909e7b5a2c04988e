"""The live branch: the chain of commits that counts for `restore`, `@step`, retention and "newest". [RUN-58, RUN-60..63]

From the newest epoch that has started: its commits by falling step, then the commit that it continued from and what is below
that one in its epoch, then what that epoch continued from, and so on. Commits that count but lie off this chain are abandoned:
a rollback, or a start that skipped them, went another way.

`RUN/latest` is a symbolic link for people that names the folder of the newest checkpoint; nothing here follows it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import MissingFile, NotACheckpoint
from elastickpt.ledger.names import LATEST, AttemptId
from elastickpt.ledger.objects import NOW, Operations, complete
from elastickpt.ledger.records import CommitRegister, Metrics
from elastickpt.ledger.stored import RunView, read_view
from elastickpt.storage.links import replace_link
from elastickpt.storage.opening import open_store
from elastickpt.storage.store import Store

BranchState = Literal["live", "abandoned"]
SHOWN_STEPS = 6  # of a branch, in a message


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """A checkpoint of a run. `metrics` are those of its commit and later ones; `commit` is None, and `problem` says why,
    where it cannot be loaded: its register is not what was written, or its folder is gone."""

    id: AttemptId
    state: BranchState
    commit: CommitRegister | None
    metrics: Metrics = ()
    problem: str = ""

    @property
    def step(self) -> int:
        return self.id.step

    @property
    def epoch(self) -> int:
        return self.id.epoch

    @property
    def attempt(self) -> int:
        return self.id.attempt

    @property
    def folder(self) -> str:
        """In the run's root."""
        return self.id.folder

    @property
    def nbytes(self) -> int | None:
        """Of its arrays."""
        return None if self.commit is None else self.commit.nbytes

    @property
    def time(self) -> float | None:
        """Of its commit, in seconds since 1970."""
        return None if self.commit is None else self.commit.time


def history(root: str | os.PathLike[str]) -> tuple[CommitEntry, ...]:
    """All commits of the run at `root` that count: the live branch, newest first, then abandoned ones, newest first.

    Blocking; reads small objects only. Raises NotACheckpoint where there is no `root`, StorageFailed kinds, Damaged kinds.
    """
    try:
        store = open_store(os.fspath(root))
    except MissingFile as error:
        raise NotACheckpoint(f"{os.fspath(root)}: expected the folder of a run, found nothing") from error
    return entries_of(complete(read_view(store)))


def live_branch(view: RunView) -> tuple[AttemptId, ...]:
    """The live branch, newest first."""
    by_epoch: dict[int, dict[int, AttemptId]] = {}
    for one in sorted((commit.id for commit in view.commits), reverse=True):
        by_epoch.setdefault(one.epoch, {})[one.step] = one  # of two at one step, which no writer makes, the first attempt
    chain: list[AttemptId] = []
    epoch, highest = max(view.starts, default=0), None
    while epoch in view.starts:
        found = by_epoch.get(epoch, {})
        chain += [found[step] for step in sorted(found, reverse=True) if highest is None or step <= highest]
        continued = view.starts[epoch]
        if continued is None:
            break
        epoch, highest = continued.epoch, continued.step
    return tuple(chain)


def entries_of(view: RunView) -> tuple[CommitEntry, ...]:
    """What `history` returns, of a view."""
    by_id = {commit.id: commit for commit in view.commits}
    live = live_branch(view)
    abandoned = sorted(set(by_id) - set(live), key=lambda one: (one.epoch, one.step, one.attempt), reverse=True)
    entries = []
    for attempt in (*live, *abandoned):
        state: BranchState = "live" if attempt in live else "abandoned"
        commit, metrics = by_id[attempt], view.metrics.get(attempt, ())
        if isinstance(commit, CommitRegister):
            entries.append(CommitEntry(attempt, state, commit, metrics))
        else:
            entries.append(CommitEntry(attempt, state, None, metrics, commit.why))
    return tuple(entries)


def at_step(entries: Sequence[CommitEntry], *, step: int, epoch: int | None = None) -> CommitEntry:
    """The checkpoint of a step on the live branch, or the one of a named epoch. Raises NotACheckpoint, naming what there is."""
    found = [one for one in entries if one.step == step and (one.state == "live" if epoch is None else one.epoch == epoch)]
    if found:
        return found[0]
    off = [str(one.epoch) for one in entries if one.step == step]
    hint = f"; epoch {', '.join(off)} has it: name the epoch to take it" if off else ""
    where = "on the live branch" if epoch is None else f"in epoch {epoch}"
    near = [one.step for one in entries if (one.state == "live" if epoch is None else one.epoch == epoch)]
    has = f"{'the live branch' if epoch is None else 'it'} has {nearest_text(near, step)}"
    raise NotACheckpoint(f"step {step}: no commit {where}; {has}{hint}")


def nearest_text(steps: Sequence[int], step: int) -> str:
    """The steps, falling; of many the nearest to `step`, and how many there are."""
    near = sorted(sorted(steps, key=lambda one: (abs(one - step), one))[:SHOWN_STEPS], reverse=True)
    shown = ", ".join(map(str, near)) or "none"
    return shown if len(near) == len(steps) else f"{len(steps)} steps, the nearest {shown}"


def point_latest(store: Store) -> Operations[AttemptId | None]:
    """The link names the newest checkpoint of the live branch that stands, as of now; without one there is no link.

    For after a commit, a start, a removal. Returns what it names; None also where the store has no links, or something that is
    no link has the name, which stays. Raises StorageFailed kinds, which cost nobody anything, Damaged kinds as reading a run.
    """
    entries = entries_of((yield from read_view(store)))
    newest = next((one.id for one in entries if one.state == "live" and one.commit is not None), None)
    yield NOW
    linked = replace_link(store, LATEST, None if newest is None else newest.folder)
    return newest if linked else None
