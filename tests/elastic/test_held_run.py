"""The run of a job as its coordinator holds it: claimed as the run's options say."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.elastic.held_run import HeldRun
from elastickpt.elastic.job import Choose
from elastickpt.elastic.ladder import RunLadder
from elastickpt.elastic.messages import Terms
from elastickpt.errors import Refused, RunBusy
from elastickpt.ledger.history import read_told
from elastickpt.ledger.objects import complete
from elastickpt.runs.view_saves import ViewSaves
from elastickpt.storage.local import LocalStore


def test_a_claim_says_what_is_kept_and_leaves_a_living_job_its_run(tmp_path: Path) -> None:
    """[REC-63]"""
    first = HeldRun(Terms(run=str(tmp_path), keep="last=2"))
    assert first.epoch is None
    assert first.go_on_from(None) == 1 == first.go_on_from(None)
    other = HeldRun(Terms(run=str(tmp_path), keep="all"))
    with pytest.raises(RunBusy, match="epoch 1"):
        other.go_on_from(None)
    assert other.epoch is None
    taking = HeldRun(Terms(run=str(tmp_path), keep="last=5", take_over=True))
    assert taking.go_on_from(None) == 2
    rules = complete(read_told(LocalStore(tmp_path))).rules
    assert rules is not None
    assert rules.words == "last=5"
    for one in (first, other, taking):
        one.close()


def test_what_is_rebuilt_goes_on_under_the_newest_claim(tmp_path: Path) -> None:
    """A rollback that was overtaken may have claimed the run once more. [REC-14, REC-64]"""
    ladder = RunLadder(Terms(run=str(tmp_path), rungs=("checkfree",)), 3)
    begun, _ = ladder.choose(Choose(1, 0, (), frozenset(range(3)), False, (), begins=True), None)
    assert (begun.epoch, begun.sources) == (1, ())
    chosen, _ = ladder.choose(Choose(2, 5, (1,), frozenset({0, 2}), False, ()), None)
    assert (chosen.epoch, chosen.sources[0].rung) == (1, "checkfree")
    ladder.close()


def test_a_run_without_a_state_hears_no_signals(tmp_path: Path) -> None:
    """A member of a job that is told to end does so, and is lost: the others go on."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}
    with ek.Run(tmp_path / "run"):
        assert {one: signal.getsignal(one) for one in before} == before


def test_a_run_with_a_state_of_its_own_is_refused(tmp_path: Path) -> None:
    with ek.Run(tmp_path / "run", {"one": 1}) as run, pytest.raises(Refused, match="a Run with a state"):
        ViewSaves(run)


def test_a_step_that_is_committed_already_is_saved(tmp_path: Path) -> None:
    """A loss cut its save off for the members, and its writers committed it; in the next view it is due once more. [REC-65]"""
    held = HeldRun(Terms(run=str(tmp_path), keep="all"))
    epoch = held.go_on_from(None)
    saves, state = ViewSaves(ek.Run(tmp_path)), {"model": torch.arange(6.0)}
    infos = []
    for view in ("1-1", "1-2"):
        saves.stand(view)
        saves.goes_on(epoch)
        handle = saves.now(3, state)
        assert handle is not None
        infos.append(handle.result())
    first, second = infos
    assert (second.path, second.step, second.attempt) == (first.path, 3, first.attempt)
    assert (second.nbytes, second.arrays) == (first.nbytes, first.arrays) == (24, 1)
    again = saves.now(2, state)
    assert again is not None
    assert isinstance(again.exception(), Refused), "a step behind it is no such step"
    saves.close()
    held.close()


class GoneStore:
    """Of a member that is gone."""

    def own_store(self, purpose: str) -> object:
        raise RuntimeError("connection reset")


def test_where_nobody_says_whether_a_step_is_due_it_is_not_saved_and_training_goes_on(tmp_path: Path) -> None:
    """That is asked of the member that keeps the store of the view. [REC-65]"""
    with ek.Run(tmp_path / "run", options=ek.RunOptions(due=ek.Every(seconds=1.0))) as run:
        saves = ViewSaves(run)
        saves._epoch, saves._group = 1, GoneStore()  # type: ignore[assignment]
        assert saves.at(3, {}) is None


@pytest.mark.parametrize(("variable", "said"), [("TORCHELASTIC_RUN_ID", "torchrun"), ("HOME", "no coordinator")])
def test_who_was_not_started_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, said: str) -> None:
    for name in ("ELASTICKPT_ENDPOINT", "ELASTICKPT_UID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(Refused, match=said):
        ek.elastic.join()
