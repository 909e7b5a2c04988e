"""Optimizers other than AdamW, groups by stage, extra state and lists of stages: saved at one layout, loaded at another."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from features import PLACES, WORLDS, load_optimizers, load_stages, save_optimizers, save_stages

from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

OPTIMIZER_PAIRS = [("fsdp3", "tp2"), ("tp2fsdp2", "single")]
MORE_OPTIMIZER_PAIRS = [("single", "fsdp3"), ("tp4", "hsdp2x2"), ("pp2fsdp2", "tp4"), ("ddp2", "pp2tp2"), ("fsdp4", "fsdp3")]
STAGE_PAIRS = [("pp2", "single"), ("interleaved2", "fsdp3")]
MORE_STAGE_PAIRS = [pair for pair in product(PLACES, PLACES) if pair not in STAGE_PAIRS]


def _optimizers(folder: Path, source: str, target: str) -> None:
    run_ranks(save_optimizers, WORLDS[source], source, str(folder))
    assert run_ranks(load_optimizers, WORLDS[target], target, str(folder)) == [[]] * WORLDS[target]


def _stages(path: Path, source: str, target: str) -> None:
    run_ranks(save_stages, WORLDS[source], source, str(path))
    assert run_ranks(load_stages, WORLDS[target], target, str(path)) == [[]] * WORLDS[target]


@pytest.mark.parametrize(("source", "target"), OPTIMIZER_PAIRS)
def test_states_of_other_optimizers_go_to_another_layout_bitwise(tmp_path: Path, source: str, target: str) -> None:
    """Adam with amsgrad, SGD with momentum, Adagrad and Muon beside AdamW, each with a MultiStepLR in the middle."""
    _optimizers(tmp_path, source, target)


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), MORE_OPTIMIZER_PAIRS)
def test_states_of_other_optimizers_go_to_more_layouts_bitwise(tmp_path: Path, source: str, target: str) -> None:
    _optimizers(tmp_path, source, target)


@pytest.mark.parametrize(("source", "target"), STAGE_PAIRS)
def test_groups_extra_states_and_schedules_of_stages_go_to_other_stages(tmp_path: Path, source: str, target: str) -> None:
    """Groups differ between ranks in number, order and options; `interleaved2` holds two PipelineStages on each rank."""
    _stages(tmp_path / "c", source, target)


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), MORE_STAGE_PAIRS)
def test_groups_extra_states_and_schedules_go_between_all_cuts_into_stages(tmp_path: Path, source: str, target: str) -> None:
    _stages(tmp_path / "c", source, target)
