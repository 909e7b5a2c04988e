"""An entry whose own code raises: it is named, with what had been changed by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.errors import EntryFailed


class Scaler:
    """An object whose state dict or loading may raise."""

    def __init__(self, *, saves: bool = True, loads: bool = True) -> None:
        self.saves, self.loads, self.scale = saves, loads, 1.0

    def state_dict(self) -> dict[str, Any]:
        if not self.saves:
            raise KeyError("no scale yet")
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.loads:
            raise TypeError("cannot take it")
        self.scale = state["scale"]


class Picky(nn.Linear):
    """A module whose extra state raises on either side."""

    def get_extra_state(self) -> int:
        if self.bias is None:
            raise RuntimeError("not calibrated")
        return 1

    def set_extra_state(self, state: int) -> None:
        raise RuntimeError("cannot be calibrated")


def test_an_entry_whose_state_dict_raises_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    state = {"model": nn.Linear(1, 1), "scaler": Scaler(saves=False)}
    with pytest.raises(EntryFailed, match=r"entry 'scaler' \(Scaler\): .*KeyError: 'no scale yet'; nothing was changed"):
        ek.save(state, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EntryFailed, match=r"entry 'scaler' \(Scaler\)"):
        ek.async_save(state, tmp_path / "c").result()
    with pytest.raises(EntryFailed, match=r"entry 'm' \(Picky\): .*not calibrated"):
        ek.save({"m": Picky(1, 1, bias=False)}, tmp_path / "c")


def test_an_entry_whose_state_dict_raises_before_a_load_is_named_and_nothing_changes(tmp_path: Path) -> None:
    ek.save({"model": nn.Linear(1, 1), "scaler": Scaler()}, tmp_path / "c")
    model = nn.Linear(1, 1)
    weight = model.weight.item()
    with pytest.raises(EntryFailed, match=r"entry 'scaler' \(Scaler\): .*nothing was changed"):
        ek.load({"model": model, "scaler": Scaler(saves=False)}, tmp_path / "c")
    assert model.weight.item() == weight


def test_an_entry_whose_loading_raises_is_named_with_what_changed_already(tmp_path: Path) -> None:
    def state(**how: bool) -> dict[str, Any]:
        return {"first": Scaler(), "second": Scaler(**how), "third": Scaler(), "x": torch.ones(1)}

    saved = state()
    saved["first"].scale = saved["third"].scale = 2.0
    ek.save(saved, tmp_path / "c")
    live = state(loads=False)
    with pytest.raises(EntryFailed) as caught:
        ek.load(live, tmp_path / "c")
    text = caught.value.message
    assert "entry 'second' (Scaler): loading its state raised TypeError: cannot take it" in text
    assert "changed already: all tensors that were read, entry 'first' (Scaler), and perhaps" in text
    assert "not reached: entry 'third' (Scaler)" in text
    assert "the content of `state` is now undefined" in text
    assert (live["first"].scale, live["third"].scale) == (2.0, 1.0)


def test_a_module_whose_extra_state_cannot_be_set_is_named(tmp_path: Path) -> None:
    ek.save({"m": Picky(1, 1)}, tmp_path / "c")
    with pytest.raises(EntryFailed, match=r"entry 'm' \(Picky\): .*cannot be calibrated"):
        ek.load({"m": Picky(1, 1)}, tmp_path / "c")
