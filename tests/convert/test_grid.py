"""The paper's grid, trained and converted: PP2 to 1, TP2 to 1, TP2 to PP2, TP x FSDP to 1.

The losses after it are those of the source. Vector V13: Muon beside Adam.
"""

from __future__ import annotations

import grid_jobs
import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from tools.gloo_ranks import run_ranks


def converted(*words: object) -> None:
    assert main(["convert", *map(str, words), "--quiet"]) == 0


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "world_size"), [("pp2", 2), ("tp2", 2), ("tp2 fsdp2", 4)])
def test_one_process_goes_on_with_the_losses_of_several(tmp_path, layout, world_size) -> None:
    wanted = run_ranks(grid_jobs.source, world_size, str(tmp_path / "s"), layout)[-1]
    (tmp_path / "grid.ucl").write_text(grid_jobs.PROGRAM)
    words = ["--rules", tmp_path / "grid.ucl"] if "fsdp" not in layout else []
    converted(tmp_path / "s", tmp_path / "u", *words)
    assert ek.open(tmp_path / "u").verify().problems == ()
    model = grid_jobs.whole(seed=5)
    optimizer = grid_jobs.adam(model)
    ek.load({"model": model, "optimizer": optimizer}, tmp_path / "u")
    found = grid_jobs.train(model, optimizer, range(grid_jobs.STEPS, 2 * grid_jobs.STEPS))
    assert len(found) == len(wanted) == 3
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.ranks
def test_two_stages_go_on_with_the_losses_of_two_tensor_ranks(tmp_path) -> None:
    wanted = run_ranks(grid_jobs.source, 2, str(tmp_path / "s"), "tp2")[-1]
    (tmp_path / "grid.ucl").write_text(grid_jobs.PROGRAM)
    converted(tmp_path / "s", tmp_path / "u", "--rules", tmp_path / "grid.ucl")
    converted(tmp_path / "u", tmp_path / "m", "--to", "megatron", "--mesh", "pp=2,tp=1")
    found = run_ranks(grid_jobs.go_on_by_stages, 2, str(tmp_path / "m"))[-1]
    assert len(found) == 3
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.ranks
def test_v13_muon_beside_adam_goes_on_bit_for_bit(tmp_path) -> None:
    """By two ranks again."""
    wanted = run_ranks(grid_jobs.mixed_source, 2, str(tmp_path / "s"))[0]
    converted(tmp_path / "s", tmp_path / "u")
    states = {one.state for one in ek.open(tmp_path / "u").records if one.section == "params"}
    assert states == {"value", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert run_ranks(grid_jobs.mixed_again, 2, str(tmp_path / "u"))[0] == wanted


def test_v13_muon_beside_adam_of_one_process_goes_on_bit_for_bit(tmp_path) -> None:
    model, muon, adam = grid_jobs.mixed(0)
    grid_jobs.mixed_losses(model, (muon, adam), range(3))
    state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
    torch.save(state, tmp_path / "a.pt")
    wanted = grid_jobs.mixed_losses(model, (muon, adam), range(3, 5))
    converted(tmp_path / "a.pt", tmp_path / "u")
    again, muon, adam = grid_jobs.mixed(9)
    ek.load({"model": again, "muon": muon, "adam": adam}, tmp_path / "u")
    assert grid_jobs.mixed_losses(again, (muon, adam), range(3, 5)) == wanted
