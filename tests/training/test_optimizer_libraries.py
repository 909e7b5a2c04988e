"""Optimizers of other libraries, resumed bit for bit; each test is skipped where its library is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_checkpoint import MemoryCheckpoint, known
from torch import nn

from elastickpt.training.capture import capture
from elastickpt.training.listing import unexpected
from elastickpt.training.restore import bind, hold_models

State = dict[str, Any]


def make_state(make: Callable[[list[nn.Parameter]], Any], seed: int, dtype: torch.dtype) -> State:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8)).to(dtype)
    return {"model": model, "optimizer": make(list(model.parameters()))}


def train(state: State, steps: int, seed: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    model, optimizer = state["model"], state["optimizer"]
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    for step in range(steps):
        x = torch.randn(16, 64, generator=source).to(next(model.parameters()).dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        closure()
        torch.manual_seed(1000 * seed + step)  # some draw random numbers in a step
        optimizer.step(closure)
    return [parameter.detach().clone() for parameter in model.parameters()]


def resumed(make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype = torch.float32) -> None:
    """Asserts that a fresh one goes on as the one that was saved does."""
    original, other = make_state(make, 0, dtype), make_state(make, 1, dtype)
    train(original, 4, seed=7)
    if callable(getattr(original["optimizer"], "eval", None)):  # schedule-free ones are saved so, as their manuals say
        original["optimizer"].eval()
    checkpoint = MemoryCheckpoint([capture(original, rank=0, world_size=1, declared=None)])
    expected = train(original, 7, seed=11)
    binding = bind(hold_models(other, rank=0, world_size=1, declared=None), checkpoint.listing())
    found = list(unexpected(checkpoint.listing(), arrays=known(checkpoint.listing(), binding), places=binding.places))
    assert [*binding.mismatches, *found] == []
    checkpoint.fill(binding)
    assert all(map(torch.equal, train(other, 7, seed=11), expected))


PYTORCH_OPTIMIZER: dict[str, Callable[[Any, list[nn.Parameter]], Any]] = {
    "lookahead": lambda po, p: po.Lookahead(po.AdamW(p), k=3),
    "lookahead-pullback": lambda po, p: po.Lookahead(po.AdamP(p), k=3, pullback_momentum="pullback"),
    "schedulefree-wrapper": lambda po, p: po.ScheduleFreeWrapper(po.AdamW(p)),
    "magma": lambda po, p: po.Magma(po.AdamW(p)),
    "pcgrad": lambda po, p: po.PCGrad(po.AdamW(p)),
    "ranger21": lambda po, p: po.Ranger21(p, num_iterations=100),
    "spam": lambda po, p: po.SPAM(p),
    "stable-spam": lambda po, p: po.StableSPAM(p),
    "sam": lambda po, p: po.SAM(p, base_optimizer=po.AdamP),
    "adamw": lambda po, p: po.AdamW(p),
    "flash-adamw": lambda po, p: po.FlashAdamW(p),
    "soap": lambda po, p: po.SOAP(p, precondition_frequency=2),
    "muon": lambda po, p: po.Muon(
        [
            {"params": [q for q in p if q.ndim > 1], "use_muon": True},
            {"params": [q for q in p if q.ndim < 2], "use_muon": False},
        ]
    ),
}


@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_pytorch_optimizer(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    resumed(lambda p: PYTORCH_OPTIMIZER[name](library, p))


@pytest.mark.parametrize("name", ["adamw", "flash-adamw", "lookahead"])
def test_pytorch_optimizer_on_parameters_of_16_bits(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    resumed(lambda p: PYTORCH_OPTIMIZER[name](library, p), torch.bfloat16)


TORCH_OPTIMIZER: dict[str, Callable[[Any, list[nn.Parameter]], Any]] = {
    "lookahead": lambda to, p: to.Lookahead(to.Yogi(p), k=3),
    "shampoo": lambda to, p: to.Shampoo(p),
    "lamb": lambda to, p: to.Lamb(p),
    "swats": lambda to, p: to.SWATS(p),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCH_OPTIMIZER)
def test_torch_optimizer(name: str) -> None:
    library = pytest.importorskip("torch_optimizer")
    resumed(lambda p: TORCH_OPTIMIZER[name](library, p))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedulefree(name: str) -> None:
    library = pytest.importorskip("schedulefree")
    resumed(lambda p: getattr(library, name)(p, lr=0.01))


def test_a_wrapper_of_schedulefree() -> None:
    library = pytest.importorskip("schedulefree")
    resumed(lambda p: library.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.01)))


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit", "SGD8bit", "AdamW"])
def test_bitsandbytes(name: str) -> None:
    library = pytest.importorskip("bitsandbytes")

    def make(p: list[nn.Parameter]) -> Any:
        options = {"momentum": 0.9} if name == "SGD8bit" else {}
        return getattr(library.optim, name)(p, lr=0.01, **options)

    try:
        train(make_state(make, 0, torch.float32), 1, 7)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes does not step here: {error}")
    resumed(make)


def test_the_wrapper_of_accelerate() -> None:
    library = pytest.importorskip("accelerate")
    accelerator = library.Accelerator(cpu=True)
    resumed(lambda p: accelerator.prepare_optimizer(torch.optim.AdamW(p, lr=0.01)))
