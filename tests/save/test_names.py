"""Names of parameters, items and keys: whatever training accepts comes back under its own name and stands in a sound tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import nn

import elastickpt as ek
from elastickpt.errors import CheckpointError, Refused, ValueNotCarried
from elastickpt.format.arrays import ArrayId

NAMES = (
    "w", "W", "ww", "wW", "a/b", "a~b", "a b", "déjà", "重み", "🙂", "e\u0301", "é", "__x", "_x", "zarr", "c", "value",
    "exp_avg", "params", "extra", "fragments", "module", "_orig_mod", "%", "%2F", "100%", "~", "-", "a:b", "C:", "con",
    "aux", "a*b?", "'\"", "\\", "<>|", "$HOME", " ", " x ", "x" * 300, "X" * 300, "x" * 299 + "y", "ü" * 150, "0", "-1",
    "null", "true", "{}", "[0]",
)  # fmt: skip


class Named(nn.Module):
    """A parameter, and a submodule with a weight and a buffer, under each name; all of other contents."""

    def __init__(self, *, scale: float) -> None:
        super().__init__()
        for number, name in enumerate(NAMES):
            child = nn.Module()
            child.weight = nn.Parameter(torch.full((2,), scale * (number + 1)))
            child.register_buffer("b", torch.tensor(scale * number))
            self._modules[name] = child
            self._parameters["p:" + name] = nn.Parameter(torch.full((3,), scale * (number + 0.5)))


def _state(scale: float) -> dict[str, Any]:
    model = Named(scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 2
    optimizer.step()
    values = {name: {"t": torch.tensor(scale * number), "n": number * scale} for number, name in enumerate(NAMES)}
    items = {name: torch.tensor([scale * number]) for number, name in enumerate(NAMES)}
    return {"the model": model, "opt": optimizer, "values": values} | {f"i{name}": one for name, one in items.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "a checkpoint, déjà 100%"
    ek.save(_state(1.0), path)
    return path


def test_every_name_loads_what_was_saved_under_it(saved: Path) -> None:
    state, expected = _state(3.0), _state(1.0)
    ek.load(state, saved)
    found = state["the model"].state_dict()
    for name, tensor in expected["the model"].state_dict().items():
        assert torch.equal(found[name], tensor), name
    for live, other in zip(state["the model"].parameters(), expected["the model"].parameters(), strict=True):
        momentum = state["opt"].state[live]["momentum_buffer"]
        assert torch.equal(momentum, expected["opt"].state[other]["momentum_buffer"])
    for number, name in enumerate(NAMES):
        assert state["values"][name] == {"t": torch.tensor(1.0 * number), "n": 1.0 * number}, name
        assert torch.equal(state[f"i{name}"], torch.tensor([1.0 * number])), name


def test_the_tree_is_sound_and_names_differ_even_where_case_is_ignored(saved: Path) -> None:
    report = ek.open(saved).verify()
    assert report.problems == ()
    paths = [str(path.relative_to(saved)) for path in saved.rglob("*")]
    assert len({path.lower() for path in paths}) == len(paths)
    assert all(path.isascii() and len(part) <= 255 for path in paths for part in path.split("/"))


def test_zarr_python_opens_every_array_and_its_attribute_says_the_true_name(saved: Path) -> None:
    group = zarr.open_group(saved, mode="r")
    model = group["params/the%20model"]
    assert isinstance(model, zarr.Group)
    found = {}
    for _, parameter in model.groups():
        value = parameter["value"]
        found[value.attrs["elastickpt"]["name"]] = value[...].tolist()
    expected = {name: tensor.tolist() for name, tensor in Named(scale=1.0).state_dict().items()}
    assert found.keys() == expected.keys()
    assert len(found) == 3 * len(NAMES)


def test_every_array_is_read_by_its_name(saved: Path) -> None:
    opened = ek.open(saved)
    for number, name in enumerate(NAMES):
        array = ArrayId("extra", "values", name.replace("~", "~0").replace("/", "~1") + "/t", "")
        assert float(opened.read(array)) == number, name


@pytest.mark.parametrize("name", [".", "..", "...", "a.b"])
def test_names_of_keys_that_torch_refuses_for_modules(tmp_path: Path, name: str) -> None:
    """A dict may have any text as a key."""
    state = {"d": {name: torch.ones(2), "x": {name: 3}}}
    ek.save(state, tmp_path / "c")
    live = {"d": {name: torch.zeros(2), "x": {name: 0}}}
    ek.load(live, tmp_path / "c")
    assert torch.equal(live["d"][name], torch.ones(2))
    assert live["d"]["x"] == {name: 3}
    assert ek.open(tmp_path / "c").verify().sound
    assert [key for key, _ in zarr.open_group(tmp_path / "c" / "extra" / "d", mode="r").arrays()]


def test_a_key_and_a_deeper_one_that_spell_the_same_stay_apart(tmp_path: Path) -> None:
    state = {"d": {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "a~1b": torch.full((1,), 2.0)}}
    ek.save(state, tmp_path / "c")
    live = {"d": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a~1b": torch.zeros(1)}}
    ek.load(live, tmp_path / "c")
    assert [float(live["d"]["a/b"]), float(live["d"]["a"]["b"]), float(live["d"]["a~1b"])] == [1.0, 0.0, 2.0]


def test_a_submodule_that_is_really_called_module_keeps_its_name(tmp_path: Path) -> None:
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    ek.save({"m": outer}, tmp_path / "c")
    assert {key[1] for key in ek.open(tmp_path / "c").parameters} == {"module.weight", "module.bias"}
    with pytest.raises(CheckpointError, match=r"module\.weight"):
        ek.load({"m": nn.Linear(2, 2)}, tmp_path / "c")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x7f", "\ud800", "n" * 1025])
@pytest.mark.parametrize("where", ["parameter", "key", "item"])
def test_names_that_no_file_should_carry_are_refused_by_name(tmp_path: Path, name: str, where: str) -> None:
    model = nn.Module()
    model._parameters[name] = nn.Parameter(torch.ones(1))
    state = {"parameter": {"m": model}, "key": {"d": {name: torch.ones(1)}}, "item": {name: torch.ones(1)}}[where]
    with pytest.raises(CheckpointError, match=r"name|key") as caught:
        ek.save(state, tmp_path / "c")
    assert caught.type is ValueNotCarried
    assert list(tmp_path.iterdir()) == []


def test_an_empty_key_is_carried_where_its_place_is_its_own(tmp_path: Path) -> None:
    """Just below an item it has the place of the item itself, which one tensor can have and not two."""
    ek.save({"d": {"x": {"": torch.ones(1), "y": torch.ones(1)}, "": 3}}, tmp_path / "c")
    live = {"d": {"x": {"": torch.zeros(1), "y": torch.zeros(1)}, "": 0}}
    ek.load(live, tmp_path / "c")
    assert live == {"d": {"x": {"": torch.ones(1), "y": torch.ones(1)}, "": 3}}
    with pytest.raises(Refused, match="extra/d"):
        ek.save({"d": {"": torch.ones(1), "y": torch.ones(1)}}, tmp_path / "e")


def test_values_may_be_any_text(tmp_path: Path) -> None:
    state = {"v": {"a\nb": "\x00", "\x7f": ["\U0010ffff", b"\xff", "\u2028"]}}
    ek.save(state, tmp_path / "c")
    live: dict[str, Any] = {"v": {"a\nb": "", "\x7f": []}}
    ek.load(live, tmp_path / "c")
    assert live == state
    with pytest.raises(ValueNotCarried, match="/v/file"):
        ek.save({"v": {"file": "\udc80"}}, tmp_path / "e")  # what a file name without an encoding becomes in Python
