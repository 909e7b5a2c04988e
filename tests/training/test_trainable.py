"""The trained part of a model beside its optimizer; parameters that stand in `state` by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from torch import nn
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from elastickpt.errors import CheckpointError, StructureConflict, ValueNotCarried
from tools.gloo_ranks import run_ranks


class Adapted(nn.Module):
    """A frozen base with a buffer, and an adapter that is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(self.norm(x)))


def trained(seed: int, steps: int) -> tuple[Adapted, torch.optim.Optimizer]:
    model = Adapted(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_only_what_is_trained_is_saved_under_the_models_own_names(tmp_path: Path) -> None:
    model, optimizer = trained(0, 2)
    ek.save({"model": ek.trainable(model), "optimizer": optimizer}, tmp_path / "c")
    assert sorted(ek.open(tmp_path / "c").arrays["params/model"]) == ["down.weight", "up.weight"]
    other, second = trained(1, 0)
    base = other.base.weight.clone()
    ek.load({"model": ek.trainable(other), "optimizer": second}, tmp_path / "c")
    assert other.down.weight.equal(model.down.weight)
    assert other.base.weight.equal(base)
    assert second.state_dict()["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


def test_the_trained_part_loads_into_the_whole_model_and_the_other_way_round(tmp_path: Path) -> None:
    model, _ = trained(0, 1)
    ek.save({"model": ek.trainable(model)}, tmp_path / "part")
    ek.save({"model": model}, tmp_path / "whole")
    whole, part = Adapted(1), Adapted(2)
    ek.load({"model": whole}, tmp_path / "part", strict="unexpected")
    ek.load({"model": ek.trainable(part)}, tmp_path / "whole", strict="missing")
    assert whole.up.weight.equal(model.up.weight)
    assert part.up.weight.equal(model.up.weight)


def test_a_model_in_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueNotCarried, match="no parameter of this model requires a gradient"):
        ek.save({"model": ek.trainable(nn.Linear(1, 1).requires_grad_(requires_grad=False))}, tmp_path / "c")


def as_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_dict_of_parameters_names_those_of_an_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(0, 2)
    state: dict[str, Any] = {"optimizer": optimizer, "adapter": as_dict(model)}
    ek.save(state, tmp_path / "c")
    other, second = trained(1, 0)
    live = {"optimizer": second, "adapter": as_dict(other)}
    ek.load(live, tmp_path / "c")
    assert fingerprint(live) == fingerprint(state)
    assert other.up.weight.equal(model.up.weight)


def test_a_single_tensor_and_a_nested_one_name_parameters_too(tmp_path: Path) -> None:
    def state(value: float) -> dict[str, Any]:
        x, y = (torch.full((3,), value, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.SGD([x, y], lr=0.1, momentum=0.9)
        (x.sum() + 2 * y.sum()).backward()
        optimizer.step()
        return {"x": x, "deep": [{"y": y}], "o": optimizer}

    saved, live = state(1.0), state(5.0)
    ek.save(saved, tmp_path / "c")
    ek.load(live, tmp_path / "c")
    assert fingerprint(live) == fingerprint(saved)


def test_a_parameter_that_is_nowhere_in_state_is_explained(tmp_path: Path) -> None:
    _, optimizer = trained(0, 0)
    with pytest.raises(
        StructureConflict, match=r"of shape \(2, 4\), is not in `state`.*ek.trainable\(model\), or the parameter"
    ):
        ek.save({"optimizer": optimizer}, tmp_path / "c")
    copy = Adapted(1)
    with pytest.raises(StructureConflict, match=r"model 'm' has another of this shape, 'down.weight': .*made from a copy"):
        ek.save({"m": copy, "optimizer": optimizer}, tmp_path / "c")


def made_before(rank: int, world_size: int, folder: str) -> str:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    fully_shard(model)
    try:
        ek.save({"model": model, "optimizer": optimizer}, Path(folder) / "c")
    except CheckpointError as error:
        return error.message
    return "saved"


@pytest.mark.ranks
def test_an_optimizer_made_before_fully_shard_is_told_so(tmp_path: Path) -> None:
    for text in run_ranks(made_before, 2, str(tmp_path)):
        assert "the optimizer was made before fully_shard (or parallelize_module) replaced the model's parameters" in text


def sharded(rank: int, world_size: int, folder: str) -> bool:
    def state(seed: int) -> dict[str, Any]:
        model = Adapted(seed)
        fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return {"model": ek.trainable(model), "optimizer": optimizer}

    saved, live = state(0), state(1)
    ek.save(saved, Path(folder) / "c")
    ek.load(live, Path(folder) / "c")
    one, other = (state["model"].model.up.weight.to_local() for state in (saved, live))
    return bool(one.equal(other))


@pytest.mark.ranks
def test_the_trained_part_of_a_sharded_model(tmp_path: Path) -> None:
    assert run_ranks(sharded, 2, str(tmp_path)) == [True, True]
