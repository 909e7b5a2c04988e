"""Deques, dicts with defaults, named tuples, element types and devices come back as what they were, or are refused by name."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import elastickpt as ek
from elastickpt.errors import StateMismatch, ValueNotCarried


class Window(NamedTuple):
    losses: list[float]
    size: int


class Wide(Window):
    """A class of its own that says nothing more."""


def _values() -> dict[str, Any]:
    return {
        "last": deque([1, 2.5, None], maxlen=4),
        "unbounded": deque([("a", 1)]),
        "counts": defaultdict(int, {"b": 2, 3: 1}),
        "lists": defaultdict(list, {"x": [1]}),
        "no factory": defaultdict(None, {1: 2}),
        "window": Window([0.5, 1.0], 2),
        "wide": Wide([], 0),
        "nested": {"deep": [deque([Window([1.0], 1), defaultdict(dict, {"k": OrderedDict(a=1)})])]},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "columns": torch.arange(6.0).reshape(2, 3).T,
    }


class _Object:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def _require_equal(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        assert getattr(found, "default_factory", None) is getattr(wanted, "default_factory", None)
        for key, one in wanted.items():
            _require_equal(found[key], one)
    elif isinstance(wanted, (list, tuple, deque)):
        assert len(found) == len(wanted)
        assert getattr(found, "maxlen", None) == getattr(wanted, "maxlen", None)
        for one, other in zip(found, wanted, strict=True):
            _require_equal(one, other)
    else:
        assert found == wanted


def test_an_object_gets_them_back_as_they_were(tmp_path: Path) -> None:
    ek.save({"o": _Object(_values())}, tmp_path / "a")
    fresh = _Object({})
    ek.load({"o": fresh}, tmp_path / "a")
    _require_equal(fresh.state, _values())


def test_a_rank_gets_its_own_back_as_they_were(tmp_path: Path) -> None:
    ek.save({"o": ek.PerRank(_Object(_values()))}, tmp_path / "a")
    fresh = _Object({})
    ek.load({"o": ek.PerRank(fresh)}, tmp_path / "a")
    _require_equal(fresh.state, _values())


def test_a_dict_of_the_user_is_changed_in_place(tmp_path: Path) -> None:
    ek.save({"v": _values()}, tmp_path / "a")
    live = _values()
    live["last"].extend([9, 9])
    live["counts"]["b"] = 0
    live["window"] = Window([0.0, 0.0, 0.0], 7)
    live["dtype"] = torch.float32
    live["columns"].zero_()
    last, counts, losses = live["last"], live["counts"], live["window"].losses
    ek.load({"v": live}, tmp_path / "a")
    _require_equal(live, _values())
    assert (live["last"], live["counts"], live["window"].losses) == (last, counts, losses)
    assert live["last"] is last
    assert live["counts"] is counts
    assert live["window"].losses is losses


class _Recent(torch.optim.SGD):
    """Keeps its last norms in a deque for each parameter, as optimizers that look back do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("norms", deque(maxlen=2)).append(float(p.norm()))
                self.state[p]["window"] = Window([float(p.sum())], 1)


def test_an_optimizer_that_has_made_no_step_gets_them(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = _Recent(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    ek.save({"m": model, "o": optimizer}, tmp_path / "a")
    again = torch.nn.Linear(3, 2)
    fresh = _Recent(again.parameters(), lr=0.1, momentum=0.9)
    ek.load({"m": again, "o": fresh}, tmp_path / "a")
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert fresh.state[q]["norms"] == optimizer.state[p]["norms"]
        assert fresh.state[q]["norms"].maxlen == 2
        _require_equal(fresh.state[q]["window"], optimizer.state[p]["window"])


def test_the_manifest_says_what_a_reader_must_know(tmp_path: Path) -> None:
    """[UCF-100]"""

    def requires(name: str, state: dict[str, Any]) -> list[str]:
        ek.save(state, tmp_path / name)
        found: list[str] = json.loads((tmp_path / name / "checkpoint.json").read_text())["requires"]
        return found

    assert requires("plain", {"v": {"a": [1, ("b",)], "t": torch.ones(2)}}) == []
    assert requires("python", {"v": {"a": [deque([1])]}}) == ["python-types"]
    assert requires("own", {"v": ek.PerRank({"a": {1: Window([1.0], 1)}})}) == ["python-types"]
    assert requires("order", {"v": ek.PerRank({"a": torch.ones(2, 3).T})}) == ["axis-order"]
    both = {"v": ek.PerRank({"a": numpy.ones((2, 3), order="F"), "d": torch.float16})}
    assert requires("both", both) == ["axis-order", "python-types"]


def test_what_no_name_finds_again_is_refused_by_name(tmp_path: Path) -> None:
    class Local(NamedTuple):
        x: int

    window = Wide([], 0)
    window.note = "beside"  # type: ignore[attr-defined]
    for value, what in (
        (Local(1), "Local, which is not found under this name"),
        (defaultdict(lambda: 1), "defaultdict that makes its elements by"),
        (window, "Wide with attributes beside its fields"),
    ):
        for state in ({"v": [value]}, {"v": ek.PerRank([value])}, {"v": _Object([value])}):
            with pytest.raises(ValueNotCarried, match=f"/v/0.*{what}"):
                ek.save(state, tmp_path / "a")
            assert not (tmp_path / "a").exists()


def test_an_object_inside_a_state_is_refused_with_what_to_do(tmp_path: Path) -> None:
    import dataclasses

    @dataclasses.dataclass
    class Notes:
        text: str

    class Thing:
        pass

    for value, what in (
        (Notes("a"), "keep its fields in a dict"),
        (Thing(), "keep what it is made of in plain values"),
        (_Object({}), "put it at the top of `state`"),
    ):
        with pytest.raises(ValueNotCarried, match=f"/v/a: .*{what}"):
            ek.save({"v": {"a": value, "b": 1}}, tmp_path / "a")  # of objects alone a dict is taken


def test_a_class_that_is_not_there_at_loading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ek.save({"o": _Object({"w": Window([1.0], 1)})}, tmp_path / "a")
    fresh = _Object({})
    with monkeypatch.context() as context:
        context.delitem(globals(), "Window")
        with pytest.raises(ValueNotCarried, match=r"/o/w: .*named tuple of class .*\.Window .*import its module"):
            ek.load({"o": fresh}, tmp_path / "a")
    assert fresh.state == {}

    class Other(NamedTuple):
        losses: list[float]

    monkeypatch.setitem(globals(), "Window", Other)
    with pytest.raises(ValueNotCarried, match=r"/o/w: expected a named tuple .*fields \('losses',\)"):
        ek.load({"o": fresh}, tmp_path / "a")


def test_another_kind_of_container_is_a_difference(tmp_path: Path) -> None:
    ek.save({"v": {"a": deque([torch.ones(2)]), "b": Window([1.0], 1)}}, tmp_path / "a")
    with pytest.raises(StateMismatch, match="/v/a: value"):
        ek.load({"v": {"a": [torch.zeros(2)], "b": Window([1.0], 1)}}, tmp_path / "a")
    with pytest.raises(StateMismatch, match="/v/b: value"):
        ek.load({"v": {"a": deque([torch.zeros(2)]), "b": (1,)}}, tmp_path / "a")
    with pytest.raises(StateMismatch, match=r"/v/b: value: expected .*Wide"):
        ek.load({"v": {"a": deque([torch.zeros(2)]), "b": Wide([], 0)}}, tmp_path / "a")


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (0, 2, 1)])
def test_small_arrays_lie_again_as_they_lay(tmp_path: Path, order: tuple[int, ...]) -> None:
    """[UCF-104]"""
    shape = tuple(range(2, 2 + len(order)))
    back = [order.index(axis) for axis in range(len(order))]
    array = numpy.arange(float(numpy.prod(shape))).reshape([shape[axis] for axis in order]).transpose(back)
    ek.save({"o": _Object({"t": [torch.from_numpy(array)], "n": array})}, tmp_path / "a")
    fresh = _Object({})
    ek.load({"o": fresh}, tmp_path / "a")
    assert fresh.state["n"].strides == array.strides
    assert numpy.array_equal(fresh.state["n"], array)
