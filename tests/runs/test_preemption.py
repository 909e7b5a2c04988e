"""What is noticed of the end of a job, and what is decided then. [RUN-94..97]"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.errors import Refused
from elastickpt.runs.due import LEAD_STEPS
from elastickpt.runs.preemption import MARGIN, LastStep, Notice, Notices, decide_ending

BOTH = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As they were, whatever a test does."""
    before = {one: signal.getsignal(one) for one in BOTH}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("one", BOTH)
def test_a_signal_is_noted_with_its_deadline(one: signal.Signals) -> None:
    with Notices({signal.SIGTERM: 30.0, signal.SIGUSR1: 60.0}) as notices:
        assert notices.notice is None
        os.kill(os.getpid(), one)
        found = notices.notice
        assert found is not None
        assert found.source == one.name
        assert found.deadline_s - found.came_s == pytest.approx(60.0 if one is signal.SIGUSR1 else 30.0)
        os.kill(os.getpid(), one)
        assert notices.notice == found  # a second one gives no more time


def test_the_earliest_deadline_holds_whoever_said_it() -> None:
    with Notices({signal.SIGUSR1: 60.0}) as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        watcher = threading.Thread(target=notices.give, args=("spot",), kwargs={"left_s": 20.0})
        watcher.start()
        watcher.join()
        notices.give("maintenance", left_s=3600.0)
        assert notices.notice is not None
        assert notices.notice.source == "spot"


def test_time_left_ends_at_zero() -> None:
    notice = Notice("SIGTERM", 100.0, 130.0)
    assert [notice.left_s(now) for now in (100.0, 120.0, 130.0, 999.0)] == [30.0, 10.0, 0.0, 0.0]


def test_the_handler_before_is_called_and_comes_back() -> None:
    """[RUN-96]"""
    called: list[int] = []

    def before(number: int, frame: FrameType | None) -> None:
        called.append(number)

    signal.signal(signal.SIGUSR1, before)
    with Notices() as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert called == [signal.SIGUSR1]
        assert notices.notice is not None
    assert signal.getsignal(signal.SIGUSR1) is before
    notices.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(called) == 2


def test_a_handler_that_was_set_later_stays_and_may_call_this_one() -> None:
    """[RUN-96]"""
    called: list[str] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: called.append("first"))
    notices = Notices()
    inner = signal.getsignal(signal.SIGUSR1)
    assert callable(inner)

    def later(number: int, frame: FrameType | None) -> None:
        called.append("later")
        inner(number, frame)

    signal.signal(signal.SIGUSR1, later)
    notices.close()
    assert signal.getsignal(signal.SIGUSR1) is later
    os.kill(os.getpid(), signal.SIGUSR1)
    assert called == ["later", "first"]
    assert notices.notice is None


def ended_by(child: Callable[[], object]) -> int:
    """The wait status of a forked process that does this."""
    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


def test_a_forked_process_is_ended_by_the_signal_as_before() -> None:
    """As a data loader's worker is. [RUN-97]"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(7))
    with Notices() as notices:
        status = ended_by(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert os.waitstatus_to_exitcode(ended_by(lambda: os.kill(os.getpid(), signal.SIGUSR1))) == 7
        assert notices.notice is None


def test_a_forked_process_that_closes_leaves_the_trainer_s_handlers() -> None:
    with Notices() as notices:
        assert ended_by(notices.close) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert notices.notice is not None


def test_an_ignored_signal_is_noted_too() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with Notices() as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert notices.notice is not None
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_what_cannot_be_put_back_or_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[Refused] = []

    def elsewhere() -> None:
        try:
            Notices()
        except Refused as error:
            refused.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in refused[0].message
    with pytest.raises(Refused, match="SIGTERM: 0"):
        Notices({signal.SIGTERM: 0})
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda one: None if one is signal.SIGUSR1 else signal.SIG_DFL)
        with pytest.raises(Refused, match="SIGUSR1: handled by what Python does not know"):
            Notices()


def test_without_a_notice_nothing_is_decided() -> None:
    assert decide_ending({}, step=5, step_s=1.0, save_s=1.0) is None


def test_the_nearest_deadline_decides_whether_a_save_fits() -> None:
    """[RUN-94, RUN-95]"""
    fits = decide_ending({3: 60.0, 7: 25.0}, step=100, step_s=1.0, save_s=18.0)
    assert fits == LastStep(102, True, "a last save fits: 25.0 s are left on rank 7, 25.0 s are needed")
    late = decide_ending({3: 60.0, 7: 24.9}, step=100, step_s=1.0, save_s=18.0)
    assert late == LastStep(
        102, False, "no save fits, the checkpoint before is kept: 24.9 s are left on rank 7, 25.0 s are needed"
    )


def test_a_save_that_is_due_at_the_step_before_is_the_last_one() -> None:
    near = decide_ending({0: 30.0}, step=100, step_s=1.0, save_s=1.0, due={90, 101})
    assert near is not None
    assert (near.step, near.saves, near.why.partition(",")[0]) == (102, False, "step 101 is the last save")
    same = decide_ending({0: 30.0}, step=100, step_s=1.0, save_s=1.0, due={102})
    assert same is not None
    assert (same.step, same.saves) == (102, True)


@given(
    st.dictionaries(st.integers(0, 3), st.floats(0, 200), min_size=1),
    st.integers(0, 1000),
    st.floats(0.01, 10),
    st.floats(0.01, 100),
)
def test_what_is_decided_is_for_a_step_that_nobody_has_reached_and_ends_in_time(
    left_s: dict[int, float], step: int, step_s: float, save_s: float
) -> None:
    """[RUN-94, RUN-95]"""
    found = decide_ending(left_s, step=step, step_s=step_s, save_s=save_s)
    assert found is not None
    assert found.step >= step + LEAD_STEPS
    needed, left = (found.step - step) * step_s + save_s, min(left_s.values())
    assert needed < left if found.saves else MARGIN * needed > left
