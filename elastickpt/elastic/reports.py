"""What a trainer has still to tell its loop: one report per committed step, on every member that stood through it; and what
evaluations came to that others had without it."""

from __future__ import annotations

from elastickpt.elastic.messages import Commit, Go
from elastickpt.elastic.policy import Report
from elastickpt.elastic.recovery import Recovery
from elastickpt.saving.task import SaveHandle


class Reports:
    """Of one member. `new`: no view was whole for it yet."""

    def __init__(self) -> None:
        self.new = True
        self._told = -1  # the step of the newest report, or the one from which reports begin
        self._commit: Commit | None = None
        self._seconds = 0.0
        self._recovered: list[Recovery] = []
        self._saved: SaveHandle | None = None

    def committed(self, commit: Commit) -> None:
        """The step is decided and taken."""
        self._commit = commit

    def took(self, seconds: float) -> None:
        """For so long the step was under way, up to the decision."""
        self._seconds = seconds

    def rolled_back(self, step: int) -> None:
        """Steps beyond `step` are to come once more."""
        self._told, self._commit = step, None

    def arrived(self, go: Go) -> None:
        """Every member of a view stands. Who is new reports the next step first; but if the others stood in an evaluation, the
        last one, so that its own loop joins that."""
        last = go.last if go.last is not None and go.last.step == go.step else None
        if last is not None and (go.evaluating if self.new else go.step > self._told):
            self._commit, self._told = last, go.step - 1
        elif self.new:
            self._told = go.step
        self.new = False

    def recovered(self, recovery: Recovery) -> None:
        self._recovered.append(recovery)

    def saved(self, handle: SaveHandle | None) -> None:
        """The save of the step where all stand, None for none."""
        self._saved = handle

    @property
    def saving(self) -> SaveHandle | None:
        return self._saved

    def next(self, epoch: int, generation: int) -> Report | None:
        """The report that is due, once; None where there is none."""
        commit = self._commit
        if commit is None or commit.step <= self._told:
            return None
        begun = dict(commit.begun)
        recovered = tuple(one.begun(begun[one.generation]) if one.generation in begun else one for one in self._recovered)
        self._recovered = []
        self._told, self._commit = commit.step, None
        loss = float("nan") if commit.loss is None else commit.loss
        return Report(commit.step, loss, by_stage(commit), epoch, generation, recovered, self._saved, self._seconds)


class Evaluations:
    """Of the loop of one member, after one step. `values`: of all that it, or another member, has had there, in their order."""

    def __init__(self) -> None:
        self._step, self._had = 0, 0
        self.values: tuple[float, ...] = ()

    def stand(self, step: int, told: tuple[float, ...] = ()) -> None:
        """The member stands after this step; others have had these."""
        if step != self._step:
            self._step, self._had, self.values = step, 0, ()
        self.values = max(self.values, told, key=len)

    def known(self) -> float | None:
        """What the next one of the loop came to, if others have had it without this member; it has had it then."""
        if self._had == len(self.values):
            return None
        self._had += 1
        return self.values[self._had - 1]

    def had(self, value: float) -> None:
        """All members have evaluated, with this result."""
        self.values += (value,)
        self._had += 1


def by_stage(commit: Commit) -> dict[int, float]:
    return {stage: norm for stage, norm in enumerate(commit.norms) if norm is not None}
