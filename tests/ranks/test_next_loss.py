"""After a load the next steps are those of the run that was saved: bitwise at the same layout, to rounding at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts import WIDTH, Block, _fsdp, _tp, adam
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from elastickpt.testing.ranks import run_ranks

BATCH = 12
WORLD = {"single": 1, "ddp2": 2, "fsdp2": 2, "fsdp3": 3, "tp2": 2, "tp2fsdp2": 4, "hsdp2x2": 4}
DATA_PARALLEL = {"single": 1, "ddp2": 2, "fsdp2": 2, "fsdp3": 3, "tp2": 1, "tp2fsdp2": 2, "hsdp2x2": 4}


class Plain(nn.Module):
    """The blocks without batch norm, whose statistics depend on how a batch is split."""

    embed = head = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleDict({str(number): Block() for number in range(2)})
        for block in self.blocks.values():
            block.norm = nn.LayerNorm(WIDTH)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def _build(name: str) -> nn.Module:
    model = Plain()
    if name == "ddp2":
        return DistributedDataParallel(model)
    if name.startswith("fsdp"):
        return _fsdp(model, init_device_mesh("cpu", (WORLD[name],)))  # type: ignore[arg-type]
    if name == "hsdp2x2":
        return _fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))  # type: ignore[arg-type]
    if name == "tp2":
        return _tp(model, init_device_mesh("cpu", (2,)))  # type: ignore[arg-type]
    if name == "tp2fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return _fsdp(_tp(model, mesh["tp"]), mesh["dp"])  # type: ignore[arg-type]
    return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rank: int, name: str) -> float:
    """One step on batch `number`; the loss over the whole batch."""
    data = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    ways = DATA_PARALLEL[name]
    part = (rank // (WORLD[name] // ways)) * (BATCH // ways)
    loss = model(data[part : part + BATCH // ways]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if WORLD[name] > 1:
        dist.all_reduce(total)
    return float(total / WORLD[name])


def train_and_save(rank: int, world_size: int, name: str, path: str) -> list[float]:
    """Two steps, a save, two more: the losses after the save."""
    import elastickpt as ek

    model = _build(name)
    optimizer = adam(model)
    for number in (0, 1):
        _step(model, optimizer, number, rank, name)
    ek.save({"model": model, "optimizer": optimizer}, path, step=2)
    return [_step(model, optimizer, number, rank, name) for number in (2, 3)]


def resume(rank: int, world_size: int, name: str, path: str) -> list[float]:
    """A load, then two steps: their losses."""
    import elastickpt as ek

    model = _build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adam(model)
    ek.load({"model": model, "optimizer": optimizer}, path)
    return [_step(model, optimizer, number, rank, name) for number in (2, 3)]


@pytest.mark.ranks
def test_the_next_losses_are_those_of_the_saved_run(tmp_path: Path) -> None:
    """Saved at FSDP2(2): resumed there the losses are equal to the last bit, elsewhere within 1e-6 relative."""
    path = str(tmp_path / "saved")
    expected = run_ranks(train_and_save, WORLD["fsdp2"], "fsdp2", path)[0]
    assert run_ranks(resume, WORLD["fsdp2"], "fsdp2", path)[0] == expected
    for name in WORLD:
        found = run_ranks(resume, WORLD[name], name, path)[0]
        assert found == pytest.approx(expected, rel=1e-6, abs=0), name
    assert expected[0] != expected[1]  # the steps do change the model


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("name", WORLD)
def test_resuming_at_the_same_layout_repeats_the_losses_bitwise(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "saved")
    expected = run_ranks(train_and_save, WORLD[name], name, path)[0]
    assert run_ranks(resume, WORLD[name], name, path)[0] == expected
