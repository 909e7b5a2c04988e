"""One save on one rank, in the order in which it happens: whether it blocks, or goes on beside training.

    capture   what this rank holds of the state; nothing is asked of others                           structures.py
    agree     all ranks hold one structure, and each has its plan of what it writes                      agree.py
    open      the attempt exists: member 0 has made its draft, and every rank is told of it              commit/attempt.py
    write     bytes come from a source, go into files, are made durable, are attested                    writer/share.py
    commit    of all attestations the checkpoint comes to exist, or nothing does, on all ranks alike     commit/outcome.py

The two forms differ in their source, and in who writes and commits. A save that blocks (`save.py`) writes from live tensors,
and member 0 commits at the end of one more round. One beside training (`beside.py`) writes from an arena that is staged
meanwhile: it is handed to a writer, and the writers commit among themselves. From `open` on nothing needs torch, a process
group or a tensor: another source, and a destination, make another form.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import DraftContents
from elastickpt.commit.outcome import STANDS, abandon
from elastickpt.errors import CheckpointError, fault
from elastickpt.format.records import Placement
from elastickpt.format.typed_values import TypedValue, typed_values
from elastickpt.ranks.team import Question, Team
from elastickpt.saving.agree import Agreed, Offer, RoundHooks, agree
from elastickpt.saving.messages import Intention, OpenedAttempt, TypedValues, values_wanted
from elastickpt.saving.plan import own_tables
from elastickpt.saving.request import Request
from elastickpt.storage.opening import path_in
from elastickpt.writer.share import Share

log = logging.getLogger(__name__)

DRAFT = Question("draft", NoneType, OpenedAttempt)


def all_staged(intentions: Sequence[Intention]) -> bool:
    """Whether nothing is left to be staged."""
    return all(intention.staged for intention in intentions)


class Pipeline:
    """One rank's way to its share of an attempt. Every method is called on all ranks, and raises the same on all of them, but
    for what is said otherwise."""

    offer: Offer  # from the first round on
    agreed: Agreed  # once the ranks agreed
    opened: OpenedAttempt  # once the attempt is open
    path: str  # of the checkpoint, as people write it; likewise

    def __init__(
        self,
        team: Team,
        request: Request,
        *,
        arena_nbytes: int | None = None,
        ready: Callable[[Sequence[Intention]], bool] = all_staged,
    ) -> None:
        """`ready` says of what the ranks mean to save whether they may write as soon as they agree."""
        self._ready = ready
        self.team, self.request = team, request
        self.notes: tuple[str, ...] = ()
        self._arena_nbytes = arena_nbytes
        self._made: Attempt | None = None  # on member 0: it is to be ended, whatever happens

    # -- capture, agree ------------------------------------------------------------------------------------------------

    def agree(self, capture: Callable[[], Offer], *, take_seats: Callable[[], None] = lambda: None) -> Agreed:
        """Nothing is written before all ranks agree. Blocking."""

        def offer() -> Offer:
            self.request.require_known()
            self.offer = capture()
            return self.offer

        self.agreed = agree(self.team, self.request, offer, RoundHooks(self._open_at_once, take_seats))
        return self.agreed

    # -- open ----------------------------------------------------------------------------------------------------------

    def open(self, before: Callable[[], None] = lambda: None) -> Attempt:
        """The attempt. `before` runs on every rank; if it fails on one, there is no attempt. Blocking: a round, unless the
        attempt was opened at once when the ranks agreed, which they do only if all are ready to write."""
        opened = self.agreed.opened or DRAFT.ask_each(
            self.team, before, lambda _: self._open(self.agreed.intentions, self.agreed.structure.placement)
        )
        attempt, lowered = opened.attempt.in_store(self.agreed.located.store)
        self.opened = OpenedAttempt(attempt, opened.wanted, opened.gathers)
        self.path = path_in(self.agreed.located.store, attempt.draft.name)
        self.notes = (*self.agreed.notes, *self.notes, *lowered)
        for note in self.notes if self.team.member == 0 else ():
            log.warning("%s: %s", self.path, note)
        for note in self.agreed.placed:
            log.info("%s: %s", self.path, note)
        self.notes = (*self.notes, *self.agreed.placed)
        return attempt

    def _open_at_once(self, intentions: Sequence[Intention], placement: Placement) -> Sequence[OpenedAttempt | None]:
        return self._open(intentions, placement) if self._ready(intentions) else [None] * len(intentions)

    def _open(self, intentions: Sequence[Intention], placement: Placement) -> Sequence[OpenedAttempt]:
        """Member 0: the attempt is made, and what each member is told of it."""
        sections = self.offer.proposal.live.sections if placement == "plain" else ()
        self._made, self.notes = self.offer.located.open(sections, self.request.durability)
        wanted = values_wanted(intentions)
        return [OpenedAttempt(self._made, mine, any(wanted[1:])) for mine in wanted]

    # -- write, commit: what is written, and of what it is proven ------------------------------------------------------

    def share(self, replicated: Mapping[str, TypedValue] | None = None) -> Share:
        """What this rank brings to the attempt, on this rank alone. With replicated values its writer takes part in the
        decision."""
        live, structure, member = self.agreed.live, self.agreed.structure, self.team.member
        tables = own_tables(live, structure.shared, rank=self.team.ranks[member])
        written = structure.for_writer(self._arena_nbytes)
        return Share(self.opened.attempt, member, written, tables, dict(live.per_rank), replicated)

    def own_values(self) -> TypedValues:
        """The replicated values that are wanted of this rank, for member 0, on this rank alone."""
        values = self.offer.proposal.values
        return tuple((pointer, values[pointer].text) for pointer in self.opened.wanted)

    def replicated(self, told: Iterable[TypedValues]) -> Mapping[str, TypedValue]:
        """On member 0 all replicated values, once all have told theirs."""
        values = {pointer: TypedValue.told(text, pointer) for values in told for pointer, text in values}
        return values | typed_values(self.agreed.merged)

    def contents(self, told: Iterable[TypedValues]) -> DraftContents:
        """On member 0 what it knows of the checkpoint beside attestations."""
        outline = self.agreed.structure.outline
        if outline is None:
            raise fault("the committer has no structure of the whole job")
        return DraftContents(outline, self.replicated(told))

    def let_go(self) -> None:
        """The share is made: this holds the state no longer."""
        del self.offer, self.agreed

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def give_up(self, error: BaseException) -> None:
        """This rank goes no further: nothing is left of an attempt that it made and that is not committed, and the others need
        not wait if no round has told them. Raises nothing."""
        if self._made is not None and not isinstance(error, STANDS):
            abandon(self.offer.located.store, self._made, error)
        if not (isinstance(error, CheckpointError) and error.report):
            self.team.leave(error)
