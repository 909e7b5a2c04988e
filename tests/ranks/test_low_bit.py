"""torchao's optimizers and weights: resumed bit for bit, in one process and from FSDP2 on 2 ranks to others."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import elastickpt as ek
from elastickpt.errors import StateMismatch
from elastickpt.training.composites import leaves_of
from tools.gloo_ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    low_bit = pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install .[test]")
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    quantized_training = pytest.importorskip("torchao.prototype.quantized_training")
    quantize_ = pytest.importorskip("torchao.quantization").quantize_
    float8 = pytest.importorskip("torchao.float8")

OPTIMIZERS = ("AdamW8bit", "AdamW4bit", "AdamWFp8")
WEIGHTS = ("nf4", "int8", "int8_mixed", "bitnet")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ranks]


class Net(nn.Module):
    """Rows that 2 ranks hold evenly, and a first layer whose states are too small to be quantised."""

    def __init__(self, rows: int = 128) -> None:
        super().__init__()
        self.small = nn.Linear(16, 64)
        self.up = nn.Linear(64, rows)
        self.down = nn.Linear(rows, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.small(x))))


def _make(optimizer: str, *, seed: int, world_size: int, rows: int = 128, sharded: bool) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(seed)
    model = Net(rows)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    made = getattr(low_bit, optimizer)(model.parameters(), lr=1e-2 / (seed + 1))
    return {"model": model, "optimizer": made}


def _train(state: dict[str, Any], steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        state["model"](inputs).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()


def _whole(model: nn.Module) -> list[torch.Tensor]:
    found = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [one.detach().clone() for one in found]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_low_bit_optimizer_resumes_in_one_process(tmp_path: Path, optimizer: str) -> None:
    state = _make(optimizer, seed=0, world_size=1, sharded=False)
    _train(state, range(3))
    ek.save(state, tmp_path / "a")
    _train(state, range(3, 6))
    for steps in (range(0), range(2)):  # into no states, and into others
        other = _make(optimizer, seed=1, world_size=1, sharded=False)
        _train(other, steps)
        assert ek.load(other, tmp_path / "a").notes == ()
        _train(other, range(3, 6))
        assert all(map(torch.equal, _whole(other["model"]), _whole(state["model"])))


Told = list[list[torch.Tensor]]


def _begin(rank: int, world_size: int, root: str, rows: int) -> tuple[Told, Told, Told]:
    """The whole weights after 5 steps: never interrupted, resumed without states and with others."""
    truth: Told = []
    for optimizer in OPTIMIZERS:
        state = _make(optimizer, seed=0, world_size=world_size, rows=rows, sharded=True)
        _train(state, range(3))
        ek.save(state, f"{root}/{optimizer}")
        _train(state, range(3, 5))
        truth.append(_whole(state["model"]))
    return truth, _go_on(rank, world_size, root, rows, range(0)), _go_on(rank, world_size, root, rows, range(1))


def _go_on(rank: int, world_size: int, root: str, rows: int, steps: range) -> Told:
    after = []
    for optimizer in OPTIMIZERS:
        state = _make(optimizer, seed=1, world_size=world_size, rows=rows, sharded=True)
        _train(state, steps)
        ek.load(state, f"{root}/{optimizer}")
        _train(state, range(3, 5))
        after.append(_whole(state["model"]))
    return after


def _equal(one: Told, other: Told) -> bool:
    return all(torch.equal(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True))


def test_low_bit_states_of_fsdp2_go_from_two_ranks_to_two_and_to_one(tmp_path: Path) -> None:
    """[UCF-109]"""
    (truth, fresh, trained), _ = run_ranks(_begin, 2, str(tmp_path), 128)
    assert _equal(fresh, truth)
    assert _equal(trained, truth)
    (alone,) = run_ranks(_go_on, 1, str(tmp_path), 128, range(1))
    assert _equal(alone, truth)
    whole = ek.open(tmp_path / "AdamW8bit").arrays
    codes, scale = (whole[f"params/model/up.weight/exp_avg.{part}"] for part in ("codes", "scale"))
    assert (codes.shape, scale.shape) == ((128, 64), (32,))


def _refused(rank: int, world_size: int, root: str, rows: int) -> str:
    state = _make("AdamW8bit", seed=1, world_size=world_size, rows=rows, sharded=True)
    with pytest.raises(StateMismatch) as refusal:
        ek.load(state, f"{root}/AdamW8bit")
    return str(refusal.value)


@pytest.mark.parametrize("rows", [pytest.param(260, marks=pytest.mark.long), 257])
def test_states_of_uneven_shards_are_each_ranks_own(tmp_path: Path, rows: int) -> None:
    """[UCF-87, UCF-109]"""
    (truth, fresh, trained), *_ = run_ranks(_begin, 3 if rows == 260 else 2, str(tmp_path), rows)
    assert _equal(fresh, truth)
    assert _equal(trained, truth)
    (message,) = run_ranks(_refused, 1, str(tmp_path), rows)
    assert re.search(r"/optimizer/state/model/up\.weight/exp_avg.*expected the layout that saved it", message)


def _weights(kind: str, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    if kind == "nf4":
        for layer in model:
            layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 1), requires_grad=False)
        return model
    configs = {
        "int8": quantized_training.int8_weight_only_quantized_training,
        "int8_mixed": quantized_training.int8_mixed_precision_training,
        "bitnet": quantized_training.bitnet_training,
    }
    quantize_(model, configs[kind]())
    return model


def _bits(model: nn.Module) -> list[torch.Tensor]:
    return [leaf.detach().clone() for p in model.parameters() for _, leaf in leaves_of(p)]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_low_bit_weights_are_loaded_bit_for_bit(tmp_path: Path, kind: str) -> None:
    torch.compiler.set_stance("force_eager")
    model, other = _weights(kind, seed=0), _weights(kind, seed=1)
    assert not all(map(torch.equal, _bits(model), _bits(other)))
    ek.save({"m": model}, tmp_path / "a")
    ek.load({"m": other}, tmp_path / "a")
    assert all(map(torch.equal, _bits(model), _bits(other)))
    assert ek.open(tmp_path / "a").verify().problems == ()


# -- weights under FSDP2 -----------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen NF4 weight and the low-rank change of it that is trained, as QLoRA does."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nf4.to_nf4(torch.randn(outer, inner), 64, 1), requires_grad=False)
        self.down = nn.Parameter(torch.randn(4, inner) / 8)
        self.up = nn.Parameter(torch.zeros(outer, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = nf4.linear_nf4(x, self.weight) + x @ self.down.T @ self.up.T
        return changed


def _layers(kind: str, *, seed: int, world_size: int) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(seed)
    model = nn.Sequential(*(Adapted(*sizes) if kind == "nf4" else nn.Linear(*sizes) for sizes in ((16, 128), (128, 64))))
    if kind == "float8":
        config = float8.Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
        float8.convert_to_float8_training(model, config=config)
    if world_size > 1 or kind == "float8":  # torchao gathers no NF4 over one rank
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"model": model, "optimizer": torch.optim.AdamW(trained, lr=1e-2 / (seed + 1))}


def _told(model: nn.Module) -> list[torch.Tensor]:
    """The whole of what is trained, then this rank's parts of the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained)
    frozen = [getattr(p, "_local_tensor", p) for p in model.parameters() if not p.requires_grad]
    parts = [leaf for p in frozen for _, leaf in leaves_of(p)]
    return [one.detach().clone() for one in (*(getattr(one, "_tensor", one) for one in whole), *parts)]


def _save_layers(rank: int, world_size: int, root: str, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this rank has after 4 steps: never interrupted, and resumed after 2."""
    state = _layers(kind, seed=0, world_size=world_size)
    _train(state, range(2))
    ek.save(state, f"{root}/{kind}")
    _train(state, range(2, 4))
    return _told(state["model"]), _resume_layers(rank, world_size, root, kind)


def _resume_layers(rank: int, world_size: int, root: str, kind: str) -> list[torch.Tensor]:
    state = _layers(kind, seed=1, world_size=world_size)
    ek.load(state, f"{root}/{kind}")
    _train(state, range(2, 4))
    return _told(state["model"])


def test_nf4_weights_under_fully_shard_go_on_with_their_adapters_on_any_number_of_ranks(tmp_path: Path) -> None:
    """The class says by its own split how its parts follow the rows. [UCF-109]"""
    told = run_ranks(_save_layers, 2, str(tmp_path), "nf4")
    assert all(torch.equal(a, b) for truth, resumed in told for a, b in zip(truth, resumed, strict=True))
    shapes = {name: array.shape for name, array in ek.open(tmp_path / "nf4").arrays["params/model/0.weight"].arrays()}
    assert (shapes["value.quantized_data"], shapes["value.scaler_mean"]) == ((1024,), ())
    (alone,) = run_ranks(_resume_layers, 1, str(tmp_path), "nf4")
    assert all(map(torch.equal, alone[:4], told[0][0][:4]))  # what is trained
    assert torch.equal(alone[4], torch.cat([truth[4] for truth, _ in told]))  # the codes of the first weight


def test_float8_all_gather_under_fully_shard_goes_from_two_ranks_to_two_and_to_one(tmp_path: Path) -> None:
    (truth, resumed), _ = run_ranks(_save_layers, 2, str(tmp_path), "float8")
    (alone,) = run_ranks(_resume_layers, 1, str(tmp_path), "float8")
    assert all(map(torch.equal, resumed, truth))
    assert all(map(torch.equal, alone, truth))
