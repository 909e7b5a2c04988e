"""`ek.save` as a training script uses it: any state, again and again, each time only what is new is exchanged."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.errors import StateMismatch
from elastickpt.format.arrays import ArrayId
from elastickpt.ranks.team import Alone
from elastickpt.saving.structures import KNOWN


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of all rounds that ranks go through, as they begin; no plan is known at first."""
    names: list[str] = []
    real = Alone.round

    def counted(self: Alone, name: str, contribute: Any, decide: Any) -> bytes:
        names.append(name)
        return real(self, name, contribute, decide)

    monkeypatch.setattr(Alone, "round", counted)
    monkeypatch.setattr(KNOWN, "_known", OrderedDict())
    return names  # type: ignore[return-value]


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_an_empty_state(tmp_path: Path) -> None:
    info = ek.save({}, tmp_path / "c", step=0)
    assert (info.arrays, info.nbytes, info.step) == (0, 0, 0)
    assert ek.load({}, tmp_path / "c").step == 0
    opened = ek.open(tmp_path / "c")
    assert opened.verify().sound
    assert (dict(opened.records), dict(opened.values), list(opened.arrays.keys())) == ({}, {}, [])


def test_a_state_of_values_only(tmp_path: Path) -> None:
    state = {"n": 3, "f": float("nan"), "big": 1 << 200, "t": (1, "a", None, b"\0"), "c": Counter(a=2), "d": {1: {2: [-0.0]}}}
    info = ek.save(state, tmp_path / "c")
    assert info.arrays == 0
    live = {"n": 0, "f": 0.0, "big": 0, "t": (), "c": Counter(), "d": {1: {2: [1.0]}}}
    ek.load(live, tmp_path / "c")
    assert repr(live) == repr(state)
    assert ek.open(tmp_path / "c").verify().sound


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    def made(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        actor, critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        state: dict[str, Any] = {"actor": actor, "critic": critic, "ema": nn.Linear(3, 2)}
        state["fast"] = torch.optim.Adam(actor.parameters(), lr=0.1 * (seed + 1), amsgrad=True)
        state["slow"] = torch.optim.SGD(critic.parameters(), lr=0.2 * (seed + 1), momentum=0.9)
        _stepped(actor, state["fast"])
        _stepped(critic, state["slow"])
        return state

    saved, live = made(0), made(1)
    ek.save(saved, tmp_path / "c")
    ek.load(live, tmp_path / "c")
    for key in ("actor", "critic", "ema"):
        for name, tensor in saved[key].state_dict().items():
            assert torch.equal(live[key].state_dict()[name], tensor), (key, name)
    for key in ("fast", "slow"):
        assert repr(live[key].state_dict()) == repr(saved[key].state_dict())


def test_a_second_save_exchanges_no_structure(tmp_path: Path, rounds: list[str]) -> None:
    model = nn.Linear(3, 2)
    for number in range(3):
        with torch.no_grad():
            model.weight.fill_(number)
        ek.save({"m": model, "n": number}, tmp_path / str(number), step=number)
    assert rounds == ["prepare", "structure", "draft", "write", *(["prepare", "write"] * 2)]
    for number in range(3):
        found = ek.open(tmp_path / str(number)).read(ArrayId("params", "m", "weight", "value"))
        assert (found == number).all()


def test_optimizer_state_that_appears_is_planned_anew(tmp_path: Path, rounds: list[str]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"m": model, "o": optimizer}
    before = ek.save(state, tmp_path / "0")
    _stepped(model, optimizer)
    after = ek.save(state, tmp_path / "1")
    again = ek.save(state, tmp_path / "2")
    assert (before.arrays, after.arrays, again.arrays) == (2, 6, 6)
    assert rounds.count("structure") == 2
    fresh = nn.Linear(3, 2)
    new = torch.optim.AdamW(fresh.parameters())
    ek.load({"m": fresh, "o": new}, tmp_path / "2")
    assert torch.equal(new.state[fresh.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    report = ek.load({"m": fresh, "o": new}, tmp_path / "0")
    assert report.notes == ("/o: parameters had no state when they were saved, and have none now",)
    assert not new.state
    unstepped = torch.optim.AdamW(fresh.parameters())
    ek.load({"m": fresh, "o": unstepped}, tmp_path / "0")
    assert not unstepped.state


def test_structures_alternate_without_being_exchanged_again(tmp_path: Path, rounds: list[str]) -> None:
    """Model only and with optimizer, in turns: both plans are kept."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    _stepped(model, optimizer)
    for number in range(6):
        ek.save({"m": model, "o": optimizer} if number % 2 else {"m": model}, tmp_path / str(number), durability="process")
    assert rounds.count("structure") == 2


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "items"])
def test_a_plan_is_never_used_for_another_structure(tmp_path: Path, rounds: list[str], change: str) -> None:
    ek.save({"d": {"a": torch.zeros(4, 2)}}, tmp_path / "0")
    tensor = torch.arange(8.0)
    other: dict[str, Any] = {
        "shape": {"d": {"a": tensor.reshape(2, 4)}},
        "dtype": {"d": {"a": tensor.reshape(4, 2).int()}},
        "name": {"d": {"b": tensor.reshape(4, 2)}},
        "items": {"d": {"a": tensor.reshape(4, 2)}, "e": 1},
    }[change]
    ek.save(other, tmp_path / "1")
    assert rounds.count("structure") == 2
    ((array, record),) = ek.open(tmp_path / "1").records.items()
    assert ek.open(tmp_path / "1").read(array).reshape(-1).tolist() == tensor.tolist()
    assert record.spec.shape == tuple(next(iter(other["d"].values())).shape)


def test_a_refused_save_does_not_spoil_the_next(tmp_path: Path, rounds: list[str]) -> None:
    state: dict[str, Any] = {"t": torch.ones(2)}
    ek.save(state, tmp_path / "0")
    with pytest.raises(ek.errors.PathOccupied):
        ek.save(state, tmp_path / "0")
    ek.save(state, tmp_path / "1")
    assert rounds.count("structure") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


class _Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("live_tied", [True, False])
@pytest.mark.parametrize("saved_tied", [True, False])
def test_tied_and_frozen_parameters(tmp_path: Path, saved_tied: bool, live_tied: bool) -> None:
    torch.manual_seed(0)
    saved, live = _Tied(tied=saved_tied), _Tied(tied=live_tied)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (saved, live)]
    _stepped(saved, optimizers[0])
    info = ek.save({"m": saved, "o": optimizers[0]}, tmp_path / "c")
    assert info.arrays == (4 if saved_tied else 7)
    if live_tied and not saved_tied:
        # two different tensors cannot both go into one: only where that is asked for, and then the one that is read is said
        with pytest.raises(StateMismatch, match=r"params/m/head.weight/exp_avg: value: expected the contents of"):
            ek.load({"m": live, "o": optimizers[1]}, tmp_path / "c")
        report = ek.load({"m": live, "o": optimizers[1]}, tmp_path / "c", strict="missing")
        assert any("is not read: it is tied" in note for note in report.notes)
        return
    ek.load({"m": live, "o": optimizers[1]}, tmp_path / "c")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(live.state_dict()[name], tensor), name
    assert (live.head.weight is live.embed.weight) is live_tied


def test_what_a_save_reports_is_what_stands_there(tmp_path: Path) -> None:
    info = ek.save({"t": torch.zeros(7, dtype=torch.float64), "u": torch.zeros(3)}, tmp_path / "c", step=12)
    opened = ek.open(info.path)
    assert (info.nbytes, info.arrays, info.step) == (68, 2, 12)
    assert (opened.step, len(opened.records), opened.manifest.attempt) == (12, 2, info.attempt)
    assert opened.verify().nbytes == 68


def test_the_state_is_not_changed_and_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    streams = torch.get_rng_state()
    ek.save({"m": model, "o": optimizer, "rng": ek.RNG()}, tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), streams)
    assert not optimizer.state
    assert all(
        model.state_dict()[n].data_ptr() == at and torch.equal(model.state_dict()[n], t) for n, (at, t) in tensors.items()
    )


@pytest.mark.parametrize("kind", ["text", "path", "url", "memory"])
def test_every_way_to_name_a_path(tmp_path: Path, kind: str) -> None:
    path: Any = {
        "text": str(tmp_path / "c d"),
        "path": tmp_path / "c d",
        "url": (tmp_path / "c d").as_uri(),
        "memory": f"memory://{tmp_path.name}/runs/c",
    }[kind]
    info = ek.save({"t": torch.ones(3), "n": 1}, path, step=4)
    live = {"t": torch.zeros(3), "n": 0}
    assert ek.load(live, path).step == 4
    assert live["n"] == 1
    assert ek.open(path).verify().sound
    assert ek.open(info.path).step == 4
    if kind == "memory":
        assert info.notes == ("durability 'process' instead of 'power': memory lacks directory_sync",)
    else:
        assert info.notes == ()
        assert [p.name for p in tmp_path.iterdir()] == ["c d"]
