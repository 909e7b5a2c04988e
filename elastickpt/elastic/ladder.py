"""From what lost stages are rebuilt: each takes the first rung of the policy that is possible for it. [REC-67]

If one of them needs `rollback`, all members roll back. Before its first step a job goes on from its run's newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastickpt.elastic import neighbours
from elastickpt.elastic.held_run import HeldRun, Newest
from elastickpt.elastic.job import Choose, Chosen
from elastickpt.elastic.messages import Commit, StageSource, Terms
from elastickpt.elastic.recovery import Considered, Rung

POSSIBLE = "possible"


@dataclass(frozen=True, slots=True)
class Known:
    """What one choice goes by. `newest`: the checkpoint that may be read, None for none; `norms` by stage, of the last step
    that was committed."""

    order: Choose
    newest: Newest | None
    norms: dict[int, float]


class RunLadder:
    """The ladder of a job of `stages` stages; see `duties.Ladder`. It holds the run, if there is one."""

    def __init__(self, terms: Terms, stages: int) -> None:
        self._terms, self._stages = terms, stages
        self._run = HeldRun(terms) if terms.run else None
        self._saved_norms: dict[int, float] = {}

    def choose(self, order: Choose, last: Commit | None) -> tuple[Chosen, tuple[Considered, ...]]:
        """See `duties.Ladder`."""
        refused = {source.path: why for source, why in order.refused if source.path}
        newest = None
        if self._run is not None:
            newest = self._run.newest(up_to=None if order.begins else order.step, refused=refused)
        if order.begins or order.rollback:
            return self._all_from(order, newest, refused), ()
        norms = self._saved_norms
        if last is not None:
            norms = {stage: norm for stage, norm in enumerate(last.norms) if norm is not None}
        sources, considered = sources_of(Known(order, newest, norms), self._terms, self._stages)
        failed = [stage for stage in order.lost if stage not in sources]
        if failed:
            passed = "; ".join(f"{one.rung}: {one.why}" for one in considered if one.stage == failed[0])
            return Chosen(order.generation, (), f"stage {failed[0]} cannot be rebuilt: {passed}"), considered
        if any(one.rung == "rollback" for one in sources.values()):
            return self._all_from(order, newest, refused), considered
        # An answer that came too late may have claimed the run meanwhile: saves go into the newest claim.
        epoch = None if self._run is None else self._run.epoch
        return Chosen(order.generation, tuple(sources[stage] for stage in order.lost), epoch=epoch), considered

    def close(self) -> None:
        if self._run is not None:
            self._run.close()

    def _all_from(self, order: Choose, newest: Newest | None, refused: dict[str, str]) -> Chosen:
        """All stages from one checkpoint, or from the beginning where a run has none; the run is claimed for that."""
        if self._run is None:
            return Chosen(order.generation, ())
        if newest is None and (refused or not order.begins):
            why = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "there is none"
            return Chosen(order.generation, (), f"no checkpoint of {self._terms.run} can be read: {why}")
        epoch = self._run.go_on_from(newest)
        if newest is None:
            return Chosen(order.generation, (), epoch=epoch)
        norms = self._run.norms(newest)
        self._saved_norms = norms if set(norms) == set(range(self._stages)) else {}  # else of other stages than these
        back = (StageSource(stage, "rollback", path=newest.path, step=newest.step) for stage in range(self._stages))
        return Chosen(order.generation, tuple(back), epoch=epoch)


def sources_of(known: Known, terms: Terms, stages: int) -> tuple[dict[int, StageSource], tuple[Considered, ...]]:
    """For each lost stage that can be rebuilt, from what; and every rung that was looked at for it, with the reason."""
    sources: dict[int, StageSource] = {}
    considered: list[Considered] = []
    for stage in known.order.lost:
        for rung, source, why in _rungs(stage, known, terms, stages):
            considered.append(Considered(rung, why, stage))
            if source is not None:
                sources[stage] = source
                break
    return sources, tuple(considered)


def _rungs(stage: int, known: Known, terms: Terms, stages: int) -> Iterator[tuple[Rung, StageSource | None, str]]:
    for rung in terms.rungs:
        tried = [why for source, why in known.order.refused if (source.stage, source.rung) == (stage, rung)]
        if rung == "stale" or rung == "rollback":
            yield rung, *_of_checkpoint(rung, stage, known, terms, tried)
        elif tried:
            yield rung, None, f"it was tried, and failed: {tried[-1]}"
        else:
            yield rung, *_of_stages(rung, stage, known, terms, stages)


def _of_checkpoint(rung: Rung, stage: int, known: Known, terms: Terms, tried: list[str]) -> tuple[StageSource | None, str]:
    newest = known.newest
    if not terms.run:
        return None, "the job has no run with checkpoints"
    if newest is None:
        return None, f"it was tried, and failed: {tried[-1]}" if tried else "the run has no checkpoint"
    age = known.order.step - newest.step
    if rung == "stale" and age > terms.max_stale_steps:
        return None, f"the newest checkpoint is {age} steps old, more than max_stale_steps={terms.max_stale_steps}"
    return StageSource(stage, rung, path=newest.path, step=newest.step), POSSIBLE


def _of_stages(rung: Rung, stage: int, known: Known, terms: Terms, stages: int) -> tuple[StageSource | None, str]:
    order = known.order
    of = neighbours.sources(order.lost, stages=stages, swap="step" if terms.swap else None)[stage]
    if len(of) != (1 if rung == "partner" else 2):
        return None, _no_partner(stage, terms, stages) if rung == "partner" else _no_neighbours(stage, terms, stages)
    if not set(of) <= order.finite:
        return None, f"tensors of stage {min(set(of) - order.finite)} are not finite"
    if rung == "partner":
        return StageSource(stage, rung, of), POSSIBLE
    before, after = (known.norms.get(one) for one in of)
    return StageSource(stage, rung, of, neighbours.alpha(before, after, weighting=terms.weighting)), POSSIBLE  # type: ignore[arg-type]


def _no_partner(stage: int, terms: Terms, stages: int) -> str:
    if not terms.swap:
        return "no order is swapped, so no stage has a partner"
    return "it has no partner" if neighbours.partner(stage, stages) is None else "its partner is lost too"


def _no_neighbours(stage: int, terms: Terms, stages: int) -> str:
    if terms.swap and neighbours.partner(stage, stages) is not None:
        return "it is of an end pair, which has its partner only"
    if stage in (0, stages - 1):
        return "it has one neighbour only"
    return "a neighbour is lost too"


def ladder_of(terms: Terms, stages: int) -> RunLadder:
    """The ladder of a job of so many stages that trains by these terms."""
    return RunLadder(terms, stages)
