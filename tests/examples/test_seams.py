"""The demo's comparison of two checkpoints: it sees one bit in an array, and any other value."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import elastickpt as ek

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def seams() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import seams

        yield seams
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def state() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "rng": ek.RNG()}


def differences(seams: ModuleType, state: dict[str, object], tmp_path: Path, *, step: int = 1) -> tuple[str, ...]:
    """Save what `state` is now, and compare it with `saved`."""
    ek.save(state, tmp_path / "loaded", step=step)
    found: tuple[str, ...] = seams.compare(tmp_path / "saved", tmp_path / "loaded").differences
    return found


def test_equal_states_have_no_difference(seams: ModuleType, state: dict[str, object], tmp_path: Path) -> None:
    ek.save(state, tmp_path / "saved", step=1)
    assert differences(seams, state, tmp_path) == ()


def test_one_bit_of_one_array_is_seen(seams: ModuleType, state: dict[str, object], tmp_path: Path) -> None:
    """The least bit, of a moment: a comparison within a tolerance, or of weights alone, would miss it."""
    ek.save(state, tmp_path / "saved", step=1)
    optimizer = state["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    moment = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    moment.view(torch.int32)[1, 2] ^= 1
    (found,) = differences(seams, state, tmp_path)
    assert "weight" in found
    assert "exp_avg" in found


@pytest.mark.parametrize("option", ["lr", "eps"])
def test_an_option_of_the_optimizer_is_seen(seams: ModuleType, state: dict[str, object], tmp_path: Path, option: str) -> None:
    ek.save(state, tmp_path / "saved", step=1)
    optimizer = state["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.param_groups[0][option] *= 2
    found = differences(seams, state, tmp_path)
    assert found == tuple(f"optimizer/{option} of model/{name}" for name in ("bias", "weight"))


def test_a_random_number_drawn_is_seen(seams: ModuleType, state: dict[str, object], tmp_path: Path) -> None:
    ek.save(state, tmp_path / "saved", step=1)
    torch.rand(1)
    assert differences(seams, state, tmp_path) == ("/rng/streams/torch",)


def test_another_step_is_seen(seams: ModuleType, state: dict[str, object], tmp_path: Path) -> None:
    ek.save(state, tmp_path / "saved", step=1)
    assert differences(seams, state, tmp_path, step=2) == ("step",)
