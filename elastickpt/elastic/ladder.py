"""From what lost stages are rebuilt: each takes the first rung of the policy that is possible for it. [REC-43]"""

from __future__ import annotations

from collections.abc import Iterator

from elastickpt.elastic import checkfree
from elastickpt.elastic.job import Choose, Chosen
from elastickpt.elastic.messages import Commit, Source, Terms
from elastickpt.elastic.recovery import Considered, Rung


class Neighbours:
    """The rungs that need no storage: a job without a run."""

    def __init__(self, terms: Terms, stages: int) -> None:
        self._terms, self._stages = terms, stages

    def choose(self, order: Choose, last: Commit | None) -> tuple[Chosen, tuple[Considered, ...]]:
        """See `duties.Ladder`."""
        if order.begins:
            return Chosen(order.generation, ()), ()
        considered: list[Considered] = []
        sources: list[Source] = []
        for stage in order.lost:
            found = None
            for rung, source, why in self._rungs(stage, order, last):
                considered.append(Considered(rung, why, stage))
                if source is not None:
                    found = source
                    break
            if found is None:
                passed = "; ".join(f"{one.rung}: {one.why}" for one in considered if one.stage == stage)
                return Chosen(order.generation, (), f"stage {stage} cannot be rebuilt: {passed}"), tuple(considered)
            sources.append(found)
        return Chosen(order.generation, tuple(sources)), tuple(considered)

    def close(self) -> None:
        return None

    def _rungs(self, stage: int, order: Choose, last: Commit | None) -> Iterator[tuple[Rung, Source | None, str]]:
        of = checkfree.sources(order.lost, stages=self._stages, swap="step" if self._terms.swap else None)[stage]
        for rung in self._terms.rungs:
            failed = next((why for source, why in order.refused if (source.stage, source.rung) == (stage, rung)), "")
            if failed:
                yield rung, None, f"it was tried, and failed: {failed}"
            elif rung in ("stale", "rollback"):
                yield rung, None, "the job has no run with checkpoints"
            elif len(of) != (1 if rung == "partner" else 2):
                yield rung, None, self._no_partner(stage) if rung == "partner" else self._no_neighbours(stage)
            elif not set(of) <= order.finite:
                yield rung, None, f"tensors of stage {min(set(of) - order.finite)} are not finite"
            else:
                alpha = self._alpha(of, last) if rung == "checkfree" else None
                yield rung, Source(stage, rung, of, alpha), "possible"

    def _no_partner(self, stage: int) -> str:
        if not self._terms.swap or checkfree.partner(stage, self._stages) is None:
            return "it has no partner"
        return "its partner is lost too"

    def _no_neighbours(self, stage: int) -> str:
        if stage in (0, self._stages - 1):
            return "it has one neighbour only"
        if self._terms.swap and checkfree.partner(stage, self._stages) is not None:
            return "it is of an end pair"
        return "a neighbour is lost too"

    def _alpha(self, of: tuple[int, ...], last: Commit | None) -> float:
        before, after = (None, None) if last is None else (last.norms[stage] for stage in of)
        return checkfree.alpha(before, after, weighting=self._terms.weighting)  # type: ignore[arg-type]


def ladder_of(terms: Terms, stages: int) -> Neighbours:
    """The ladder of a job of so many stages that trains by these terms."""
    return Neighbours(terms, stages)
