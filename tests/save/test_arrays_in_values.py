"""Large tensors and numpy arrays inside states, options, extra states, dicts and `PerRank` are arrays, small ones values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.errors import StateMismatch, StructureConflict
from tools import mini_reader

LARGE = 20_000  # elements: 80 kB of float32


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, size: int) -> None:
    for step in steps:
        inputs = torch.randn(4, size, generator=torch.Generator().manual_seed(step))

        def closure(inputs: torch.Tensor = inputs) -> Any:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("size", [5, 129])
def test_l_bfgs_resumes_bit_for_bit(tmp_path: Path, size: int) -> None:
    """[UCF-112]"""

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(size, size)
        return {"m": model, "o": torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=5)}

    state = make(0)
    _train(state["m"], state["o"], range(3), size)
    ek.save(state, tmp_path / "a")
    _train(state["m"], state["o"], range(3, 5), size)
    for steps in (range(0), range(1)):
        other = make(1)
        _train(other["m"], other["o"], steps, size)
        ek.load(other, tmp_path / "a")
        _train(other["m"], other["o"], range(3, 5), size)
        assert torch.equal(other["m"].weight, state["m"].weight)
        assert torch.equal(other["m"].bias, state["m"].bias)
    requires = json.loads((tmp_path / "a/checkpoint.json").read_text())["requires"]
    assert requires == ([] if size == 5 else ["arrays-in-values"])
    states = [name for name in mini_reader.read(tmp_path / "a") if name.startswith("params/m/weight/old_dirs.")]
    assert bool(states) == (size == 129)


class Nested(torch.optim.SGD):
    """States of every kind that optimizers nest: lists, dicts, tuples, numpy arrays."""

    def fill(self, seed: int, size: int) -> None:
        generator = numpy.random.default_rng(seed)
        for group in self.param_groups:
            group["table"] = {"t": torch.from_numpy(generator.random(size)), "n": generator.random(3), "none": None}
            for p in group["params"]:
                made = [torch.from_numpy(generator.random(size)).float() for _ in range(3)]
                self.state[p] = {
                    "list": [made[0], None, 2.5, torch.tensor(3), [made[1]]],
                    "dict": {"a.b": made[2], "c/d": torch.ones(2), 3: generator.random((size, 1)).astype("float32")},
                    "numpy": generator.integers(0, 9, size),
                    "bf16": [numpy.ones(size, dtype=ml_dtypes.bfloat16) * seed],
                }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (numpy.ndarray, numpy.generic)):
        return type(one) is type(other) and one.dtype == other.dtype and bool(numpy.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _nested(seed: int, size: int, *, filled: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = Nested(model.parameters(), lr=0.1)
    if filled:
        optimizer.fill(seed, size)
    return {"m": model, "o": optimizer}


@pytest.mark.parametrize("size", [4, LARGE])
@pytest.mark.parametrize("filled", [False, True])
def test_nested_states_and_options_come_back(tmp_path: Path, size: int, filled: bool) -> None:
    """[UCF-112]"""
    state, other = _nested(1, size, filled=True), _nested(2, size, filled=filled)
    ek.save(state, tmp_path / "a")
    ek.load(other, tmp_path / "a")
    own, live = state["o"], other["o"]
    for p, q in zip(state["m"].parameters(), other["m"].parameters(), strict=True):
        assert _same(dict(sorted(own.state[p].items())), dict(sorted(live.state[q].items())))
    assert _same(own.param_groups[0]["table"], live.param_groups[0]["table"])
    assert ek.open(tmp_path / "a").verify().problems == ()
    names = set(mini_reader.read(tmp_path / "a"))
    large = {name for name in names if "/dict.a" in name or "/param_groups/m/weight/table/t" in name}
    assert len(large) == (3 if size == LARGE else 0)


def test_a_list_takes_the_length_of_the_checkpoint(tmp_path: Path) -> None:
    state, other = _nested(1, LARGE, filled=True), _nested(2, LARGE, filled=True)
    other["o"].state[other["m"].weight]["list"] = [torch.zeros(3)]
    ek.save(state, tmp_path / "a")
    ek.load(other, tmp_path / "a")
    assert _same(state["o"].state[state["m"].weight]["list"], other["o"].state[other["m"].weight]["list"])


def test_two_states_of_one_name_are_refused(tmp_path: Path) -> None:
    """[UCF-112]"""
    state = _nested(1, LARGE, filled=True)
    state["o"].state[state["m"].weight]["list.0"] = torch.zeros(2, 3)
    with pytest.raises(StructureConflict, match=r"params/m/weight/list\.0"):
        ek.save(state, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class WithExtra(nn.Linear):
    """Its extra state is a table and a tensor."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Loader:
    """A loader whose state is a large permutation."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("size", [4, LARGE])
def test_extra_states_and_a_ranks_own_come_back(tmp_path: Path, size: int) -> None:
    """[UCF-111]"""

    def values(seed: int) -> dict[str, Any]:
        generator = numpy.random.default_rng(seed)
        return {"order": generator.permutation(size), "t": [torch.from_numpy(generator.random(size)), None], "n": seed}

    model, other = WithExtra(3, 2), WithExtra(3, 2)
    model.extra = values(1)
    state = {"m": model, "l": ek.PerRank(Loader(values(2))), "p": ek.PerRank(values(3)), "a": ek.PerRank(values(4)["order"])}
    ek.save(state, tmp_path / "a")
    assert ek.open(tmp_path / "a").verify().problems == ()
    loader, plain = Loader({}), values(5)
    live = {"m": other, "l": ek.PerRank(loader), "p": ek.PerRank(plain), "a": ek.PerRank(numpy.zeros(1))}
    order, tensor = plain["order"], plain["t"][0]
    ek.load(live, tmp_path / "a")
    assert _same(other.extra, values(1))
    assert _same(loader.state, values(2))
    assert _same(plain, values(3))
    assert plain["order"] is order
    assert plain["t"][0] is tensor
    assert _same(live["a"].value, values(4)["order"])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float64", "int16", "bool", "complex64", "bfloat16", "uint32", ">f4"])
def test_large_arrays_of_numpy_in_dicts_come_back(tmp_path: Path, dtype: str, order: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else numpy.dtype(dtype)
    array = numpy.asarray(numpy.arange(300 * 301).reshape(300, 301) % 7, dtype=kind, order=order)  # type: ignore[call-overload]
    wanted = array.astype(array.dtype.newbyteorder("="))
    state = {"d": {"table": array, "back": array[::-1], "text": "x"}, "o": Loader({"in": [array]})}
    ek.save(state, tmp_path / "a")
    live = {"d": {"table": numpy.zeros((300, 301), dtype=wanted.dtype), "back": None, "text": ""}, "o": Loader({})}
    table = live["d"]["table"]
    ek.load(live, tmp_path / "a")
    assert live["d"]["table"] is table
    assert _same(table, wanted)
    assert _same(live["d"]["back"], wanted[::-1].copy())
    assert _same(live["o"].state["in"][0], wanted)
    assert live["o"].state["in"][0].flags.f_contiguous == (order == "F")
    frozen = numpy.zeros((300, 301), dtype=wanted.dtype)
    frozen.flags.writeable = False
    other = {"d": {"table": frozen, "back": numpy.zeros(3), "text": ""}, "o": Loader({})}
    ek.load(other, tmp_path / "a")
    assert _same(other["d"]["table"], wanted)
    assert not frozen.any()


def test_what_stands_for_an_array_of_numpy_is_not_a_tensor(tmp_path: Path) -> None:
    ek.save({"d": {"table": numpy.zeros(LARGE)}}, tmp_path / "a")
    with pytest.raises(StateMismatch, match="/d/table: value"):
        ek.load({"d": {"table": [1]}}, tmp_path / "a")
    assert json.loads((tmp_path / "a/checkpoint.json").read_text())["requires"] == ["arrays-in-values"]
