"""Converted checkpoints are loaded into models and optimizers, and training goes on as it would have. [UCF-120, UCF-121]"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.format.arrays import ArrayId


def net(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, k: int) -> float:
    torch.manual_seed(100 + k)
    loss = model(torch.randn(4, 6)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def test_a_torch_file_goes_on_training_with_its_own_losses(tmp_path) -> None:
    model = net(0)
    optimizer = adamw(model)
    for k in range(3):
        step(model, optimizer, k)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "file.pt")
    wanted = [step(model, optimizer, k) for k in range(3, 6)]
    assert main(["convert", str(tmp_path / "file.pt"), str(tmp_path / "u"), "--quiet"]) == 0
    other = net(1)
    fresh = adamw(other)
    report = ek.load({"model": other, "optimizer": fresh}, tmp_path / "u")
    assert len(report.skipped) == 1  # the epoch, for which this state has no place
    assert "/epoch" in report.skipped[0]
    assert fresh.param_groups[0]["weight_decay"] == 0.1
    assert [step(other, fresh, k) for k in range(3, 6)] == wanted
    assert ek.load({"model": net(2)}, tmp_path / "u").skipped  # nor has this one for the optimizer
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "again.pt"), "--to", "torch", "--quiet"]) == 0
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    third = net(3)
    third.load_state_dict(found["model"])
    last = adamw(third)
    last.load_state_dict(found["optimizer"])  # by number: groups and their order are the source's
    assert [step(third, last, k) for k in range(3, 6)] == wanted


def test_what_ek_saved_goes_out_and_comes_back(tmp_path) -> None:
    model = net(0)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for k in range(3):
        step(model, optimizer, k)
        scheduler.step()
    ek.save({"model": model, "optimizer": optimizer, "scheduler": scheduler}, tmp_path / "saved", step=3)
    wanted = [step(model, optimizer, k) for k in range(3, 6)]
    for form in ("torch", "dcp"):
        assert main(["convert", str(tmp_path / "saved"), str(tmp_path / form), "--to", form, "--quiet"]) == 0
    found = torch.load(tmp_path / "torch", weights_only=True)
    again = net(1)
    again.load_state_dict(found["model"])
    named = dict(again.named_parameters())  # in which order groups had them is not known: they stand by name
    groups = [
        {"params": [(name, named[name]) for name in group["param_names"]], "weight_decay": group["weight_decay"]}
        for group in found["optimizer"]["param_groups"]
    ]
    fresh = torch.optim.AdamW(groups, lr=1e-2)
    fresh.load_state_dict(found["optimizer"])
    later = torch.optim.lr_scheduler.StepLR(fresh, 2)
    later.load_state_dict(found["scheduler"])
    assert later.last_epoch == 3
    assert [step(again, fresh, k) for k in range(3, 6)] == wanted
    assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "u"), "--quiet"]) == 0
    third = net(2)
    last = adamw(third)
    ek.load({"model": third, "optimizer": last}, tmp_path / "u")
    assert [step(third, last, k) for k in range(3, 6)] == wanted


@pytest.mark.parametrize("number", [int, float, np.int64, np.float32, torch.tensor])
@pytest.mark.parametrize("stepped", [False, True])
def test_steps_that_are_numbers_of_any_kind_load_and_count_on(tmp_path, number, stepped: bool) -> None:
    """As files from before torch 1.12 have them, and programs that count by themselves."""
    model = net(0)
    optimizer = adamw(model)
    for k in range(3):
        step(model, optimizer, k)
    saved = optimizer.state_dict()
    states = {key: {**one, "step": number(3)} for key, one in saved["state"].items()}
    torch.save({"model": model.state_dict(), "optimizer": {**saved, "state": states}}, tmp_path / "file.pt")
    wanted = [step(model, optimizer, k) for k in range(3, 6)]
    assert main(["convert", str(tmp_path / "file.pt"), str(tmp_path / "u"), "--quiet"]) == 0
    other = net(1)
    fresh = adamw(other)
    if stepped:
        step(other, fresh, 9)
    ek.load({"model": other, "optimizer": fresh}, tmp_path / "u")
    assert [step(other, fresh, k) for k in range(3, 6)] == wanted
    assert {float(one["step"]) for one in fresh.state.values()} == {6.0}


def test_a_state_that_is_none_stays_none(tmp_path) -> None:
    model = net(0)
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_buffer"] = None
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "file.pt")
    assert main(["convert", str(tmp_path / "file.pt"), str(tmp_path / "u"), "--quiet"]) == 0
    other = net(1)
    fresh = torch.optim.SGD(list(other.named_parameters()), lr=0.1, momentum=0.9)
    ek.load({"model": other, "optimizer": fresh}, tmp_path / "u")
    found = fresh.state_dict()["state"]
    assert found[0] == {"momentum_buffer": None}
    assert torch.equal(found[1]["momentum_buffer"], saved["state"][1]["momentum_buffer"])
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "again.pt"), "--to", "torch", "--quiet"]) == 0
    assert torch.load(tmp_path / "again.pt", weights_only=True)["optimizer"]["state"][0] == {"momentum_buffer": None}


def half_types(folder: Path) -> dict[str, torch.Tensor]:
    """bf16 weights with fp32 masters, on two tensor-parallel ranks of Megatron."""
    from elastickpt.foreign.file_plans import NewTensor
    from elastickpt.foreign.listing import ParamGroup
    from elastickpt.foreign.megatron_plan import NewRank, plan_megatron_legacy

    torch.manual_seed(5)
    whole = {"up": torch.randn(8, 4), "norm": torch.randn(4)}
    args = dict.fromkeys(("num_layers", "num_attention_heads", "kv_channels", "padded_vocab_size"), 1)
    ranks, contents = [], {}
    for tp in range(2):
        local = {"up": whole["up"][4 * tp : 4 * tp + 4], "norm": whole["norm"]}
        chunk = {name: NewTensor(f"{tp} {name} value", "bfloat16", tuple(one.shape)) for name, one in local.items()}
        masters = {k: NewTensor(f"{tp} {name} master", "float32", tuple(local[name].shape)) for k, name in enumerate(local)}
        contents.update({f"{tp} {name} value": one.bfloat16() for name, one in local.items()})
        contents.update({f"{tp} {name} master": one for name, one in local.items()})
        groups = (ParamGroup("optimizer", (0, 1), {"lr": 0.1}),)
        ranks.append(NewRank(0, tp, (chunk,), {}, groups, masters, args, {}))
    for plan in plan_megatron_legacy(ranks, step=7):
        path = folder / plan.path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(plan.nbytes)
        for slot in plan.slots:
            raw = contents[slot.tensor.key].contiguous().view(torch.uint8).numpy().tobytes()
            data[slot.offset : slot.offset + len(raw)] = raw
        for offset, frame in plan.frames({}):
            data[offset : offset + len(frame)] = frame
        path.write_bytes(data)
    return whole


RULES = """\
ucl 1
mesh m = pp, tp
order optimizer = matrices, vectors
in model
    up    o/tp  h  same pp
    norm  h        same pp, tp
"""


@pytest.mark.parametrize(("weights", "states"), [(None, {"value", "master"}), ("value", {"value"}), ("master", {"value"})])
def test_masters_of_another_type_stay_or_become_the_weights(tmp_path, weights: str | None, states: set[str]) -> None:
    whole = half_types(tmp_path / "m")
    (tmp_path / "mine.ucl").write_text(RULES)
    words = ["--weights", weights] if weights else []
    source = ["convert", str(tmp_path / "m"), str(tmp_path / "u"), "--rules", str(tmp_path / "mine.ucl"), "--quiet"]
    assert main([*source, *words]) == 0
    checkpoint = ek.open(tmp_path / "u")
    assert {one.state for one in checkpoint.records} == states
    value = checkpoint.read(ArrayId("params", "model", "up", "value"))
    assert str(value.dtype) == ("float32" if weights == "master" else "bfloat16")
    bits = whole["up"] if weights == "master" else whole["up"].bfloat16()
    assert value.tobytes() == bits.view(torch.uint8).numpy().tobytes()
    if weights is None:
        master = checkpoint.read(ArrayId("params", "model", "up", "master"))
        assert np.array_equal(master, whole["up"].numpy())
        model = torch.nn.ParameterDict({name: torch.zeros_like(one, dtype=torch.bfloat16) for name, one in whole.items()})
        report = ek.load({"model": model}, tmp_path / "u")
        assert sum("a master" in one for one in report.skipped) == 2
        assert torch.equal(model["up"], whole["up"].bfloat16())
        assert main(["convert", str(tmp_path / "u"), str(tmp_path / "again"), "--to", "megatron", "--quiet"]) == 0
        for file in (tmp_path / "m").rglob("*.pt"):
            again = ek_tensors(tmp_path / "again" / file.relative_to(tmp_path / "m"))
            for name, one in ek_tensors(file).items():
                assert torch.equal(one, again[name])


def ek_tensors(path: Path) -> dict[str, torch.Tensor]:
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(path, weights_only=True)
    masters = {
        f"master {k}": one for k, one in enumerate(x for group in found["optimizer"]["fp32_from_fp16_params"] for x in group)
    }
    return {**found["model"], **masters}
