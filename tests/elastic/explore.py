"""Every order of messages, acts and deaths of a small job, by the real coordinator and the real members.

A world is the job, its members, what is on its way between them, and the faults that are left. Channels keep their order; a
process that dies stops at once; its end is heard at any time after what it had said. Each successor of a world is one thing
that can happen next. Members join and begin the first step undisturbed, unless it is told to begin at the start.

Orders that cannot be told apart are gone through once: a message that the receiver ignores, as it names an older view, is
taken at once; so is one for a member that only waits, which a death before would be no different from one after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from elastickpt.elastic import coordination, membership
from elastickpt.elastic.job import Choose, Chosen, Gone, JobPhase, JobState, Register, Tell, Wait, WaitOver
from elastickpt.elastic.membership import (
    Compute,
    Computed,
    Duty,
    Erred,
    Failed,
    Form,
    LoopEnded,
    Made,
    Member,
    Mend,
    Mended,
    NotMended,
    TakeStep,
    Took,
)
from elastickpt.elastic.messages import Join, StageSource


@dataclass(frozen=True, slots=True)
class Faults:
    """How many of each may still happen. `breaks`: a connection closes though both its ends live. `hasty`: the coordinator's
    patience with members that cannot reach each other ends before it hears of the death that was the reason."""

    deaths: int = 0
    errors: int = 0
    bad_sources: int = 0
    breaks: int = 0
    hasty: int = 0


@dataclass(frozen=True, slots=True)
class World:
    job: JobState
    members: tuple[Member, ...]
    acts: tuple[Any, ...]
    to_job: tuple[tuple[Any, ...], ...]
    to_member: tuple[tuple[Any, ...], ...]
    dead: frozenset[int]
    ended: frozenset[int]  # dead, and the coordinator has not heard of it yet
    waits: frozenset[Any]
    faults: Faults
    commits: frozenset[int]
    registers: frozenset[tuple[int, int, str]]


class Broken(AssertionError):
    """A promise does not hold; the message has the way to it."""


@dataclass(slots=True)
class Explorer:
    """`stages` members and `spares`, `steps` steps, `rung` of lost stages, and what may go wrong."""

    stages: int
    spares: int
    steps: int
    faults: Faults
    rung: str = "stale"
    undisturbed: bool = True
    limit: int = 2_000_000
    seen: dict[World, tuple[World | None, str]] = field(default_factory=dict)
    ends: set[str] = field(default_factory=set)

    def run(self) -> int:
        """How many worlds there are. Raises Broken with the way to the first one that breaks a promise."""
        first = self._first()
        if self.undisturbed:
            first = self._begun(first)
        self.seen[first] = (None, "start")
        pending = [first]
        while pending:
            world = pending.pop()
            alive = False
            for text, make in self._moves(world):
                try:
                    new = make()
                    self._check(new)
                except (AssertionError, RuntimeError, KeyError, ValueError) as error:
                    raise Broken(f"{error!r}, after:\n  " + "\n  ".join([*self._way(world), text])) from error
                alive = alive or new != world
                if new not in self.seen:
                    self.seen[new] = (world, text)
                    pending.append(new)
            if not alive:
                self._settled(world)
            if len(self.seen) > self.limit:
                raise Broken(f"more than {self.limit} worlds")
        return len(self.seen)

    def _begun(self, world: World) -> World:
        """The first step is in flight; what could go wrong still can."""
        calm = replace(world, faults=Faults())
        while calm.job.phase is not JobPhase.WORKING:
            calm = next(make for text, make in self._moves(calm) if "is over" not in text)()
        return replace(calm, faults=self.faults)

    def _way(self, world: World) -> list[str]:
        way = []
        at: World | None = world
        while at is not None:
            at, text = self.seen[at]
            way.append(text)
        return way[::-1]

    def _first(self) -> World:
        count = self.stages + self.spares
        uids = [f"m{k}" for k in range(count)]
        return World(
            JobState(self.stages, epoch=1, max_losses_of_step=99),
            tuple(Member(uid) for uid in uids),
            (None,) * count,
            tuple((Join(uid, k, "host", "zone"),) for k, uid in enumerate(uids)),
            ((),) * count,
            frozenset(),
            frozenset(),
            frozenset(),
            self.faults,
            frozenset(),
            frozenset(),
        )

    # -- what can happen next

    def _moves(self, world: World) -> Iterator[tuple[str, Any]]:
        if world.job.phase is JobPhase.GATHERING and world.job.generation == 0:
            # members join one after the other, before anything goes wrong: their order is no story
            k = next(k for k, queue in enumerate(world.to_job) if queue)
            yield f"m{k} joins", lambda: self._hear(world, k)
            return
        for k, member in enumerate(world.members):
            if world.to_member[k] and world.acts[k] is None and member.duty is not Duty.ENDED:
                yield next(self._moves_of(world, k))
                return
        for k, queue in enumerate(world.to_job):
            if queue and coordination.after(world.job, (f"m{k}", queue[0])) == (world.job, ()):
                ignored = replace(world, to_job=_put(world.to_job, k, queue[1:]))
                yield f"coordinator ignores {queue[0]}", lambda ignored=ignored: ignored
                return
        for k, queue in enumerate(world.to_job):
            if queue:
                yield f"coordinator hears {queue[0]}", lambda k=k: self._hear(world, k)
        for wait in world.waits:
            hasty = bool(world.ended) and wait.of == "broken"
            if not hasty or world.faults.hasty:
                yield f"{wait} is over", lambda wait=wait, hasty=hasty: self._lose_patience(world, wait, hasty=hasty)
        for k in world.ended:
            if not world.to_job[k]:
                heard = replace(world, ended=world.ended - {k})
                yield f"coordinator hears of m{k}'s end", lambda k=k, heard=heard: self._decide(heard, Gone(f"m{k}", "exit", 9))
        for k in range(len(world.members)):
            if k not in world.dead:
                yield from self._moves_of(world, k)

    def _moves_of(self, world: World, k: int) -> Iterator[tuple[str, Any]]:
        member, act, faults = world.members[k], world.acts[k], world.faults
        if world.to_member[k]:
            message = world.to_member[k][0]
            rest = replace(world, to_member=_put(world.to_member, k, world.to_member[k][1:]))
            yield f"m{k} takes {message}", lambda: self._do(rest, k, message)
        for event in self._outcomes(member, act):
            yield f"m{k}: {event}", lambda event=event: self._do(world, k, event)
        if isinstance(act, Mend) and faults.bad_sources and any(s.stage == member.stage for s in act.sources):
            fewer = replace(world, faults=replace(faults, bad_sources=faults.bad_sources - 1))
            yield f"m{k}: its source is bad", lambda: self._do(fewer, k, NotMended("damaged"))
        if isinstance(act, Compute) and faults.errors and act.step <= self.steps:
            fewer = replace(world, faults=replace(faults, errors=faults.errors - 1))
            yield f"m{k} raises", lambda: self._do(fewer, k, Erred("Traceback"))
        if isinstance(act, (Form, Mend, Compute)) and (self._peer_is_gone(world, k) or faults.breaks):
            fewer = world
            if not self._peer_is_gone(world, k):
                fewer = replace(world, faults=replace(faults, breaks=faults.breaks - 1))
            yield f"m{k} cannot reach another", lambda: self._do(fewer, k, Failed("closed"))
        if faults.deaths:
            yield (
                f"m{k} dies",
                lambda: replace(
                    world,
                    faults=replace(faults, deaths=faults.deaths - 1),
                    members=_put(world.members, k, Member(member.uid)),
                    dead=world.dead | {k},
                    ended=world.ended | {k},
                    acts=_put(world.acts, k, None),
                    to_member=_put(world.to_member, k, ()),
                ),
            )

    def _outcomes(self, member: Member, act: Any) -> Iterator[Any]:
        if isinstance(act, Form):
            yield Made()
        elif isinstance(act, Mend):
            yield Mended()
        elif isinstance(act, Compute):
            yield Computed(norm=1.0) if act.step <= self.steps else LoopEnded()
        elif isinstance(act, TakeStep):
            yield Took()

    def _peer_is_gone(self, world: World, k: int) -> bool:
        """Somebody of its view has died, or moved on and closed the view's groups."""
        view = world.members[k].view
        if view is None:
            return False
        for peer, member in enumerate(world.members):
            if member.uid in view.places and peer != k and (peer in world.dead or member.generation > view.generation):
                return True
        return False

    # -- and what comes of it

    def _hear(self, world: World, k: int) -> World:
        message, *rest = world.to_job[k]
        return self._decide(replace(world, to_job=_put(world.to_job, k, tuple(rest))), (f"m{k}", message))

    def _lose_patience(self, world: World, wait: Wait, *, hasty: bool) -> World:
        faults = replace(world.faults, hasty=world.faults.hasty - hasty)
        return self._decide(replace(world, waits=world.waits - {wait}, faults=faults), WaitOver(wait.generation, wait.of))

    def _decide(self, world: World, event: Any) -> World:
        job, orders = coordination.after(world.job, event)
        world = replace(world, job=job)
        for order in orders:
            if isinstance(order, Tell):
                k = int(order.uid[1:])
                if k not in world.dead:
                    world = replace(world, to_member=_put(world.to_member, k, (*world.to_member[k], order.message)))
            elif isinstance(order, Register):
                world = self._register(world, order)
            elif isinstance(order, Wait):
                world = replace(world, waits=world.waits | {order})
            elif isinstance(order, Choose):
                world = self._decide(world, self._chosen(order, job))
        waits = frozenset(wait for wait in world.waits if wait.generation == world.job.generation)
        return replace(world, waits=waits)

    def _register(self, world: World, order: Register) -> World:
        for generation, step, decision in world.registers:
            if (generation, step) == (order.generation, order.step):
                raise AssertionError(f"{order} after {decision}")
        commits = world.commits | {order.step} if order.decision == "commit" else world.commits
        return replace(world, commits=commits, registers=world.registers | {(order.generation, order.step, order.decision)})

    def _chosen(self, order: Choose, job: JobState) -> Chosen:
        assert not set(order.lost) & order.finite
        if len(order.refused) > 1:
            return Chosen(order.generation, (), "nothing is left")
        if order.rollback or self.rung == "rollback" or order.refused:
            back = order.step if order.rollback else 0
            return Chosen(order.generation, tuple(StageSource(k, "rollback", step=back) for k in range(job.stages)))
        return Chosen(order.generation, tuple(StageSource(k, "stale") for k in order.lost))

    def _do(self, world: World, k: int, event: Any) -> World:
        before, act = world.members[k], world.acts[k]
        member, said, new = membership.after(before, event)
        if isinstance(new, TakeStep):
            assert new.step in world.commits, f"m{k} steps to {new.step}, which no register holds"
            assert before.duty is Duty.DECIDING, f"m{k} steps without gradients"
        if new is None and member.duty in (before.duty, Duty.SPARE):
            new = act  # of no effect, or it waits: the act goes on
        world = replace(world, members=_put(world.members, k, member), acts=_put(world.acts, k, new))
        return replace(world, to_job=_put(world.to_job, k, (*world.to_job[k], *said)))

    # -- promises

    def _check(self, world: World) -> None:
        """Who is at work on a step in one view stands at one step: that before it, or behind its commit."""
        bases: dict[int, set[int]] = {}
        for k, member in enumerate(world.members):
            if k not in world.dead and member.duty in (Duty.COMPUTING, Duty.DECIDING) and member.step is not None:
                bases.setdefault(member.generation, set()).add(member.step)
        for found in bases.values():
            assert max(found) - min(found) <= 1, f"members at {found} in one view"
            assert max(found) == min(found) or max(found) in world.commits
        if world.job.phase is JobPhase.WORKING and self.rung != "rollback" and not world.job.refused:
            assert not world.commits or self.faults.bad_sources or max(world.commits) == world.job.step

    def _settled(self, world: World) -> None:
        way = "\n  ".join(self._way(world))
        if world.job.phase is not JobPhase.ENDED:
            raise Broken(f"nothing can happen any more, in phase {world.job.phase}, after:\n  {way}")
        lively = [m for k, m in enumerate(world.members) if k not in world.dead]
        steps = {m.step for m in lively if m.stage is not None and m.step is not None}
        end = next((m for m in world.to_member if m), None)
        if any(member.duty is not Duty.ENDED for member in lively) or end:
            raise Broken(f"members that nobody told the end, after:\n  {way}")
        if self._reason(world) == "" and (len(steps) > 1 or steps - {self.steps}):
            raise Broken(f"done, and members stand at {steps}, after:\n  {way}")
        self.ends.add(self._reason(world))

    def _reason(self, world: World) -> str:
        for wait, _ in self._ends(world):
            return wait
        return "?"

    def _ends(self, world: World) -> Iterator[tuple[str, int]]:
        for act in world.acts:
            if isinstance(act, membership.Stop):
                yield act.end.reason, act.end.code


def _put(values: tuple[Any, ...], k: int, value: Any) -> tuple[Any, ...]:
    return (*values[:k], value, *values[k + 1 :])
