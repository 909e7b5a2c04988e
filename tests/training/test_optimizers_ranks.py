"""Optimizers on several ranks: overrides over FSDP2, settings that differ, objects that hold an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_optimizers import Averaging, AveragingInState, Delegating, Hidden, Noting, Outer, Packed, Two
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import elastickpt as ek
from elastickpt.errors import CheckpointError
from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks


def sharded(seed: int, world_size: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    if world_size > 1:
        fully_shard(model[0])
        fully_shard(model)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train(model: nn.Module, optimizer: Any, steps: int) -> list[list[float]]:
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = None
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
    return [whole(parameter).flatten().tolist() for parameter in model.parameters()]


CLASSES: dict[str, Any] = {
    "outer": Outer,
    "hidden": Hidden,
    "two": Two,
    "delegating": Delegating,
    "averaging": Averaging,
    "averaging-in-state": AveragingInState,
    "packed": Packed,
    "noting": Noting,
}


def saved(rank: int, world_size: int, folder: str, name: str) -> list[list[float]]:
    model = sharded(0, world_size)
    optimizer = CLASSES[name](list(model.parameters()))
    train(model, optimizer, 3)
    ek.save({"model": model, "optimizer": optimizer}, Path(folder) / "c")
    return train(model, optimizer, 3)


def resumed(rank: int, world_size: int, folder: str, name: str) -> list[list[float]]:
    model = sharded(1, world_size)
    optimizer = CLASSES[name](list(model.parameters()))
    ek.load({"model": model, "optimizer": optimizer}, Path(folder) / "c")
    return train(model, optimizer, 3)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"packed"}))
def test_overrides_over_fsdp_resume_bit_for_bit_and_reshard(name: str, tmp_path: Path) -> None:
    expected = run_ranks(saved, 2, str(tmp_path), name)[0]
    assert run_ranks(resumed, 2, str(tmp_path), name)[0] == expected
    on_one = resumed(0, 1, str(tmp_path), name)
    assert all(map(torch.allclose, map(torch.tensor, on_one), map(torch.tensor, expected)))


def with_lr(rank: int, world_size: int, folder: str, kind: str) -> str:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 + rank * (kind == "lr"))
    for _ in range(1 + rank * (kind == "steps")):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    try:
        ek.save({"model": model, "adam": optimizer}, Path(folder) / "c", mesh=None)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("lr", "optimizer 'adam': option 'lr' of parameter model/weight is 0.1 on rank 0 and 1.1 on rank 1"),
        ("steps", "optimizer 'adam': state 'step' of parameter model/weight is 1.0 on rank 0 and 2.0 on rank 1"),
    ],
)
def test_settings_that_differ_between_ranks_are_named(kind: str, told: str, tmp_path: Path) -> None:
    for message in run_ranks(with_lr, 2, str(tmp_path), kind):
        assert told in message
    assert not (tmp_path / "c").exists()


class Trainer:
    """An object with an optimizer inside, which nothing but its state dict shows."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]

    def step(self) -> None:
        self._optimizer.step()


def trainer_saved(rank: int, world_size: int, folder: str) -> list[list[float]]:
    model = sharded(0, world_size)
    trainer = Trainer(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, trainer, 3)
    trainer.epoch = 4
    ek.save({"model": model, "trainer": trainer}, Path(folder) / "c")
    return train(model, trainer, 3)


def trainer_resumed(rank: int, world_size: int, folder: str) -> list[list[float]]:
    model = sharded(1, world_size)
    trainer = Trainer(torch.optim.AdamW(model.parameters(), lr=0.01))
    ek.load({"model": model, "trainer": trainer}, Path(folder) / "c")
    assert trainer.epoch == 4
    kinds = {type(state["exp_avg"]) for state in trainer._optimizer.state.values()}
    assert kinds == ({DTensor} if world_size > 1 else {torch.Tensor})
    return train(model, trainer, 3)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_fresh_optimizer_behind_an_object_gets_dtensors_over_fsdp(before: int, after: int, tmp_path: Path) -> None:
    expected = run_ranks(trainer_saved, 2, str(tmp_path))[0] if before == 2 else trainer_saved(0, 1, str(tmp_path))
    found = run_ranks(trainer_resumed, 2, str(tmp_path))[0] if after == 2 else trainer_resumed(0, 1, str(tmp_path))
    if before == after:
        assert found == expected
    assert all(map(torch.allclose, map(torch.tensor, found), map(torch.tensor, expected)))
