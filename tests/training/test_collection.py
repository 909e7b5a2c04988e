"""The collector is as it was once the last one has left, in whatever order, and however they leave."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import elastickpt as ek
from elastickpt.saving import save
from elastickpt.training.collection import collection_paused


@pytest.fixture(autouse=True)
def collector():
    gc.enable()
    yield
    gc.enable()


def test_nothing_is_collected_inside_and_it_goes_on_after():
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_disabled_collector_stays_disabled():
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_an_error_leaves_it_running():
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_the_last_of_several_threads_lets_it_go_on():
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collection_paused():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with collection_paused():
        thread.start()
        assert entered.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_save_and_load_collect_nothing_and_leave_it_running(tmp_path, monkeypatch):
    seen = []
    real = save.write_whole_share
    monkeypatch.setattr(
        save, "write_whole_share", lambda *given, **named: (seen.append(gc.isenabled()), real(*given, **named))[1]
    )
    ek.save({"x": torch.arange(3)}, tmp_path / "a")
    assert seen == [False]
    assert gc.isenabled()
    ek.load({"x": torch.zeros(3, dtype=torch.int64)}, tmp_path / "a")
    assert gc.isenabled()
