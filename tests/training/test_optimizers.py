"""Optimizer state goes by parameter name and comes back bit for bit, however groups are cut."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from memory_checkpoint import MemoryCheckpoint, known
from torch import nn
from torch.optim import Optimizer

from elastickpt.errors import LayoutUnsupported, StateMismatch, StructureConflict, ValueNotCarried
from elastickpt.format.arrays import ArrayId
from elastickpt.format.values import ArrayValue
from elastickpt.training.capture import capture
from elastickpt.training.listing import unexpected
from elastickpt.training.restore import bind, hold_models

State = dict[str, Any]
Make = Callable[[list[nn.Parameter]], Optimizer]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)) * self.gain)


def seeded(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def train(state: State, steps: int, *, seed: int = 7) -> None:
    """Steps of all optimizers of `state` on one fixed stream of data."""
    source = torch.Generator().manual_seed(seed)
    optimizers = [value for value in state.values() if isinstance(value, Optimizer)]
    for _ in range(steps):
        x = torch.randn(5, 4, generator=source)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = state["model"](x).square().mean()
            loss.backward()
            return loss

        closure()
        for optimizer in optimizers:
            optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


def saved(state: State) -> MemoryCheckpoint:
    return MemoryCheckpoint([capture(state, rank=0, world_size=1, declared=None)])


def load(checkpoint: MemoryCheckpoint, state: State) -> tuple[str, ...]:
    """Loads, and gives the notes."""
    binding = bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing())
    assert not list(unexpected(checkpoint.listing(), arrays=known(checkpoint.listing(), binding), places=binding.places))
    checkpoint.fill(binding)
    return binding.notes


def refused(checkpoint: MemoryCheckpoint, state: State) -> list[tuple[str, str]]:
    """The names and kinds of the mismatches; asserts that nothing of `state` changed."""
    before = fingerprint(state)
    binding = bind(hold_models(state, rank=0, world_size=1, declared=None), checkpoint.listing())
    with pytest.raises(StateMismatch):
        checkpoint.fill(binding)
    assert fingerprint(state) == before
    return [(mismatch.name, mismatch.what) for mismatch in binding.mismatches]


def sgd(p: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": sgd,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-1, max_iter=3, history_size=4),
}


def make_state(make: Make, seed: int) -> State:
    model = seeded(seed)
    return {"model": model, "optimizer": make(list(model.parameters()))}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("live_steps", [0, 2], ids=["fresh", "stepped"])
def test_any_optimizer_is_restored_bit_for_bit_and_goes_on_alike(make: Make, live_steps: int) -> None:
    original, other = make_state(make, 0), make_state(make, 1)
    train(original, 3)
    train(other, live_steps, seed=8)
    assert fingerprint(other) != fingerprint(original)
    checkpoint = saved(original)
    load(checkpoint, other)
    assert fingerprint(other) == fingerprint(original)
    train(original, 2, seed=9)
    train(other, 2, seed=9)
    assert fingerprint(other) == fingerprint(original)


def test_muon_stands_beside_adamw() -> None:
    def both(seed: int) -> State:
        model = seeded(seed)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        return {"muon": torch.optim.Muon(matrices, lr=1e-2), "model": model, "adamw": torch.optim.AdamW(rest, lr=1e-2)}

    original, other = both(0), both(1)
    train(original, 3)
    checkpoint = saved(original)
    load(checkpoint, other)
    train(original, 1, seed=9)
    train(other, 1, seed=9)
    assert fingerprint(other) == fingerprint(original)
    assert ArrayId("params", "model", "last.weight", "momentum_buffer") in checkpoint.arrays
    assert ArrayId("params", "model", "first.bias", "exp_avg") in checkpoint.arrays


def test_states_are_arrays_beside_their_parameter_and_step_is_a_column() -> None:
    state = make_state(OPTIMIZERS["adamw"], 0)
    train(state, 3)
    checkpoint = saved(state)
    names = {id_.state for id_ in checkpoint.arrays if id_.name == "first.weight"}
    assert names == {"value", "exp_avg", "exp_avg_sq"}
    (table,) = checkpoint.tables
    steps = next(field for field in table.fields if field.key == "step")
    assert steps.kind == "scalar"
    assert steps.values == (ArrayValue("float32", (), torch.tensor(3.0).numpy().tobytes(), "torch"),)
    assert set(steps.which) == {0}


def test_bits_of_nan_and_negative_zero_survive() -> None:
    original, other = make_state(sgd, 0), make_state(sgd, 1)
    train(original, 1)
    weight = original["model"].first.weight
    original["optimizer"].state[weight]["momentum_buffer"][0, :2] = torch.tensor([float("nan"), -0.0])
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)


def test_existing_states_are_filled_in_place() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["adamw"], 1)
    train(original, 3)
    train(other, 1)
    weight = other["model"].first.weight
    before = dict(other["optimizer"].state[weight])
    load(saved(original), other)
    after = other["optimizer"].state[weight]
    assert all(after[key] is before[key] for key in before)


def grouped(model: Net, *groups: tuple[float, list[str]]) -> Optimizer:
    named = dict(model.named_parameters())
    return torch.optim.AdamW([{"params": [named[name] for name in names], "lr": lr} for lr, names in groups])


MATRICES = ["first.weight", "last.weight"]
VECTORS = ["norm.weight", "norm.bias", "first.bias", "gain"]


def test_groups_are_found_again_in_another_order() -> None:
    model, reordered = seeded(0), seeded(1)
    original = {"model": model, "optimizer": grouped(model, (0.1, MATRICES), (0.2, VECTORS))}
    train(original, 2)
    optimizer = grouped(reordered, (9.0, VECTORS[::-1]), (8.0, MATRICES[::-1]))
    load(saved(original), {"model": reordered, "optimizer": optimizer})
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    weights = optimizer.state[reordered.last.weight]["exp_avg"]
    assert torch.equal(weights, original["optimizer"].state[model.last.weight]["exp_avg"])


def test_one_group_is_split_into_several() -> None:
    model, other = seeded(0), seeded(1)
    original = {"model": model, "optimizer": grouped(model, (0.1, [*MATRICES, *VECTORS]))}
    optimizer = grouped(other, (0.5, MATRICES), (0.6, VECTORS))
    load(saved(original), {"model": other, "optimizer": optimizer})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_a_group_of_parameters_that_disagree_is_refused() -> None:
    model, other = seeded(0), seeded(1)
    original = {"model": model, "optimizer": grouped(model, (0.1, MATRICES), (0.2, VECTORS))}
    live = {"model": other, "optimizer": grouped(other, (0.5, [*MATRICES, *VECTORS]))}
    assert refused(saved(original), live) == [("/optimizer/param_groups/0/lr", "value")]
    binding = bind(hold_models(live, rank=0, world_size=1, declared=None), saved(original).listing())
    assert binding.mismatches[0].found == "0.1 for model/first.weight, 0.2 for model/norm.weight"


def test_an_option_that_only_the_process_has_stays_and_one_that_only_the_checkpoint_has_is_added() -> None:
    original, other = make_state(sgd, 0), make_state(sgd, 1)
    original["optimizer"].param_groups[0]["initial_lr"] = 0.3
    other["optimizer"].param_groups[0]["layer_decay"] = 0.5
    notes = load(saved(original), other)
    group = other["optimizer"].param_groups[0]
    assert (group["initial_lr"], group["layer_decay"]) == (0.3, 0.5)
    assert notes == ("/optimizer/param_groups/0/layer_decay is not in the checkpoint: 0.5 stays",)


def test_how_a_step_is_executed_stays_the_choice_of_the_process() -> None:
    original, other = make_state(OPTIMIZERS["adamw-fused"], 0), make_state(OPTIMIZERS["adamw"], 1)
    train(original, 1)
    notes = load(saved(original), other)
    assert other["optimizer"].param_groups[0]["fused"] is None
    assert len(notes) == 1
    assert "fused" in notes[0]


def test_a_tensor_option_is_filled_in_place() -> None:
    make = OPTIMIZERS["adamw-tensor-lr"]
    original, other = make_state(make, 0), make_state(make, 1)
    original["optimizer"].param_groups[0]["lr"].fill_(0.25)
    lr = other["optimizer"].param_groups[0]["lr"]
    load(saved(original), other)
    assert other["optimizer"].param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_a_number_that_a_tensor_option_cannot_hold_is_said_to_be_rounded() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["adamw-tensor-lr"], 1)
    (note,) = load(saved(original), other)
    assert note.startswith("/optimizer/param_groups/0/lr: 0.01 (in the checkpoint) is rounded to torch.float32")


def test_nothing_is_saved_for_states_that_do_not_exist_and_loading_makes_none() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["adamw"], 1)
    checkpoint = saved(original)
    assert {id_.state for id_ in checkpoint.arrays} == {"value"}
    load(checkpoint, other)
    assert len(other["optimizer"].state) == 0


def test_parameters_saved_before_their_first_step_have_no_state_afterwards() -> None:
    """A checkpoint of step 0 loaded into an optimizer that has stepped: the state is the saved one, which is none."""
    original, other = make_state(sgd, 0), make_state(sgd, 1)
    train(other, 1)
    notes = load(saved(original), other)
    assert notes == ("/optimizer: parameters had no state when they were saved, and have none now",)
    assert len(other["optimizer"].state) == 0


def test_a_state_of_another_optimizer_is_missing_and_the_others_are_made() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["adam-amsgrad"], 1)
    train(original, 1)
    train(other, 1)
    found = refused(saved(original), other)
    assert ("params/model/last.weight/max_exp_avg_sq", "missing") in found


def test_a_frozen_parameter_has_no_state_and_needs_none() -> None:
    def frozen(seed: int) -> State:
        state = make_state(OPTIMIZERS["adamw"], seed)
        state["model"].first.weight.requires_grad_(False)
        return state

    original, other = frozen(0), frozen(1)
    train(original, 2)
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)
    assert other["model"].first.weight not in other["optimizer"].state


def test_a_parameter_new_to_the_optimizer_is_missing() -> None:
    model, other = seeded(0), seeded(1)
    original = {"model": model, "optimizer": grouped(model, (0.1, MATRICES))}
    live = {"model": other, "optimizer": grouped(other, (0.1, MATRICES), (0.1, ["gain"]))}
    assert refused(saved(original), live) == [("/optimizer/state/model/gain", "missing")]


def test_an_optimizer_that_the_checkpoint_lacks_is_missing() -> None:
    model = seeded(0)
    live = make_state(sgd, 1)
    assert refused(saved({"model": model}), live) == [("/optimizer", "missing")]


def test_states_of_a_parameter_that_is_not_trained_any_more_are_unexpected() -> None:
    original = make_state(sgd, 0)
    train(original, 1)
    other = seeded(1)
    live = {"model": other, "optimizer": torch.optim.SGD([other.gain], lr=0.1, momentum=0.9)}
    listing = saved(original).listing()
    binding = bind(hold_models(live, rank=0, world_size=1, declared=None), listing)
    names = {mismatch.name for mismatch in unexpected(listing, arrays=known(listing, binding), places=binding.places)}
    assert "params/model/first.weight/momentum_buffer" in names
    assert not any(name.startswith("params/model/gain") for name in names)


def test_a_parameter_outside_the_models_of_state_is_refused_by_group_and_shape() -> None:
    model, stranger = seeded(0), nn.Parameter(torch.zeros(7, 2))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [stranger]}], lr=0.1)
    message = r"group 1, of shape \(7, 2\), is not in `state`"
    with pytest.raises(StructureConflict, match=message):
        saved({"model": model, "optimizer": optimizer})
    held = hold_models({"model": model, "optimizer": optimizer}, rank=0, world_size=1, declared=None)
    with pytest.raises(StructureConflict, match=message):
        bind(held, saved({"model": model}).listing())


def test_state_of_a_tensor_in_no_group_is_refused() -> None:
    state = make_state(sgd, 0)
    state["optimizer"].state[torch.zeros(3)] = {"momentum_buffer": torch.zeros(3)}
    with pytest.raises(StructureConflict, match="none of its groups"):
        saved(state)


def two_on_one(seed: int) -> State:
    model = seeded(seed)
    return {
        "model": model,
        "fast": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "slow": torch.optim.Adam([model.first.weight], lr=1e-3),
    }


def test_states_of_two_optimizers_on_one_parameter_carry_the_optimizers_name() -> None:
    original, other = two_on_one(0), two_on_one(1)
    train(original, 2)
    checkpoint = saved(original)
    states = {id_.state for id_ in checkpoint.arrays if id_.name == "first.weight"}
    assert states == {"value", "fast.exp_avg", "fast.exp_avg_sq", "slow.exp_avg", "slow.exp_avg_sq"}
    assert {id_.state for id_ in checkpoint.arrays if id_.name == "gain"} == {"value"}  # 0-d states are columns
    assert ArrayId("params", "model", "norm.bias", "fast.exp_avg") in checkpoint.arrays
    load(checkpoint, other)
    assert fingerprint(other) == fingerprint(original)


def test_one_of_two_optimizers_can_be_loaded_alone() -> None:
    original, other = two_on_one(0), two_on_one(1)
    train(original, 2)
    del other["slow"]
    checkpoint = saved(original)
    checkpoint.fill(bind(hold_models(other, rank=0, world_size=1, declared=None), checkpoint.listing()))
    assert fingerprint({"fast": other["fast"]}) == fingerprint({"fast": original["fast"]})


def test_a_tied_parameter_is_found_under_its_other_name() -> None:
    class Tied(nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            weight = nn.Parameter(torch.randn(4, 4))
            for name in names:
                setattr(self, name, weight)

    torch.manual_seed(0)
    original, other = (
        {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
        for model in (Tied(("embed", "head")), Tied(("head", "embed")))
    )
    for parameter in original["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    original["optimizer"].step()
    checkpoint = saved(original)
    assert {id_.name for id_ in checkpoint.arrays} == {"embed"}
    load(checkpoint, other)
    assert torch.equal(other["model"].head, original["model"].embed)
    buffers = [state["momentum_buffer"] for one in (original, other) for state in one["optimizer"].state.values()]
    assert torch.equal(*buffers)


class Custom(Optimizer):
    """State of every odd form: numbers, None, lists, small tensors in containers, text keys."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1, "mode": "plain", "window": (1, 2)})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("count", 0)
                state["count"] += 1
                state["best"] = None
                state["ring"] = [torch.full((2,), float(state["count"])), 3]
                state["mask"] = torch.ones(p.shape, dtype=torch.bool)
                state["half"] = p.detach().to(torch.bfloat16)
                state["value"] = torch.zeros_like(p) + state["count"]
        shared: Any = self.state
        shared["totals"] = {"steps": shared.get("totals", {}).get("steps", 0) + 1, "sum": torch.arange(3.0)}


def test_states_of_every_form_are_restored() -> None:
    original, other = make_state(Custom, 0), make_state(Custom, 1)
    train(original, 3)
    checkpoint = saved(original)
    assert checkpoint.specs[ArrayId("params", "model", "first.weight", "optimizer.half")].dtype == "bfloat16"
    assert ArrayId("extra", "optimizer", "state/totals/sum", "") in checkpoint.arrays
    load(checkpoint, other)
    assert fingerprint(other) == fingerprint(original)
    assert type(other["optimizer"].state[other["model"].gain]["count"]) is int
    train(other, 1)
    load(checkpoint, other)
    assert fingerprint(other) == fingerprint(original)


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        (lambda: None, "/optimizer/state/model/first.weight/odd"),
        (torch.zeros(3, 3).to_sparse_csr(), "first.weight"),
        ([torch.zeros(3, 3).to_sparse_csr()], "/optimizer/state/model/first.weight/odd/0"),
    ],
    ids=["function", "sparse-rows", "sparse-rows-in-list"],
)
def test_a_state_that_cannot_be_carried_is_refused_with_its_place(entry: object, place: str) -> None:
    state = make_state(sgd, 0)
    train(state, 1)
    state["optimizer"].state[state["model"].first.weight]["odd"] = entry
    with pytest.raises(ValueNotCarried, match=place):
        saved(state)


def test_an_option_that_cannot_be_carried_is_refused_with_its_place() -> None:
    state = make_state(sgd, 0)
    state["optimizer"].param_groups[0]["schedule"] = lambda step: step
    with pytest.raises(ValueNotCarried, match="/optimizer/param_groups/0/schedule: function"):
        saved(state)


def test_shape_and_dtype_of_a_state_must_be_those_of_the_checkpoint() -> None:
    original, other = make_state(sgd, 0), make_state(sgd, 1)
    train(original, 1)
    train(other, 1)
    model, state = other["model"], other["optimizer"].state
    state[model.first.weight]["momentum_buffer"] = torch.zeros(6, 4, dtype=torch.float64)
    state[model.last.weight]["momentum_buffer"] = torch.zeros(18)
    state[model.first.bias]["momentum_buffer"] = torch.tensor(0.0)
    assert sorted(refused(saved(original), other)) == [
        ("/optimizer/state/model/first.bias/momentum_buffer", "shape"),
        ("params/model/first.weight/momentum_buffer", "dtype"),
        ("params/model/last.weight/momentum_buffer", "shape"),
    ]


def test_step_of_another_element_type_is_refused() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["adamw"], 1)
    train(original, 1)
    train(other, 1)
    other["optimizer"].state[other["model"].gain]["step"] = torch.tensor(1)
    assert refused(saved(original), other) == [("/optimizer/state/model/gain/step", "dtype")]


def test_capture_changes_nothing_and_shares_no_value_with_the_state() -> None:
    state = make_state(Custom, 0)
    train(state, 2)
    before = fingerprint(state)
    live = capture(state, rank=0, world_size=1, declared=None)
    assert fingerprint(state) == before
    kept = MemoryCheckpoint([live])
    train(state, 1)
    (ring,) = (field for field in kept.tables[0].fields if field.key == "ring")
    assert ring.values[0][0].data == torch.full((2,), 2.0).numpy().tobytes()  # type: ignore[index]


def stage(first: int, last: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({str(k): nn.Linear(3, 3) for k in range(first, last)})


def by_layer(model: nn.ModuleDict, lrs: dict[str, float]) -> Optimizer:
    groups = [{"params": list(model[name].parameters()), "lr": lr} for name, lr in lrs.items()]
    return torch.optim.SGD(groups, momentum=0.9)


def test_groups_that_differ_between_ranks_become_one_table_and_are_cut_again() -> None:
    """Two pipeline stages with one and two groups, loaded by one process with three groups in another order."""
    stages = [stage(0, 1, 0), stage(1, 3, 1)]
    optimizers = [by_layer(stages[0], {"0": 0.1}), by_layer(stages[1], {"1": 0.2, "2": 0.3})]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    states = [{"model": one, "optimizer": other} for one, other in zip(stages, optimizers, strict=True)]
    checkpoint = MemoryCheckpoint([capture(state, rank=rank, world_size=2, declared=None) for rank, state in enumerate(states)])
    assert len(checkpoint.tables) == 1
    whole = stage(0, 3, 9)
    live = {"model": whole, "optimizer": by_layer(whole, {"2": 0.0, "0": 0.0, "1": 0.0})}
    checkpoint.fill(bind(hold_models(live, rank=0, world_size=1, declared=None), checkpoint.listing(world_size=1)))
    assert [group["lr"] for group in live["optimizer"].param_groups] == [0.3, 0.1, 0.2]
    for one, name in ((stages[0], "0"), (stages[1], "1"), (stages[1], "2")):
        index = 0 if name == "0" else 1
        expected = optimizers[index].state[one[name].weight]["momentum_buffer"]
        assert torch.equal(live["optimizer"].state[whole[name].weight]["momentum_buffer"], expected)


def test_a_plain_state_with_a_dot_in_its_name_is_no_part_of_another_one() -> None:
    """[UCF-108]"""
    original, other = make_state(sgd, 0), make_state(sgd, 1)
    for name in ("ema.fast", "ema"):
        original["optimizer"].state[original["model"].last.weight][name] = torch.randn(3, 6)
    load(saved(original), other)
    assert fingerprint(other) == fingerprint(original)


def test_a_composite_state_is_filled_part_by_part() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor

    def make(seed: int) -> State:
        state = make_state(sgd, seed)
        torch.manual_seed(seed)
        pair = two_tensor(torch.randn(3, 6), torch.randn(3, 6))
        state["optimizer"].state[state["model"].last.weight]["pair"] = pair
        return state

    original, other = make(0), make(1)
    checkpoint = saved(original)
    assert ArrayId("params", "model", "last.weight", "pair.b") in checkpoint.arrays
    pair = other["optimizer"].state[other["model"].last.weight]["pair"]
    load(checkpoint, other)
    expected = original["optimizer"].state[original["model"].last.weight]["pair"]
    assert torch.equal(pair.a, expected.a)
    assert torch.equal(pair.b, expected.b)


def test_one_optimizer_under_two_keys_is_refused() -> None:
    state = make_state(sgd, 0)
    with pytest.raises(StructureConflict, match="'optimizer' and 'again'"):
        saved({**state, "again": state["optimizer"]})


def test_an_optimizer_of_another_class_is_said() -> None:
    original, other = make_state(OPTIMIZERS["adamw"], 0), make_state(OPTIMIZERS["sgd"], 1)
    train(original, 1)
    assert any(note.startswith("/optimizer: saved by AdamW, now a SGD") for note in load(saved(original), other))


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


class Level(enum.IntEnum):
    ONE = 1


def with_options(seed: int, **options: Any) -> State:
    state = make_state(sgd, seed)
    state["optimizer"].param_groups[0].update(options)
    return state


def test_options_that_are_a_dtype_a_device_or_an_enum_come_back() -> None:
    own = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "mode": Mode.FAST, "level": Level.ONE}
    original, other = with_options(0, **own), with_options(1, **{**own, "mode": Mode.SLOW, "dtype": torch.float32})
    load(saved(original), other)
    group = other["optimizer"].param_groups[0]
    assert {key: group[key] for key in own} == own
    assert group["mode"] is Mode.FAST
    assert group["level"] is Level.ONE


def test_an_enum_is_only_revived_as_a_member_of_the_live_options_class() -> None:
    checkpoint = saved(with_options(0, mode=Mode.FAST))
    for live in (Level.ONE, "FAST", None):
        assert refused(checkpoint, with_options(1, mode=live)) == [("/optimizer/param_groups/0/mode", "value")]
    assert refused(checkpoint, make_state(sgd, 1)) == [("/optimizer/param_groups/0/mode", "value")]


def test_an_enum_inside_a_value_is_refused_with_its_place() -> None:
    with pytest.raises(ValueNotCarried, match="/x/0"):
        saved({"x": [Mode.FAST]})


def test_a_state_dict_in_the_place_of_a_fresh_optimizer_gets_a_hint() -> None:
    original = make_state(sgd, 0)
    train(original, 1)
    state = {"model": original["model"], "optimizer": original["optimizer"].state_dict()}
    fresh = make_state(sgd, 1)
    live = {"model": fresh["model"], "optimizer": fresh["optimizer"].state_dict()}
    binding = bind(hold_models(live, rank=0, world_size=1, declared=None), saved(state).listing())
    (found,) = binding.mismatches
    assert str(found) == (
        "/optimizer: value: expected states of 0 parameters (in this process), found states of 6; put the optimizer itself "
        "into `state`, in place of its state_dict(): it makes the states that it lacks (in the checkpoint)"
    )
    live["optimizer"] = original["optimizer"].state_dict()
    assert bind(hold_models(live, rank=0, world_size=1, declared=None), saved(state).listing()).mismatches == ()


class Scaler:
    """What DeepSpeed keeps beside its partitions."""


def zero_optimizer() -> Any:
    def state_dict(self: Any) -> dict[str, Any]:
        return {"loss_scaler": Scaler(), "base": {"hook": sum, "fp32": torch.zeros(3)}, "zero_stage": 2}

    methods = {"state_dict": state_dict, "load_state_dict": lambda self, state: None}
    return type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2", **methods})()


class Wrapping(torch.optim.SGD):
    """As accelerate wraps it."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__([nn.Parameter(torch.zeros(3))], lr=0.1)
        self.optimizer = optimizer


@pytest.mark.parametrize("wrapped", [False, True])
def test_zero_of_deepspeed_is_refused_once_with_all_that_stands_in_the_way(wrapped: bool) -> None:
    entry = Wrapping(zero_optimizer()) if wrapped else zero_optimizer()
    with pytest.raises(LayoutUnsupported) as error:
        saved({"model": seeded(0), "optimizer": entry})
    for told in (
        "DeepSpeedZeroOptimizer is a ZeRO optimizer of DeepSpeed",
        "/optimizer/loss_scaler (a Scaler)",
        "/optimizer/base/hook (a builtin_function_or_method)",
        "ek.PerRank",
    ):
        assert told in error.value.message


class Projecting(torch.optim.SGD):
    """Keeps an object for each parameter, as optimizers of other libraries do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["projector"] = Scaler()
        return super().step(closure)


def test_an_object_inside_a_state_is_named_with_its_place_and_what_to_do() -> None:
    model = seeded(0)
    optimizer = Projecting(model.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(ValueNotCarried) as refusal:
        saved({"model": model, "optimizer": optimizer})
    for told in (
        "/optimizer/state/model/",
        "/projector: ",
        "Scaler cannot be carried",
        "state_dict and load_state_dict do that",
    ):
        assert told in refusal.value.message


def test_all_that_an_objects_state_dict_has_and_no_checkpoint_holds_is_named_at_once() -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"a": Scaler(), "b": [1, Scaler()], "c": 3}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(ValueNotCarried, match=r"value /odd/a: .*; also value /odd/b/1: "):
        saved({"odd": Odd()})
