"""What `capture` takes from `state`, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from torch import nn

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId, Mesh
from elastickpt.format.records import Item
from elastickpt.format.values import ArrayReference, ArrayValue
from elastickpt.training.capture import capture
from elastickpt.training.held import LiveState
from elastickpt.training.held_trees import PerRank
from elastickpt.training.rng import RNG


class Loader:
    def __init__(self, position: int = 0) -> None:
        self.state: dict[str, Any] = {"position": position, "order": torch.arange(5), "nested": [{"seen": (1, 2)}]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def taken(state: dict[Any, object], *, declared: Mesh | None = None) -> LiveState:
    return capture(state, rank=0, world_size=1, declared=declared)


def test_every_entry_is_an_item_in_the_order_of_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = taken(
        {
            "step": 3,
            "optimizer": optimizer,
            "model": model,
            "loader": PerRank(Loader()),
            "rng": RNG(),
            "scaler": Loader(),
            "rank": PerRank(3),
        }
    )
    assert live.items == (
        Item("step", "values", "int"),
        Item("optimizer", "optimizer", "SGD"),
        Item("model", "module", "Linear"),
        Item("loader", "stateful", "Loader"),
        Item("rng", "stateful", "RNG"),
        Item("scaler", "stateful", "Loader"),
        Item("rank", "stateful", "int"),
    )


def test_tensors_of_objects_become_arrays_and_all_else_a_value() -> None:
    live = taken({"loader": Loader(4)})
    (held,) = live.arrays
    assert held.spec.id == ArrayId("extra", "loader", "order", "")
    assert (held.role, held.sharing, held.replicas) == ("other", "declared", (0,))
    assert live.values == {"/loader": {"position": 4, "order": ArrayReference("loader", "order"), "nested": [{"seen": (1, 2)}]}}


def test_tensors_in_containers_are_named_by_their_pointer() -> None:
    tensor = torch.zeros(2)
    live = taken({"extra": {"a/b": [tensor, 1]}, "single": torch.ones(3)})
    assert [held.spec.id for held in live.arrays] == [
        ArrayId("extra", "extra", "a~1b/0", ""),
        ArrayId("extra", "single", "", ""),
    ]
    assert live.values == {
        "/extra": {"a/b": [ArrayReference("extra", "a~1b/0"), 1]},
        "/single": ArrayReference("single", ""),
    }
    assert live.arrays[0].tensor.data_ptr() == tensor.data_ptr()


def test_a_tensor_that_is_a_parameter_is_held_once_and_named_as_tied() -> None:
    model = nn.Linear(2, 2, bias=False)
    live = taken({"anchor": {"w": model.weight}, "model": model})
    assert [held.spec.id for held in live.arrays] == [ArrayId("params", "model", "weight", "value")]
    assert live.tied == ((("model", "weight"), ("anchor", "w")),)


def test_what_a_rank_owns_goes_to_its_own_values() -> None:
    live = taken({"loader": PerRank(Loader(4)), "worker": PerRank({"id": 7})})
    assert live.values == {}
    own: Any = live.per_rank
    assert own["/worker"] == {"id": 7}
    assert own["/loader"]["order"] == ArrayValue("int64", (5,), torch.arange(5).numpy().tobytes(), "torch")


def test_extra_state_of_a_module_is_the_ranks_own() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"scale": torch.tensor(2.0), "history": (1, None)}

        def set_extra_state(self, state: object) -> None: ...

    live = taken({"model": nn.Sequential(nn.Linear(1, 1), Extra())})
    own: Any = live.per_rank["/model/1"]
    assert own["history"] == (1, None)
    assert own["scale"].origin == "torch"


def test_declared_replicas_hold_plain_tensors() -> None:
    mesh = Mesh("dp", ("dp",), (2,), (0, 1))
    live = capture({"t": torch.zeros(2)}, rank=1, world_size=2, declared=mesh)
    assert (live.arrays[0].sharing, live.arrays[0].replicas) == ("declared", (0, 1))
    assert capture({"t": torch.zeros(2)}, rank=1, world_size=2, declared=None).arrays[0].sharing == "undeclared"


@pytest.mark.parametrize("key", ["", 3, None, "x" * 1025])
def test_a_key_that_is_no_name_is_refused(key: Any) -> None:
    with pytest.raises(ValueNotCarried, match="key"):
        taken({key: 1})


def test_keys_that_differ_as_text_only_by_type_are_refused_for_tensors() -> None:
    with pytest.raises(StructureConflict, match="extra/t/1"):
        taken({"t": {1: torch.zeros(2), "1": torch.ones(2)}})
    assert taken({"t": {1: 5, "1": 6}}).values == {"/t": {1: 5, "1": 6}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"f": lambda: 0}, "value /f: function"),
        (
            {"train": {"model": nn.Linear(1, 1)}},
            "value /train/model: torch.nn.modules.linear.Linear .*put it at the top of `state`",
        ),
        ({"models": [nn.Linear(1, 1), 3]}, "value /models/0: torch.nn.modules.linear.Linear"),
        ({"m": PerRank(nn.Linear(1, 1))}, "'m': PerRank around a Linear"),
        ({"m": {"inner": PerRank(1)}}, "value /m/inner: .*PerRank"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_by_place(state: dict[str, object], message: str) -> None:
    with pytest.raises(ValueNotCarried, match=message):
        taken(state)


def test_a_refused_capture_leaves_the_state_as_it_was() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": RNG(), "f": lambda: 0}
    kept = {key: value for key, value in state.items() if key != "f"}
    before = fingerprint(kept)
    with pytest.raises(ValueNotCarried):
        taken(dict(state))
    assert fingerprint(kept) == before
    assert len(optimizer.state) == 0
