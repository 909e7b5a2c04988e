"""The run of a job, held by its coordinator: claimed at the start and at each rollback, answered for, its checkpoints listed.

Members save into the epoch that is claimed here; they claim nothing themselves, so that a member can be lost like any other. No
torch.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from elastickpt.commit.draft import marked
from elastickpt.elastic.messages import Terms
from elastickpt.errors import CheckpointError
from elastickpt.ledger.branch import entries_of
from elastickpt.ledger.epochs import claim, start
from elastickpt.ledger.history import is_claimed_by
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.stored import read_view
from elastickpt.ledger.unregistered import require_registers
from elastickpt.loading.opened import open_in
from elastickpt.runs.answering import Answering
from elastickpt.runs.trainer_address import claimer, require_no_living_trainer
from elastickpt.storage.opening import open_store, path_in

log = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Newest:
    """A checkpoint of the live branch."""

    id: AttemptId
    path: str

    @property
    def step(self) -> int:
        return self.id.step


class HeldRun:
    """The run of a job that trains by these terms; its folder exists. Blocking; by one thread at a time."""

    def __init__(self, terms: Terms) -> None:
        self._terms, self._store = terms, open_store(terms.run)
        self._answering = Answering()
        self._tokens: tuple[str, ...] = ()
        self._continued: AttemptId | None = None
        self._epoch = 0

    @property
    def epoch(self) -> int | None:
        """That of this job's newest claim; None before the first one."""
        return self._epoch or None

    def newest(self, *, up_to: int | None, refused: Collection[str]) -> Newest | None:
        """The newest checkpoint of the live branch, of at most `up_to` steps, that is none of the `refused` paths; None where
        there is none. Raises StorageFailed kinds, Damaged kinds for objects that say what counts."""
        for entry in entries_of(complete(read_view(self._store))):
            path = path_in(self._store, entry.folder)
            readable = entry.state == "live" and entry.commit is not None and path not in refused
            if readable and (up_to is None or entry.step <= up_to):
                return Newest(entry.id, path)
        return None

    def norms(self, newest: Newest) -> dict[int, float]:
        """The gradient norms by stage that the checkpoint holds; none where it cannot be read, or another trainer saved it."""
        try:
            opened = open_in(self._store, newest.id.folder)
        except CheckpointError:
            return {}
        values = opened.manifest.values
        found = values.get("/elastic") if isinstance(values, dict) else None
        norms = found.get("norms") if isinstance(found, dict) else None
        return {int(stage): float(norm) for stage, norm in norms.items()} if isinstance(norms, dict) else {}

    def go_on_from(self, continued: Newest | None) -> int:
        """The live branch goes on from there, in an epoch of this job's own: its number. A second call from the same place
        changes nothing. Raises RunBusy, Refused for a run whose registers are lost, Superseded, StorageFailed kinds."""
        wanted = None if continued is None else continued.id
        if self._epoch and wanted == self._continued:
            return self._epoch
        if not self._epoch:
            self._require_ours_to_take()
            self._wait_for_orphans()
        token = secrets.token_hex(16)
        self._answering.answer_for(token)
        if not complete(is_claimed_by(self._store, self._tokens)):
            self._require_ours_to_take()
        complete(require_registers(self._store))
        holding = complete(claim(self._store, claimer(self._answering.address, token)))
        complete(start(self._store, holding, continued=wanted, keep=self._terms.keep))
        self._tokens, self._continued, self._epoch = (*self._tokens, token), wanted, holding.epoch
        where = "nothing" if continued is None else continued.path
        log.info("%s: epoch %d goes on from %s", self._terms.run, holding.epoch, where)
        return holding.epoch

    def close(self) -> None:
        """Nobody answers for the run any more."""
        self._answering.close()

    def _require_ours_to_take(self) -> None:
        """Raises RunBusy where another job has the run, unless it is to be taken over."""
        if not self._terms.take_over:
            complete(require_no_living_trainer(self._store))

    def _wait_for_orphans(self) -> None:
        until = time.monotonic() + self._terms.orphans_s
        while marked(self._store.url) and time.monotonic() < until:
            time.sleep(_POLL_S)
