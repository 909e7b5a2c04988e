"""What is made anew lies in memory as it lay: the next step has the same bits. [UCF-107]"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from tools import mini_reader


class Rotated(torch.optim.Optimizer):
    """Momentum in the eigenbasis of the gradients, as SOAP has it: its states are column by column, small and large, alone
    and in lists."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    basis, _ = torch.linalg.qr(p @ p.T + torch.eye(p.shape[0]))
                    state["basis"] = basis
                    state["bases"] = [basis.clone(memory_format=torch.preserve_format), None]
                    state["momentum"] = torch.zeros_like(p).T.contiguous().T
                state["momentum"].mul_(0.9).add_(state["basis"].T @ p.grad)
                state["bases"][0] = torch.linalg.qr(state["bases"][0] @ state["basis"])[0]
                p.sub_(group["lr"] * (state["bases"][0] @ state["momentum"]))


def _make(seed: int, size: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(size, size, bias=False)
    return {"model": model, "optimizer": Rotated(model.parameters())}


def _train(state: dict[str, Any], steps: range, size: int) -> None:
    for step in steps:
        inputs = torch.randn(4, size, generator=torch.Generator().manual_seed(step))
        state["model"](inputs).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()


@pytest.mark.parametrize("size", [7, 33, 160])
def test_a_rotated_momentum_resumes_bit_for_bit(tmp_path: Path, size: int) -> None:
    state = _make(0, size)
    _train(state, range(2), size)
    ek.save(state, tmp_path / "a")
    other = _make(1, size)
    ek.load(other, tmp_path / "a")
    own, live = (one["optimizer"].state[one["model"].weight] for one in (state, other))
    for name in ("basis", "momentum"):
        assert live[name].stride() == own[name].stride() == (1, size)
    assert live["bases"][0].stride() == own["bases"][0].stride() == (1, size)
    assert live["bases"][1] is None
    _train(state, range(2, 6), size)
    _train(other, range(2, 6), size)
    assert torch.equal(state["model"].weight, other["model"].weight)


class _Keeper:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_the_values_of_an_object_lie_as_they_lay_whatever_it_has_now(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    odd = torch.rand(3, 4, 5).permute(2, 0, 1)
    ek.save({"o": _Keeper({"images": images, "odd": odd, "rows": torch.rand(3, 3)})}, tmp_path / "a")
    for live in ({}, {"images": torch.rand(2, 3, 4, 5), "odd": torch.rand(5, 3, 4), "rows": torch.rand(3, 3).T}):
        keeper = _Keeper(live)
        ek.load({"o": keeper}, tmp_path / "a")
        assert torch.equal(keeper.state["images"], images)
        assert torch.equal(keeper.state["odd"], odd)
        assert (keeper.state["images"].stride(), keeper.state["odd"].stride()) == (images.stride(), odd.stride())


def test_moments_beside_a_weight_in_another_order_lie_as_they_lay(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    state, other = make(0), make(1)
    state["model"](torch.rand(1, 3, 8, 8)).sum().backward()
    state["optimizer"].step()
    own = state["optimizer"].state[state["model"].weight]
    own["exp_avg_sq"] = own["exp_avg_sq"].contiguous()
    ek.save(state, tmp_path / "a")
    ek.load(other, tmp_path / "a")
    live = other["optimizer"].state[other["model"].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert live[name].stride() == own[name].stride()
        assert torch.equal(live[name], own[name])


def test_every_reader_of_version_1_reads_it_and_the_document_says_the_order(tmp_path: Path) -> None:
    columns = torch.arange(6.0).reshape(2, 3).T
    ek.save({"d": {"columns": columns, "wide": torch.rand(1, 4).T, "rows": torch.rand(2, 2)}}, tmp_path / "a")
    assert json.loads((tmp_path / "a/checkpoint.json").read_text())["requires"] == []
    assert mini_reader.read(tmp_path / "a")["extra/d/columns"].tolist() == columns.tolist()
    attributes = {
        name: json.loads((tmp_path / f"a/extra/d/{name}/zarr.json").read_text())["attributes"]["elastickpt"]
        for name in ("columns", "wide", "rows")
    }
    assert attributes["columns"]["axis_order"] == [1, 0]
    assert "axis_order" not in attributes["wide"]
    assert "axis_order" not in attributes["rows"]
    assert ek.open(tmp_path / "a").verify().problems == ()
    live = {"d": {"columns": torch.zeros(3, 2), "wide": torch.zeros(4, 1), "rows": torch.zeros(2, 2)}}
    ek.load(live, tmp_path / "a")
    assert torch.equal(live["d"]["columns"], columns)


def test_a_tensor_that_lies_otherwise_in_the_next_save_is_told_so(tmp_path: Path) -> None:
    """What one save found out of a tensor holds for the next one only if it lies as it lay."""
    tensor = torch.rand(3, 2)
    state = {"d": {"t": tensor}}
    ek.save(state, tmp_path / "a")
    with torch.no_grad():
        tensor.set_(tensor.T.contiguous().T)  # type: ignore[call-overload]
    ek.save(state, tmp_path / "b")
    attributes = json.loads((tmp_path / "b/extra/d/t/zarr.json").read_text())["attributes"]["elastickpt"]
    assert attributes["axis_order"] == [1, 0]
    live = {"d": {"t": torch.zeros(3, 2)}}
    ek.load(live, tmp_path / "b")
    assert torch.equal(live["d"]["t"], tensor)
