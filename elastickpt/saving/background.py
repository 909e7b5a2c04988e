"""Saves beside training, on a thread of their own, one after the other: the rounds with the other ranks, then the writer.

prepare     as in `agree`; if all stage by a plan that they know and nothing else has to be asked, member 0 opens the attempt at
            its end
draft       else: every rank has staged or does so by a plan that it knew, member 0 opens the attempt
contents    only if a member has replicated values that member 0 lacks: those values

From the moment the attempt is open, a rank that cannot go on withdraws by its writer: so it ends alike on all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgpack

from elastickpt.commit.contents import Contents, encode_rest
from elastickpt.commit.draft import Draft, require_token
from elastickpt.commit.orders import Committed, Order
from elastickpt.errors import CheckpointError, Refused, StructureConflict, kinds
from elastickpt.format.canonical_json import dump
from elastickpt.format.encode_fragments import encode_fragments
from elastickpt.format.records import FragmentMap
from elastickpt.format.values import Value, decode_text, encode_value
from elastickpt.ledger.names import parse_id
from elastickpt.ranks.team import Team, failure_of
from elastickpt.saving.agree import Agreed, Offer, Steps, reach
from elastickpt.saving.destination import Located
from elastickpt.saving.fragments import own_tables
from elastickpt.saving.meeting import Writers
from elastickpt.saving.messages import Intention, values_wanted
from elastickpt.saving.plans import Known, Plans
from elastickpt.saving.task import Ordered, Task
from elastickpt.storage.opening import place_in
from elastickpt.storage.store import Durability
from elastickpt.writer.rounds import BLOCK_NBYTES
from elastickpt.writer.submissions import Submission

Ended = Callable[[Task, "Ordered | None", "Committed | BaseException"], None]

log = logging.getLogger(__name__)


class Background:
    """What goes on beside training for one `Saver`. `meet` gives the team, in a call of that save; `ended` is told how each one
    ended, on some thread, once."""

    def __init__(self, meet: Callable[[Task], Team], writers: Writers, plans: Plans, ended: Ended) -> None:
        self._meet, self._writers, self._plans, self._ended = meet, writers, plans, ended

    def carry_out(self, task: Task) -> None:
        """Agrees with the other ranks and hands over what was staged. Blocking; raises nothing."""
        team: Team | None = None
        try:
            team = self._meet(task)
            rounds = _Rounds(task, team, self._writers, self._plans)
            opened = rounds.open()
        except BaseException as error:
            if team is not None and not (isinstance(error, CheckpointError) and error.report):
                team.leave(error)  # it happened between rounds, so that the others must be told to wait no longer
            if isinstance(error, StructureConflict) and task.proposal is not None:
                self._plans.forget(task.proposal.digest)
            task.fail(error)
            task.give_up_slot()
            self._ended(task, None, error)
            return
        try:
            ordered = rounds.complete(opened)
            task.proposal = None  # it holds the tensors
            if len(ordered.known.prepared.rounds) > 1:
                task.ordered.set_result(ordered)  # who stages the rounds has them written, too
            else:
                self._submit(task, ordered)
        except BaseException as error:
            task.fail(error)
            self.withdraw(task, opened, error)

    def _submit(self, task: Task, ordered: Ordered) -> None:
        if task.staged.done():
            task.staged.result()
        submission = self.submit(task, ordered, 0, b"")
        task.times.submitted = time.perf_counter()

        def staged(future: Future[None]) -> None:
            if (error := future.exception()) is None:
                self.follow(task, ordered, submission)
            else:
                self.withdraw(task, ordered, error, writing=submission)

        task.staged.add_done_callback(staged)

    def submit(self, task: Task, ordered: Ordered, number: int, checksums: bytes) -> Submission:
        """Has a round written that is staged, or will be by the thread that trains. Blocking while a device copies."""
        slot = task.slot
        if slot is None:
            raise Refused("nothing was staged")
        if task.copies is not None:
            task.copies.wait()
            slot.arena.fill_to(ordered.known.prepared.rounds[number].nbytes)
        return self._writers.of(ordered.store).submit(ordered.round(number, checksums), slot.arena)

    def follow(self, task: Task, ordered: Ordered, submission: Submission) -> None:
        """The save ends as this round does, which is its last, or failed."""

        def written(_: object) -> None:
            task.times.written = time.perf_counter()
            task.give_up_slot()

        submission.future.add_done_callback(written)
        self._follow_decision(task, ordered, submission.decided)

    def withdraw(self, task: Task, ordered: Ordered, error: BaseException, *, writing: Submission | None = None) -> None:
        """This rank takes no part in the open attempt any more: it fails on all ranks. `writing` still reads the arena."""
        writer = self._writers.of(ordered.store)
        try:
            submission = writer.withdraw(ordered.round(0, b""), _plain(error))
        except BaseException as problem:
            error.add_note(f"and the other ranks could not be told: {problem}")
            self._ended(task, ordered, error)
        else:
            self._follow_decision(task, ordered, submission.decided)
        slot = task.slot
        if writing is None or slot is None:
            task.give_up_slot()
        else:
            task.slot = None
            writer.cancel(writing)  # behind the withdrawal, which says why
            writing.future.add_done_callback(lambda _: slot.release())

    def _follow_decision(self, task: Task, ordered: Ordered, decided: Future[Committed]) -> None:
        def end(future: Future[Committed]) -> None:
            error = future.exception()
            self._ended(task, ordered, error if error is not None else future.result())

        decided.add_done_callback(end)


class _Rounds:
    """One save's rounds on one rank."""

    located: Located  # these once the ranks agreed
    agreed: Agreed

    def __init__(self, task: Task, team: Team, writers: Writers, plans: Plans) -> None:
        self.task, self.team, self.writers, self.plans = task, team, writers, plans
        self.notes: tuple[str, ...] = ()
        self.wanted: tuple[str, ...] = ()
        self.gathers = False
        self.time = time.time()  # on member 0 of the checkpoint; fixed now, so that whoever commits it writes the same

    def open(self) -> Ordered:
        """The attempt is open, and this rank has staged, or is going to in rounds. Raises the same on all ranks."""
        task, team = self.task, self.team
        steps = Steps(self._open_at_once, lambda: self.writers.take_seats(team, self.located.store))
        self.agreed = agreed = reach(team, task.request, self._offer, steps)
        self.notes += agreed.notes
        reply = agreed.opened or team.round("draft", self._stage, lambda _: self._open(agreed.intentions))
        folder, register, metrics, self.wanted, self.gathers = msgpack.unpackb(reply, use_list=False)
        if ignored := sorted({name for name, _ in task.destination.metrics} - {name for name, _ in metrics}):
            said = "%s: %s: these metrics of this rank are ignored, as rank 0 gave none of that name"
            log.warning(said, task.handle.path, ", ".join(ignored))
        order = Order(parse_id(register) if register else None, metrics=metrics)
        draft, store = Draft(*folder), agreed.store
        path = place_in(store, draft.name)
        return Ordered(self._learn(), store.url, draft, self._promised(), b"", order, path, self.notes)

    def _offer(self) -> Offer:
        task = self.task
        if task.failure is not None:
            raise task.failure
        task.request.require_known()
        self.located = located = task.destination.locate()
        self.writers.require_reachable(located.store)
        if task.proposal is None:
            raise Refused("nothing was captured")
        staged = "" if task.known is None else task.known.id
        seated = self.writers.seated(located.store.url)
        return Offer(task.proposal, located.store, located.name, located.require_free, staged, seated, task.hashed)

    def _stage(self) -> bytes:
        """What this rank has to do before the attempt is opened. One that stages by a plan that it knew may still do so after
        it: should that fail, it withdraws."""
        task, known = self.task, self._learn()
        if task.staged.done() or (len(known.prepared.rounds) == 1 and task.known is None):
            task.staged.result()
        return b""

    def _learn(self) -> Known:
        """The plan by which this rank stages, for which the thread that trains may be waiting."""
        task = self.task
        if not task.agreed.done():
            task.agreed.set_result(task.known or self.plans.learn(_digest(task), self.agreed))
        return task.agreed.result()

    def _open_at_once(self, intentions: Sequence[Intention]) -> Sequence[bytes]:
        if not all(intention.staged for intention in intentions):
            return [b""] * len(intentions)
        return self._open(intentions)

    def _open(self, intentions: Sequence[Intention]) -> Sequence[bytes]:
        """Member 0: what each member is told of the attempt."""
        proposal = self.task.proposal
        opened = self.located.open(frozenset() if proposal is None else proposal.live.sections)
        self.notes += opened.notes
        draft, wanted = opened.draft, values_wanted(intentions)
        register = "" if opened.register is None else str(opened.register)
        head = ((draft.name, draft.folder, draft.attempt), register, self.task.destination.metrics)
        gathers = any(wanted[1:])
        return [bytes(msgpack.packb((*head, mine, gathers))) for mine in wanted]

    def _promised(self) -> Durability:
        """The durability asked for, lowered to what the store can do: it says so, and that is no failure."""
        able = self.agreed.store.capabilities
        if self.task.request.durability == "power" and not able.directory_sync:
            self.notes += (f"durability 'process' instead of 'power': {able.name} lacks directory_sync",)
            return "process"
        return self.task.request.durability

    def complete(self, opened: Ordered) -> Ordered:
        """The attempt with all that this rank's writer has to know."""
        live, known, draft, order = self.agreed.live, opened.known, opened.draft, opened.order
        values = self._values(draft)  # what fails from here on need not be told in a round
        if (outline := known.structure.outline) is not None:
            rest = encode_rest(Contents(outline, self.task.request.step, self.time, values))
            order = Order(order.register, known.encoded_outline, rest, order.metrics)
        tables = own_tables(live, known.structure.shared, rank=self.team.ranks[self.team.member])
        per_rank = dict(live.per_rank) or None
        template = encode_fragments(FragmentMap(self.team.member, draft.attempt, BLOCK_NBYTES, (), (), tables, per_rank))
        return Ordered(known, opened.store, draft, opened.durability, template, order, opened.path, opened.notes)

    def _values(self, draft: Draft) -> dict[str, Value]:
        """This rank sees the draft. Member 0: all replicated values. A round, if others have some of them."""
        live, store = self.agreed.live, self.agreed.store
        found: dict[str, Value] = {}

        def own() -> bytes:
            require_token(store, draft)
            return bytes(msgpack.packb({p: dump(encode_value(live.values[p], where=p)) for p in self.wanted}))

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            for payload in payloads:
                for pointer, text in msgpack.unpackb(payload).items():
                    found[pointer] = decode_text(text, where=pointer)
            return [b""] * len(payloads)

        if self.gathers:
            self.team.round("contents", own, decide)
        else:
            require_token(store, draft)
            found = {pointer: live.values[pointer] for pointer in self.wanted}
        return found | dict(self.agreed.merged)


def _digest(task: Task) -> str:
    if task.proposal is None:
        raise Refused("nothing was captured")
    return task.proposal.digest


def _plain(error: BaseException) -> CheckpointError:
    """The error as other ranks can be told of it."""
    if isinstance(error, CheckpointError):
        return error
    failure = failure_of(error, 0)
    return kinds()[failure.kind](failure.message)
