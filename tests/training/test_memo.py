"""A capture that remembers the one before finds what a first one would have found, and keeps nothing alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import elastickpt as ek
from elastickpt.errors import ValueNotCarried
from elastickpt.format.arrays import Mesh
from elastickpt.saving.structures import KNOWN, propose
from elastickpt.training.capture import capture
from elastickpt.training.held import HeldArray, LiveState, Memos


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KNOWN, "memos", Memos())


def captured(state: dict[str, Any], declared: Mesh | None = None) -> LiveState:
    return capture(state, rank=0, world_size=2, declared=declared, memos=KNOWN.memos)


def afresh(state: dict[str, Any], declared: Mesh | None = None) -> LiveState:
    return capture(state, rank=0, world_size=2, declared=declared)


def facts(held: HeldArray) -> tuple[object, ...]:
    return (
        *(getattr(held, field.name) for field in fields(held) if field.name != "tensor"),
        (held.tensor.data_ptr(), held.tensor.shape, held.tensor.stride(), held.tensor.dtype, held.tensor.requires_grad),
    )


def every(live: LiveState) -> list[tuple[object, ...]]:
    return [facts(held) for held in live.arrays]


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "loose": {"t": torch.arange(6).reshape(2, 3).t(), "n": 1}}


def test_a_second_capture_finds_the_same_and_knows_it() -> None:
    state = trained()
    first, second = captured(state), captured(state)
    assert every(first) == every(second) == every(afresh(state))
    assert all(one.spec is other.spec for one, other in zip(first.arrays, second.arrays, strict=True))


def test_new_memory_under_an_old_tensor_is_what_is_captured() -> None:
    state = trained()
    captured(state)
    weight = state["model"][0].weight
    weight.data = torch.full((4, 5), 7.0)
    moment = state["optimizer"].state[weight]
    moment["exp_avg"] = torch.full((4, 5), 8.0)
    state["loose"]["t"].set_(torch.arange(6).reshape(3, 2))
    found = {str(held.spec.id): held.tensor for held in captured(state).arrays}
    assert found["params/model/0.weight/value"].data_ptr() == weight.data_ptr()
    assert found["params/model/0.weight/exp_avg"].unique().tolist() == [8.0]
    assert found["extra/loose/t"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "mesh", "tie", "swap"])
def test_whatever_else_changes_is_found_anew(change: str) -> None:
    state, declared = trained(), None
    captured(state)
    loose = state["loose"]
    if change == "shape":
        loose["t"].resize_(3, 4)
    elif change == "dtype":
        loose["t"].data = torch.ones(3, 2, dtype=torch.bfloat16)
    elif change == "name":
        loose["u"] = loose.pop("t")
    elif change == "mesh":
        declared = Mesh("all", ("replica",), (2,), (0, 1))
    elif change == "tie":
        loose["v"] = state["model"][2].bias
    else:
        state["model"][0], state["model"][2] = state["model"][2], state["model"][0]
    again = captured(state, declared)
    fresh = afresh(state, declared)
    assert every(again) == every(fresh)
    assert (again.items, again.tied) == (fresh.items, fresh.tied)


def loose(n: int = 4) -> dict[str, Any]:
    return {"t": {"deep": {f"{k}": torch.arange(12.0).reshape(3, 4) + k for k in range(n)}, "step": 3}}


def test_a_dict_of_plain_tensors_is_known_as_one_and_stands_for_it() -> None:
    state = loose()
    first, second = captured(state), captured(state)
    assert every(first) == every(second) == every(afresh(state))
    assert all(one.spec is other.spec for one, other in zip(first.arrays, second.arrays, strict=True))
    trees = [dict(live.values["/t"])["deep"] for live in (first, second)]  # type: ignore[call-overload]
    assert trees[0] is trees[1]
    again = captured(loose())  # other tensors, which lie alike
    assert [one.spec.id for one in again.arrays] == [one.spec.id for one in first.arrays]
    assert [one.tensor.data_ptr() for one in again.arrays] != [one.tensor.data_ptr() for one in first.arrays]


def _transposed(deep: dict[str, Any]) -> None:
    deep["1"] = torch.arange(12.0).reshape(4, 3).t()


def _shorter(deep: dict[str, Any]) -> None:
    deep["1"].resize_(2, 4)


def _placed_elsewhere(deep: dict[str, Any]) -> None:
    deep["1"] = torch.arange(24.0)[12:].reshape(3, 4)


def _of_another_type(deep: dict[str, Any]) -> None:
    deep["1"].data = torch.ones(3, 4, dtype=torch.bfloat16)


def _twice(deep: dict[str, Any]) -> None:
    deep["1"] = deep["2"]


def _of_another_order(deep: dict[str, Any]) -> None:
    deep["1"] = deep.pop("1")


def _with_one_more(deep: dict[str, Any]) -> None:
    deep["a/b"] = torch.ones(3, 4)


def _with_a_number(deep: dict[str, Any]) -> None:
    deep["1"] = 5


def _with_a_parameter(deep: dict[str, Any]) -> None:
    deep["1"] = nn.Parameter(deep["1"])


def _complex(deep: dict[str, Any]) -> None:
    deep["1"] = torch.ones(3, 4, dtype=torch.complex64)


@pytest.mark.parametrize(
    "change",
    [
        _transposed,
        _shorter,
        _placed_elsewhere,
        _of_another_type,
        _twice,
        _of_another_order,
        _with_one_more,
        _with_a_number,
        _with_a_parameter,
        _complex,
    ],
)
def test_what_changes_in_a_dict_of_plain_tensors_is_found_anew(change: Callable[[dict[str, Any]], None]) -> None:
    state = loose()
    captured(state)
    change(state["t"]["deep"])
    for again in (captured(state), captured(state)):
        fresh = afresh({"t": {**state["t"], "n": 0}})  # which no capture knows as one
        assert every(again) == every(fresh)
        assert again.values["/t"] == {key: one for key, one in fresh.values["/t"].items() if key != "n"}  # type: ignore[attr-defined]
        assert again.tied == fresh.tied


def _freed(deep: dict[str, Any]) -> None:
    deep["1"].untyped_storage().resize_(0)


def _cut_short(deep: dict[str, Any]) -> None:
    deep["1"].untyped_storage().resize_(47)


def _negative(deep: dict[str, Any]) -> None:
    deep["1"] = torch.ones(3, 4, dtype=torch.complex64).conj().imag


def _conjugate(deep: dict[str, Any]) -> None:
    deep["1"] = torch.ones(3, 4, dtype=torch.complex64).conj()


@pytest.mark.parametrize("change", [_freed, _cut_short, _negative, _conjugate])
@pytest.mark.parametrize("captures", [0, 1, 2])
@pytest.mark.parametrize("placement", ["plain", "packed"])
def test_what_has_no_elements_of_its_own_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], captures: int, placement: Any
) -> None:
    state = loose()
    for number in range(captures):
        ek.save(state, tmp_path / str(number), placement=placement)
    change(state["t"]["deep"])
    with pytest.raises(ValueNotCarried, match="deep/1"):
        ek.save(state, tmp_path / "refused", placement=placement)
    assert len(list(tmp_path.iterdir())) == captures


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh, n: int = 4) -> dict[str, Any]:
    deep = {
        f"{k}": DTensor.from_local(torch.arange(12.0).reshape(3, 4) + k, mesh, [Shard(0)], run_check=False) for k in range(n)
    }
    return {"t": {"deep": deep, "step": 3}}


def test_a_dict_of_dtensors_is_known_as_one_too(mesh: DeviceMesh) -> None:
    state = sharded(mesh)
    first, second = captured(state), captured(state)
    assert every(first) == every(second) == every(afresh(state))
    assert first.arrays[0].spec.shape == (6, 4)
    assert first.arrays[0].placements == ("S(0)",)
    assert all(one.spec is other.spec for one, other in zip(first.arrays, second.arrays, strict=True))
    trees = [dict(live.values["/t"])["deep"] for live in (first, second)]  # type: ignore[call-overload]
    assert trees[0] is trees[1]
    local = state["t"]["deep"]["1"]._local_tensor
    local.data = torch.full((3, 4), 7.0)
    assert captured(state).arrays[1].tensor.data_ptr() == local.data_ptr()


def _replicated(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = DTensor.from_local(torch.ones(3, 4), mesh, [Replicate()], run_check=False)


def _of_columns(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(1)], run_check=False)


def _of_two_axes(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    wide = init_device_mesh("cpu", (1, 2))
    deep["1"] = DTensor.from_local(torch.ones(3, 4), wide, [Replicate(), Shard(0)], run_check=False)


def _column_by_column(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"]._local_tensor = torch.arange(12.0).reshape(4, 3).t()


def _of_bytes(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = DTensor.from_local(torch.ones(3, 4).to(torch.float8_e8m0fnu), mesh, [Shard(0)], run_check=False)


def _no_dtensor(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = torch.ones(3, 4)


def _another_name_of_one(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = deep["2"]


def _one_more(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["a/b"] = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)], run_check=False)


def _complex_ones(deep: dict[str, Any], mesh: DeviceMesh) -> None:
    deep["1"] = DTensor.from_local(torch.ones(3, 4, dtype=torch.complex64), mesh, [Shard(0)], run_check=False)


@pytest.mark.parametrize(
    "change",
    [
        _replicated,
        _of_columns,
        _of_two_axes,
        _column_by_column,
        _of_bytes,
        _no_dtensor,
        _another_name_of_one,
        _one_more,
        _complex_ones,
    ],
)
def test_what_changes_in_a_dict_of_dtensors_is_found_anew(
    mesh: DeviceMesh, change: Callable[[dict[str, Any], DeviceMesh], None]
) -> None:
    state = sharded(mesh)
    captured(state)
    change(state["t"]["deep"], mesh)
    for again in (captured(state), captured(state)):
        fresh = afresh(state)
        assert every(again) == every(fresh)
        assert again.values == fresh.values
        assert again.tied == fresh.tied


def test_dtensors_whose_memory_is_gone_are_refused_by_name(mesh: DeviceMesh) -> None:
    state = sharded(mesh)
    captured(state)
    state["t"]["deep"]["1"]._local_tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueNotCarried, match="deep/1"):
        captured(state)


def test_the_table_of_a_saved_state_is_encoded_again_when_anything_in_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained()
    ek.save(state, tmp_path / "a")
    first = propose(state, None, rank=0, world_size=1)
    assert propose(state, None, rank=0, world_size=1).table is first.table
    state["loose"]["t"].resize_(3, 4)
    second = propose(state, None, rank=0, world_size=1)
    assert second.table.digest != first.table.digest
    forget(monkeypatch)
    assert propose(state, None, rank=0, world_size=1).table.digest == second.table.digest


def test_nothing_is_kept_alive() -> None:
    state = trained()
    captured(state)
    captured(state)
    gone = weakref.ref(state["model"][0].weight), weakref.ref(state["loose"]["t"])
    state.clear()
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_what_was_not_asked_for_again_is_forgotten() -> None:
    state = trained()
    captured(state)
    (kept,) = KNOWN.memos._kept.values()
    assert len(kept._last) == len(captured(state).arrays)
    state["loose"].pop("t")
    captured(state)
    assert len(kept._last) == len(captured(state).arrays)
