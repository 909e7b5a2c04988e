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
        self._last: Commit | None = None  # after which all stood when the newest view was whole
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
        """Every member of a view stands. Who is new reports the next step first; but if the others evaluate after the last one,
        that one, so that its own loop joins that."""
        self._last = go.last if go.last is not None and go.last.step == go.step else None
        if self.new:
            self._told = go.step
            if go.evaluating and go.position is not None and go.position.stepped_in_loop:
                self.repeat()
        elif self._last is not None and go.step > self._told:
            self._commit = self._last
        self.new = False

    def repeat(self) -> None:
        """The last step is reported, again if it was: others evaluate after it."""
        if self._last is not None:
            self._commit, self._told = self._last, self._last.step - 1

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
