"""Copies that go on while training does: with a device's stream played by a thread here, and with a GPU where there is one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import elastickpt as ek
from elastickpt.commit.attempt import PathDestination
from elastickpt.errors import Cancelled
from elastickpt.ranks.process_group import job_group
from elastickpt.saving.async_save import close_all
from elastickpt.saving.request import AsyncOptions, Request
from elastickpt.saving.saver import Saver
from elastickpt.saving.staging import Bytes
from elastickpt.training.device import StepGate
from elastickpt.training.elements import host_elements
from elastickpt.training.held import HeldArray

LIMIT_S = 60.0


class LateCopies:
    """Copies that happen when they are let: what they read until then is what training has made of it."""

    def __init__(self, memory: Bytes) -> None:
        self.memory, self.let = memory, threading.Event()
        self.closed = False
        self._given: list[tuple[torch.Tensor, int, NDArray[np.uint8]]] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self._given = []
        self._done.clear()

    def copy(self, part: torch.Tensor, start: int, into: NDArray[np.uint8]) -> None:
        assert into.base is not None
        self._given.append((part, start, into))

    def end(self) -> None:
        self._thread = threading.Thread(target=self._work, args=(self._given,), daemon=True)
        self._thread.start()

    def _work(self, given: list[tuple[torch.Tensor, int, NDArray[np.uint8]]]) -> None:
        self.let.wait(LIMIT_S)
        for part, start, into in given:
            flat = np.ascontiguousarray(host_elements(part)).reshape(-1).view(np.uint8)
            into[:] = flat[start : start + into.size]
        self._done.set()

    def order_before_step(self) -> None:
        self.let.set()
        self.wait()

    def wait(self) -> None:
        assert self._done.wait(LIMIT_S)

    def close(self) -> None:
        self.wait()
        self.closed = True


class Late:
    """Parameters and their optimizer state are copied late, as on a device; all else at once."""

    def __init__(self) -> None:
        self.made: list[LateCopies] = []

    def device(self, held: HeldArray) -> str | None:
        return "late" if held.role == "parameter" else None

    def copies(self, memory: NDArray[np.uint8], device: str) -> LateCopies:
        self.made.append(LateCopies(memory))
        return self.made[-1]


class Job:
    """A model with a buffer, stepped by an optimizer, and a saver of its own."""

    def __init__(self, beside: Late, device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step()
        self.saver = Saver(job_group(None), AsyncOptions(executor="thread", **options), purpose="test", copier=beside)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "rng": ek.RNG()}

    def save(self, path: Path, state: dict[str, Any] | None = None) -> ek.SaveHandle:
        destination = PathDestination.of(path, None)
        return self.saver.save(state or self.state(), destination, Request(destination.path, None))


@pytest.fixture
def late() -> Iterator[Late]:
    yield Late()
    close_all()


def weights(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(ek.open(path).arrays["params/model/0.weight/value"][:]))


@pytest.mark.parametrize("items", [("model", "optimizer"), ("model",)])
def test_an_optimizer_steps_after_the_copies_and_not_before(tmp_path: Path, late: Late, items: tuple[str, ...]) -> None:
    """Whether it is in the state or not. [SAVE-98]"""
    job = Job(late)
    first = job.save(tmp_path / "first", {item: job.state()[item] for item in items})
    expected = copy.deepcopy(job.model.state_dict())
    job.step()  # its pre-hook waits for the copies
    first.result(LIMIT_S)
    assert torch.equal(weights(tmp_path / "first"), expected["0.weight"])
    assert not torch.equal(job.model.state_dict()["0.weight"], expected["0.weight"])
    job.saver.close()
    assert late.made[0].closed


def test_a_writer_gets_the_arena_when_the_copies_are_done_and_not_before(tmp_path: Path, late: Late) -> None:
    job = Job(late)
    job.step()
    handle = job.save(tmp_path / "c")
    assert not handle.done()
    assert not (tmp_path / "c").exists()
    late.made[0].let.set()
    handle.wait_staged()
    with torch.no_grad():
        expected = job.model[0].weight.clone()
        job.model[0].weight.zero_()  # not by an optimizer: allowed from `wait_staged` on
    handle.result(LIMIT_S)
    assert torch.equal(weights(tmp_path / "c"), expected)
    assert ek.open(tmp_path / "c").verify().sound
    job.saver.close()


def test_buffers_and_random_streams_are_staged_before_the_call_returns(tmp_path: Path, late: Late) -> None:
    """[SAVE-98]"""
    job = Job(late)
    torch.manual_seed(7)
    handle = job.save(tmp_path / "c")
    expected = torch.rand(3)
    buffer = job.model[1].running_mean.clone()
    job.model(torch.randn(5, 300))  # a forward changes the buffer, and the stream has moved on
    assert not torch.equal(buffer, job.model[1].running_mean)
    late.made[0].let.set()
    handle.result(LIMIT_S)
    live = Job(Late())
    ek.load(live.state(), tmp_path / "c")
    assert torch.equal(live.model[1].running_mean, buffer)
    assert torch.equal(torch.rand(3), expected)
    job.saver.close()


def test_rounds_wait_for_their_copies(tmp_path: Path, late: Late) -> None:
    job = Job(late, arena_nbytes=(1 << 20) + 4096)
    real = late.copies
    late.copies = lambda memory, device: _let(real(memory, device))  # type: ignore[method-assign]
    job.save(tmp_path / "c").result(LIMIT_S)
    assert torch.equal(weights(tmp_path / "c"), job.model[0].weight.detach())
    assert ek.open(tmp_path / "c").verify().sound
    job.saver.close()


def test_a_save_that_begins_as_its_team_ends_waits_for_nobody(tmp_path: Path, late: Late) -> None:
    """The end may come before the ranks have met."""
    job = Job(late)
    job.saver.interrupt("its view is over")
    error = job.save(tmp_path / "x").exception(LIMIT_S)
    assert isinstance(error, Cancelled)
    assert "its view is over" in error.message
    job.saver.close()
    assert list(tmp_path.iterdir()) == []


def _let(copies: LateCopies) -> LateCopies:
    copies.let.set()
    return copies


def test_a_gate_lets_steps_pass_once_it_is_open_or_gone() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)

    def closed() -> tuple[StepGate, LateCopies]:
        gate, copies = StepGate(), LateCopies(np.zeros(8, np.uint8))
        copies.begin()
        copies.end()
        gate.close_for(copies, until=lambda: False)
        return gate, copies

    gate, copies = closed()
    optimizer.step()
    assert copies.let.is_set()
    gate, copies = closed()
    gate.open()
    optimizer.step()
    assert not copies.let.is_set()
    gate, forgotten = closed()
    del gate
    optimizer.step()
    assert not forgotten.let.is_set()
    for late in (copies, forgotten):
        late.let.set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_staged_beside_training(tmp_path: Path) -> None:
    from elastickpt.training.device import Cuda

    job = Job(Cuda(), device="cuda")  # type: ignore[arg-type]
    job.save(tmp_path / "known").result(LIMIT_S)
    for number in range(3):
        expected = copy.deepcopy(job.model.state_dict())
        moments = copy.deepcopy(job.optimizer.state_dict()["state"])
        handle = job.save(tmp_path / str(number))
        job.step()
        path = Path(handle.result(LIMIT_S).path)
        assert torch.equal(weights(path), expected["0.weight"].cpu())
        live = Job(Cuda(), device="cuda")  # type: ignore[arg-type]
        ek.load(live.state(), path)
        assert all(torch.equal(live.model.state_dict()[key], value) for key, value in expected.items())
        found = live.optimizer.state_dict()["state"]
        assert all(torch.equal(found[p][key], value) for p, states in moments.items() for key, value in states.items())
    job.saver.close()
