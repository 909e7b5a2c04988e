"""What a trainer has still to tell its loop: one report per committed step, on every member that stood through it."""

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
        self._told = min(self._told, step)
        if self._commit is not None and self._commit.step > step:
            self._commit = None

    def arrived(self, go: Go) -> None:
        """Every member of a view stands. Who is new reports the next step first; but if the others have still to report the
        last one, or evaluate after it, or have done so, that one, so that its own loop goes through the same."""
        last = go.last if go.last is not None and go.last.step == go.step else None
        at = go.position
        joins = at is not None and at.since % 2 == 1 and (go.unfinished or at.values != ())
        if last is not None and (joins if self.new else go.step > self._told):
            self._commit, self._told = last, go.step - 1
        elif self.new:
            self._told = go.step
        self.new = False

    def is_due_of(self, step: int) -> bool:
        """Whether the loop has still to be told of this step, after which the member stands."""
        return not self.new and step > self._told

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


def by_stage(commit: Commit) -> dict[int, float]:
    return {stage: norm for stage, norm in enumerate(commit.norms) if norm is not None}
