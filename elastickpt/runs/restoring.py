"""Taking a run over: wait for what earlier writers have staged, claim, load the newest checkpoint that verifies. [RUN-31..37]

ask       rank 0: no living trainer holds the run
orphans   every rank: waits until no writer of an earlier job works on this run on its host
claim     rank 0: still none does, and no register is lost; claims it; reads what counts
manifest  rank 0, for each candidate, newest first: its manifest is what its register says
(load)    all ranks: a candidate that is damaged is passed over on all of them alike
start     rank 0: the live branch goes on from there
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastickpt.commit.draft import marked
from elastickpt.errors import CheckpointError, Damaged, NotACheckpoint, StorageFailed, fault
from elastickpt.ledger.branch import CommitEntry, at_step, entries_of
from elastickpt.ledger.epochs import Holding, claim, remember, start
from elastickpt.ledger.history import is_claimed_by
from elastickpt.ledger.names import AttemptId, parse_id
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Claimer, Found, PassedOver
from elastickpt.ledger.retention import Keep, words_of
from elastickpt.ledger.stored import read_view
from elastickpt.ledger.unregistered import kept_note, require_registers
from elastickpt.loading.session import UNDEFINED, LoadReport, Strict, load
from elastickpt.ranks.messages import Message
from elastickpt.ranks.team import Call, Question, Team, first_does
from elastickpt.runs.trainer_address import require_no_living_trainer
from elastickpt.storage.opening import path_in
from elastickpt.storage.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

POLL_S = 0.05
MAX_PASSED = 1000  # commits of which the run remembers that they were passed over, the newest ones
MAX_MESSAGE = 500  # characters of what is remembered of each


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that was newer than the one taken, and the error for which it was not: its kind and message."""

    id: AttemptId
    path: str
    kind: str
    reason: str

    @property
    def step(self) -> int:
        return self.id.step


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a job goes on.

    Attributes:
        step: The number of completed steps; 0 where the run is empty.
        path: The checkpoint that was loaded, None for none.
        epoch: The epoch of this job.
        skipped: Newer checkpoints that were passed over, each with the reason.
        report: What was loaded.
        notes: What else was found.

    Examples:
        >>> with ek.Run("runs/llama", state) as run:
        ...     found = run.restore()
        >>> found.step, found.skipped
        (900, ())
    """

    step: int
    path: str | None
    epoch: int
    skipped: tuple[Skipped, ...] = ()
    report: LoadReport | None = None
    notes: tuple[str, ...] = ()

    def restore_streams(self) -> None:
        """Sets the random streams once more, as `LoadReport.restore_streams` does; nothing where the job begins at step 0.

        Raises:
            Refused: The checkpoint that was loaded has none.

        Examples:
            >>> with ek.Run("runs/streams", {"rng": ek.RNG()}) as run:
            ...     found = run.restore()
            >>> found.restore_streams()
        """
        if self.report is not None:
            self.report.restore_streams()


@dataclass(frozen=True, slots=True)
class WantedCommit:
    """What of the run is wanted: the newest that verifies, or that of a `step`; of a named `epoch` abandoned ones too."""

    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    id: AttemptId
    path: str


class Claimed(Message, frozen=True):
    """What rank 0 tells of its claim: attempts as (id, path) in the order in which they are to be tried, those that cannot be
    opened as (id, path, why), notes."""

    epoch: int
    good: tuple[tuple[str, str], ...]
    broken: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


CLAIM = Question("claim", int, Claimed)  # each says how many writers of earlier jobs are left on its host


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of the candidates: the one that was taken, None where there were none; newer ones that were not; which of
    them are known to be whole, or not. One that the store could not read now is known to be neither."""

    taken: Candidate | None
    report: LoadReport | None = None
    skipped: tuple[Skipped, ...] = ()
    verified: Mapping[AttemptId, bool] = field(default_factory=dict)

    def found(self, now: float) -> Found:
        """This, as the run remembers it."""
        verified = self.taken is not None and self.verified.get(self.taken.id, False)
        passed = (PassedOver(one.id, one.kind, _excerpt(one.reason)) for one in self.skipped[:MAX_PASSED])
        return Found(now, verified, tuple(passed))


class Restoring:
    """One call of `Run.restore` on one rank. All ranks are asked the same questions."""

    def __init__(self, team: Team, store: Store, group: ProcessGroup | None, *, call: Call) -> None:
        self._team, self._store, self._group, self._call = team, store, group, call
        self.holding: Holding | None = None  # of member 0, once it has claimed

    def claim(
        self, by: Claimer, *, orphans_s: float, tokens: Collection[str], take_over: bool, choice: WantedCommit
    ) -> tuple[int, tuple[Candidate, ...], tuple[Skipped, ...], tuple[str, ...]]:
        """The epoch, the candidates in the order in which they are to be tried, those that cannot be opened at all, notes.

        `tokens`, on member 0: of this job's earlier claims; if the newest claim is one of them nobody is asked: a rollback,
        or a claim that came to no start. Raises, on all ranks alike, RunBusy, NotACheckpoint for a choice that is not there,
        Superseded, StorageFailed kinds.
        """
        notes: list[str] = []

        def ask() -> None:
            if not take_over and not complete(is_claimed_by(self._store, tokens)):
                complete(require_no_living_trainer(self._store))

        def take(orphans: Sequence[int]) -> Claimed:
            left = sum(orphans)
            own = complete(is_claimed_by(self._store, tokens))
            if left and not own:
                notes.append(f"{left} writers of an earlier job still work on the run; what they commit from now on is inert")
            if not own and not take_over:
                complete(require_no_living_trainer(self._store))
            beside = complete(require_registers(self._store)).beyond
            self.holding = complete(claim(self._store, by))
            entries = entries_of(complete(read_view(self._store)))
            wanted = _chosen(entries, choice, where=self._store.url)
            places = [(one, path_in(self._store, one.folder)) for one in wanted]
            good = tuple((str(one.id), path) for one, path in places if one.commit)
            broken = tuple((str(one.id), path, one.problem) for one, path in places if one.commit is None)
            notes.extend(kept_note(self._store, one) for one in beside)
            for note in notes:
                log.warning("%s: %s", self._store.url, note)
            return Claimed(self.holding.epoch, good, broken, tuple(notes))

        self._team.enter(self._call)
        if orphans_s:  # a job that lives has writers, too: nobody waits for those
            first_does(self._team, "ask", ask)
        told = CLAIM.ask(self._team, lambda: _wait_for_orphans(self._store, limit_s=orphans_s), take)
        candidates = tuple(Candidate(_id(text), path) for text, path in told.good)
        broken = tuple(Skipped(_id(text), path, Damaged.kind, why) for text, path, why in told.broken)
        return told.epoch, candidates, broken, told.notes

    def load_first(
        self,
        state: Mapping[str, object],
        mesh: DeviceMesh | None,
        candidates: Sequence[Candidate],
        broken: Sequence[Skipped],
        *,
        strict: Strict,
    ) -> Loaded:
        """The first candidate that loads whole, on all ranks the same; none if the run has no checkpoint. Raises Damaged if it
        has some, `broken` ones that cannot be opened among them, and none loads; StateMismatch kinds."""
        skipped: list[Skipped] = []
        verified: dict[AttemptId, bool] = {}
        undefined = ""
        for candidate in candidates:
            try:
                report = load(
                    state,
                    candidate.path,
                    process_group=self._group,
                    mesh=mesh,
                    strict=strict,
                    wait_limit_s=self._call.wait_limit_s,
                )
            except (Damaged, NotACheckpoint, StorageFailed) as problem:
                reason = problem.message.removesuffix(UNDEFINED)
                undefined = undefined or problem.message.removeprefix(reason)  # until another one loads
                skipped.append(Skipped(candidate.id, candidate.path, problem.kind, _as_text(reason)))
                if not isinstance(problem, StorageFailed):
                    verified[candidate.id] = False
                _tell_passed(skipped[-1:])
            else:
                newer = [one for one in broken if one.step > candidate.id.step]
                _tell_passed(newer)
                return Loaded(candidate, report, _by_step([*newer, *skipped]), verified | {candidate.id: True})
        bad = _by_step([*broken, *skipped])
        if bad:
            self._remember(Loaded(None, skipped=bad))
            newest = f"the newest: {bad[0].path}: {bad[0].reason}"
            raise Damaged(f"{self._store.url}: none of {len(bad)} checkpoints loads; {newest}{undefined}")
        return Loaded(None)

    def _remember(self, nothing: Loaded) -> None:
        """The run remembers what was found, though it does not start; a store that fails costs no more than that. [RUN-69]"""
        if self.holding is None:
            return
        try:
            complete(remember(self._store, self.holding, nothing.found(time.time())))
        except CheckpointError as problem:
            log.warning("%s: what this restore found cannot be remembered: %s", self._store.url, problem)

    def start(self, loaded: Loaded, *, keep: Keep) -> None:
        """The live branch goes on from what was loaded. With it the run remembers what was found on the way, and what the job
        keeps. [RUN-65, RUN-66]"""
        continued = None if loaded.taken is None else loaded.taken.id

        def begin() -> None:
            if self.holding is None:
                raise fault("expected a run to be started by whoever claimed it")
            found = loaded.found(time.time())
            complete(start(self._store, self.holding, continued=continued, keep=words_of(keep), found=found))

        self._team.enter(self._call)  # some may have loaded long before others
        first_does(self._team, "start", begin)


def _wait_for_orphans(store: Store, *, limit_s: float) -> int:
    """How many writers of earlier jobs are left on this host, after waiting for them."""
    until = time.monotonic() + limit_s
    said = False
    while True:
        left = len(marked(store.url))
        if not left or time.monotonic() >= until:
            return left
        if not said:
            said = True
            log.info("%s: waiting at most %g s for %d writers of an earlier job", store.url, limit_s, left)
        time.sleep(POLL_S)


def _tell_passed(skipped: Iterable[Skipped]) -> None:
    for one in skipped:
        log.warning("%s: passed over: %s", one.path, one.reason)


def _excerpt(message: str) -> str:
    valid = _as_text(message)
    return valid if len(valid) <= MAX_MESSAGE else f"{valid[: MAX_MESSAGE - 1]}…"


def _as_text(message: str) -> str:
    """What logs and records can hold: names of files may be no valid text."""
    return message.encode(errors="backslashreplace").decode()


def _by_step(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    return tuple(sorted(skipped, key=lambda one: -one.step))


def _chosen(entries: Sequence[CommitEntry], choice: WantedCommit, *, where: str) -> list[CommitEntry]:
    if choice.step is None:
        return [one for one in entries if one.state == "live"]
    try:
        return [at_step(entries, step=choice.step, epoch=choice.epoch)]
    except NotACheckpoint as problem:
        raise NotACheckpoint(f"{where}: {problem.message}") from None


def _id(text: str) -> AttemptId:
    found = parse_id(text)
    if found is None:
        raise fault(f"{text!r} is no attempt")
    return found
