"""What a save takes from training, counted on a clock of the test's own."""

from __future__ import annotations

import threading

import pytest

from tools.bench import training
from tools.bench.training import Training


class Steps(Training):
    """Steps of 1 s; of 3 s while something is saved, which ends after `saving` of them."""

    def __init__(self, saving: int) -> None:
        self.now, self.left, self.saving = 100.0, saving, threading.Event()
        self.saved = threading.Event()

    def step(self, *, done: bool) -> bool:
        if not self.saving.is_set():
            self.now += 1.0
            return False
        self.now += 3.0
        self.left -= 1
        if self.left == 0:
            self.saved.set()
        return self.left <= 0

    def finish(self) -> None:
        self.saved.wait(60)


@pytest.mark.parametrize("saving", [1, 5])
def test_what_a_save_takes_is_the_call_and_the_excess_of_every_step_until_it_is_saved(
    monkeypatch: pytest.MonkeyPatch, saving: int
) -> None:
    steps = Steps(saving)
    monkeypatch.setattr(training.time, "perf_counter", lambda: steps.now)
    usual_s = steps.usual_s()
    assert usual_s == 1.0
    begun = steps.now
    steps.saving.set()
    steps.now += 0.5  # the call
    assert steps.slowed_s(steps.finish, begun=begun, usual_s=usual_s) == pytest.approx(0.5 + saving * 2.0)


def test_a_save_that_fails_is_no_measure() -> None:
    def finish() -> None:
        raise OSError("lost")

    steps = Steps(2)
    steps.saving.set()
    with pytest.raises(OSError, match="lost"):
        steps.slowed_s(finish, begun=0.0, usual_s=1.0)
