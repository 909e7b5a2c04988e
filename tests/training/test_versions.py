"""Loading between a forward and its backward: autograd must notice, as it does after `load_state_dict`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from tools.gloo_ranks import run_ranks

CHANGED = "modified by an inplace operation"


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1))


def test_a_backward_of_a_forward_before_the_load_fails(tmp_path: Path) -> None:
    saved, model = net(0), net(1)
    ek.save({"model": saved}, tmp_path / "c")
    loss = model(torch.ones(2, 4)).sum()
    ek.load({"model": model}, tmp_path / "c")
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_every_kind_of_tensor_in_state_counts_as_changed(tmp_path: Path) -> None:
    saved = {"model": nn.BatchNorm1d(2), "x": torch.ones(3), "tree": {"y": [torch.ones(2)]}}
    ek.save(saved, tmp_path / "c")
    live = {"model": nn.BatchNorm1d(2), "x": torch.zeros(3), "tree": {"y": [torch.zeros(2)]}}
    tensors = [live["model"].weight, live["model"].running_mean, live["x"], live["tree"]["y"][0]]
    before = [tensor._version for tensor in tensors]
    ek.load(live, tmp_path / "c")
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))


def test_tensors_made_in_inference_mode_are_filled(tmp_path: Path) -> None:
    with torch.inference_mode():
        saved, live = {"x": torch.ones(3)}, {"x": torch.zeros(3)}
    ek.save(saved, tmp_path / "c")
    ek.load(live, tmp_path / "c")
    assert live["x"].tolist() == [1.0] * 3


def between(rank: int, world_size: int, folder: str) -> str:
    model = net(0)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, reshard_after_forward=False)
    ek.save({"model": model}, Path(folder) / "c")
    loss = model(torch.ones(2, 4)).sum()
    ek.load({"model": model}, Path(folder) / "c")
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def goes_on(rank: int, world_size: int, folder: str) -> bool:
    model = net(0)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer)
    model(torch.ones(2, 4)).sum().backward()
    ek.save({"model": model}, Path(folder) / "c")
    ek.load({"model": model}, Path(folder) / "c")
    model(torch.ones(2, 4)).sum().backward()
    return all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.ranks
def test_sharded_modules_notice_too_and_go_on_after_it(tmp_path: Path) -> None:
    assert all(CHANGED in text for text in run_ranks(between, 2, str(tmp_path / "a")))
    assert run_ranks(goes_on, 2, str(tmp_path / "b")) == [True, True]
