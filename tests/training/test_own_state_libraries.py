"""Real libraries whose modules keep state in ways of their own; each test wants the library that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.errors import ValueNotCarried


def test_persistent_states_of_torchmetrics_sums_and_lists(tmp_path: Path) -> None:
    metrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

    def make() -> Any:
        found = {"mean": metrics.MeanMetric(), "auroc": metrics.classification.BinaryAUROC()}
        for one in found.values():
            one.persistent(mode=True)
        return nn.ModuleDict(found)

    a, b = make(), make()
    for _ in range(3):
        a.mean.update(torch.rand(4))
        a.auroc.update(torch.rand(10), torch.randint(2, (10,)))
    b.auroc.update(torch.rand(5), torch.randint(2, (5,)))
    ek.save({"m": nn.Sequential(a)}, tmp_path / "c")
    ek.load({"m": nn.Sequential(b)}, tmp_path / "c")
    assert b.mean.compute().equal(a.mean.compute())
    assert b.auroc.compute().equal(a.auroc.compute())


def test_fabrics_wrapper_leaves_no_trace_in_names(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed").Fabric(
        accelerator="cpu", devices=1
    )
    a, b = (fabric.setup(nn.Linear(2, 2)) for _ in range(2))
    ek.save({"m": a}, tmp_path / "c")
    assert sorted(ek.open(tmp_path / "c").arrays["params/m"]) == ["bias", "weight"]
    plain = nn.Linear(2, 2)
    ek.load({"m": plain}, tmp_path / "c")
    ek.load({"m": b}, tmp_path / "c")
    assert plain.weight.equal(a.weight)
    assert b.weight.equal(a.weight)


def test_four_bit_layers_whose_loading_takes_no_scales_are_refused(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32)).to("cpu")  # quantises
    with pytest.raises(ValueNotCarried, match=r"module '0' \(Linear4bit\) writes '0.weight.absmax' into its state dict"):
        ek.save({"m": model}, tmp_path / "c")
    assert not (tmp_path / "c").exists()
