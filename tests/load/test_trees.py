"""`Checkpoint.tree`: what stood in `state` as plain values and arrays again, without torch where it is not asked for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch, NotACheckpoint, Refused, StateMismatch
from tools.gloo_ranks import run_ranks


class Point(NamedTuple):
    x: int
    y: torch.Tensor


class Loop:
    """An object that only has a state dict."""

    def state_dict(self) -> dict[str, object]:
        return {"best": torch.full((300,), 0.5, dtype=torch.bfloat16), "history": [1.5, None], "steps": np.arange(4)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise AssertionError("nothing is loaded here")


LARGE = 20_000  # elements; beyond what is carried inside of values


def saved_tree() -> dict[object, object]:
    return {
        "epoch": 3,
        "state_dict": OrderedDict({"a.weight": torch.arange(6.0).reshape(2, 3), "a/b~c": torch.arange(LARGE)}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, dtype=torch.bfloat16)}}, "param_groups": [{"lr": 0.1}]}],
        "loops": ({1, 2}, frozenset({"x"}), b"bytes", 1 + 2j, float("inf"), None, True, "text"),
        7: Counter("aab"),
        "queue": deque([torch.zeros(2), 2], maxlen=5),
        "default": defaultdict(list, {"k": [torch.tensor(1)]}),
        "point": Point(1, torch.eye(2)),
        "numpy": [np.arange(5), np.float32(2.5), np.zeros((2, 0))],
        "types": [torch.float16, torch.device("cpu")],
        "empty": [{}, [], (), torch.zeros(0, 3), torch.tensor(2.5)],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    state = {
        "checkpoint": saved_tree(),
        "loop": Loop(),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "a/b": torch.arange(3),
        "number": 7,
        "mine": ek.PerRank({"cursor": 9}),
    }
    ek.save(state, tmp_path / "c")
    return tmp_path / "c"


def demand_equal(found: object, wanted: object) -> None:
    """The same types, keys and bits all the way down; a named tuple's class has the same name and fields."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found, wanted)
    elif isinstance(wanted, np.ndarray | np.generic):
        assert (type(found), found.dtype) == (type(wanted), wanted.dtype)  # type: ignore[attr-defined]
        assert np.array_equal(found, wanted)  # type: ignore[arg-type]
    elif isinstance(wanted, tuple) and hasattr(wanted, "_fields"):
        assert (type(found).__name__, found._fields) == (type(wanted).__name__, wanted._fields)  # type: ignore[attr-defined]
        for one, other in zip(found, wanted, strict=True):  # type: ignore[call-overload]
            demand_equal(one, other)
    elif isinstance(wanted, dict):
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)  # type: ignore[call-overload]
        for key in wanted:
            demand_equal(found[key], wanted[key])  # type: ignore[index]
    elif isinstance(wanted, list | tuple | deque):
        assert type(found) is type(wanted)
        for one, other in zip(found, wanted, strict=True):  # type: ignore[call-overload]
            demand_equal(one, other)
    else:
        assert type(found) is type(wanted)
        assert found == wanted


def as_numpy(value: object) -> object:
    """What stands for it where torch is not asked for."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return value.float().numpy().astype(ml_dtypes.bfloat16)
        return value.numpy()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_numpy, value))
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, {key: as_numpy(one) for key, one in value.items()})
    if isinstance(value, deque):
        return deque(map(as_numpy, value), value.maxlen)
    if isinstance(value, dict):
        return type(value)({key: as_numpy(one) for key, one in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map(as_numpy, value))
    return value


def test_a_tree_comes_back_as_it_was_with_torch(path: Path) -> None:
    found = ek.open(path).tree("checkpoint", arrays="torch")
    demand_equal(found, saved_tree())
    assert found["default"]["new"] == []  # type: ignore[index]
    assert found["queue"].maxlen == 5  # type: ignore[index]


def test_a_tree_comes_back_as_it_was_with_numpy(path: Path) -> None:
    found = ek.open(path).tree("checkpoint")
    demand_equal(found, as_numpy(saved_tree()))
    found["state_dict"]["a.weight"][0, 0] = 9.0  # type: ignore[index]  # what was read may be changed


def test_so_do_objects_tensors_values_and_what_is_a_rank_s_own(path: Path) -> None:
    checkpoint = ek.open(path)
    demand_equal(checkpoint.tree("loop", arrays="torch"), Loop().state_dict())
    demand_equal(checkpoint.tree("a/b", arrays="torch"), torch.arange(3))
    demand_equal(checkpoint.tree("a/b"), np.arange(3))
    assert checkpoint.tree("number") == 7
    assert checkpoint.tree("mine") == checkpoint.tree("mine", rank=0) == {"cursor": 9}


@pytest.mark.parametrize(
    ("item", "about", "error", "words"),
    [
        ("nothing", {}, NotACheckpoint, "expected 'nothing' among what was saved, found 'checkpoint', 'loop'"),
        ("model", {}, Refused, "parameters"),
        ("optimizer", {}, Refused, "tables"),
        ("scheduler", {}, Refused, "stands by parameter"),
        ("number", {"arrays": "jax"}, Refused, "expected 'numpy' or 'torch'"),
        ("mine", {"rank": 1}, Refused, "expected one from 0 to 0"),
    ],
)
def test_what_is_no_tree_is_named(path: Path, item: str, about: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ek.open(path).tree(item, **about)  # type: ignore[arg-type]


def test_damage_is_found(path: Path) -> None:
    (key,) = (record.key for record in ek.open(path).records.values() if record.spec.id.name == "state_dict/a.weight")
    (chunk,) = (path / key).glob("c.*")
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ChecksumMismatch):
        ek.open(path).tree("checkpoint")


def test_a_reference_without_an_array_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a tensor which its class alone can put together."""
    checkpoint = ek.open(path)
    records = {one: record for one, record in checkpoint.records.items() if one.item != "a/b"}
    monkeypatch.setattr(type(checkpoint), "records", property(lambda self: records))
    with pytest.raises(StateMismatch, match="made of several"):
        checkpoint.tree("a/b")


def test_reading_a_tree_needs_no_torch(path: Path) -> None:
    code = (
        "import sys, elastickpt as ek\n"
        f"tree = ek.open({str(path)!r}).tree('checkpoint')\n"
        "assert tree['state_dict']['a.weight'].tolist() == [[0, 1, 2], [3, 4, 5]]\n"
        "assert 'torch' not in sys.modules and 'zarr' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def saves_its_own(rank: int, world_size: int, path: str) -> None:
    ek.save({"mine": ek.PerRank({"rank": rank, "t": torch.full((2,), float(rank))}), "same": {"t": torch.ones(3)}}, path)


def test_what_is_each_rank_s_own_is_asked_for_by_rank(tmp_path: Path) -> None:
    run_ranks(saves_its_own, 2, str(tmp_path / "c"))
    checkpoint = ek.open(tmp_path / "c")
    demand_equal(checkpoint.tree("mine", rank=1, arrays="torch"), {"rank": 1, "t": torch.ones(2)})
    demand_equal(checkpoint.tree("same", arrays="torch"), {"t": torch.ones(3)})
    with pytest.raises(Refused, match="each rank's own"):
        checkpoint.tree("mine")
