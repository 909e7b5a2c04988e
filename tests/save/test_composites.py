"""Composite tensors, which are several tensors inside: saved, loaded, made anew, compared, or refused by name."""

from __future__ import annotations

import copy
import enum
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import elastickpt as ek
from elastickpt.errors import Malformed, StateMismatch, ValueNotCarried
from elastickpt.format.values import DtypeValue
from elastickpt.training.composites import composition_in
from tools import mini_reader


class Mode(enum.Enum):
    SIGNED = 1
    UNSIGNED = 2


class Coded(torch.Tensor):
    """Codes of one byte and a scale for each row: a class as quantisation libraries have them."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, factor: float, mode: Mode, extra: Any = None) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scale, made.factor, made.mode, made.extra = codes, scale, factor, mode, extra
        found: Coded = made
        return found

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], (self.factor, self.mode, self.extra)

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Coded:
        return cls(inner["codes"], inner["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            one = args[0]
            found = cls(one.codes.detach(), one.scale.detach(), one.factor, one.mode, one.extra)
            return return_and_correct_aliasing(func, args, kwargs, found)
        args = tree_map_only(Coded, lambda one: one.codes.float() * one.scale[:, None] * one.factor, args)
        return func(*args, **(kwargs or {}))


class Other(Coded):
    """Another class with the same parts."""


def coded(
    seed: int, factor: float = 1.0, mode: Mode = Mode.SIGNED, *, rows: int = 3, cls: type[Coded] = Coded, extra: Any = None
) -> Coded:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-100, 100, (rows, 4), dtype=torch.int8, generator=generator)
    return cls(codes, torch.rand(rows, generator=generator), factor, mode, extra)


def pair(seed: int) -> TwoTensor:
    generator = torch.Generator().manual_seed(seed)
    return TwoTensor(torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator))


def parts(tensor: Any) -> list[torch.Tensor]:
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


class Keeper:
    """An object with a state of its own."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_a_composite_tensor_anywhere_is_filled_in_place(tmp_path: Path) -> None:
    nested = TwoTensor(pair(1), pair(2))
    ek.save({"x": pair(0), "d": {"n": [nested], "c": coded(3)}, "o": Keeper({"t": pair(4)})}, tmp_path / "a")
    x, n, c, t = pair(5), TwoTensor(pair(5), pair(6)), coded(7), pair(8)
    keeper = Keeper({"t": t})
    live = {"x": x, "d": {"n": [n], "c": c}, "o": keeper}
    ek.load(live, tmp_path / "a")
    assert live["x"] is x
    assert keeper.state["t"] is t
    assert same(x, pair(0))
    assert same(n.a, pair(1))
    assert same(n.b, pair(2))
    assert same(c, coded(3))
    assert same(t, pair(4))
    assert json.loads((tmp_path / "a/checkpoint.json").read_text())["requires"] == ["composites", "python-types"]


def test_the_parts_are_arrays_that_other_readers_open(tmp_path: Path) -> None:
    """[UCF-108]"""
    ek.save({"d": {"n": [TwoTensor(pair(1), pair(2))], "c": coded(3)}}, tmp_path / "a")
    found = mini_reader.read(tmp_path / "a")
    assert sorted(found) == ["extra/d/c/codes", "extra/d/c/scale", *(f"extra/d/n/0/{a}/{b}" for a in "ab" for b in "ab")]
    assert found["extra/d/c/codes"].tolist() == coded(3).codes.tolist()
    assert ek.open(tmp_path / "a").verify().problems == ()


def test_an_object_without_one_and_a_rank_get_one_made(tmp_path: Path) -> None:
    """[UCF-111]"""
    large = TwoTensor(torch.rand(200, 200), torch.rand(200, 200))
    ek.save({"o": Keeper({"t": pair(4)}), "r": ek.PerRank(Keeper({"t": [large, pair(2)]}))}, tmp_path / "a")
    keeper, own = Keeper({}), Keeper({})
    ek.load({"o": keeper, "r": ek.PerRank(own)}, tmp_path / "a")
    assert same(keeper.state["t"], pair(4))
    assert same(own.state["t"][0], large)
    assert same(own.state["t"][1], pair(2))


DIFFERENT = {
    "class": lambda: coded(1, cls=Other),
    "shape": lambda: coded(1, rows=4),
    "context": lambda: coded(1, factor=2.0),
    "a member of an enum": lambda: coded(1, mode=Mode.UNSIGNED),
    "plain": lambda: torch.zeros(3, 4),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_composition_is_refused_and_nothing_changes(tmp_path: Path, what: str) -> None:
    """[UCF-110]"""
    other = DIFFERENT[what]()
    model, states = nn.Module(), nn.Module()
    model.register_buffer("q", coded(0))
    states.register_buffer("q", other)
    for saved, live in (
        ({"d": {"q": coded(0)}}, {"d": {"q": other}}),
        ({"d": {"q": other}}, {"d": {"q": coded(0)}}),
        ({"d": model}, {"d": states}),
    ):
        before = [one.clone() for one in (parts(other) if isinstance(other, Coded) else [other])]
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        ek.save(saved, path)
        with pytest.raises(StateMismatch, match=r"q(/value)?: value: expected") as refusal:
            ek.load(live, path)
        assert "unexpected" not in str(refusal.value)
        assert all(map(torch.equal, parts(other) if isinstance(other, Coded) else [other], before))


def test_a_context_that_cannot_be_described_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueNotCarried, match=r"extra/d/q: the context of its .*Coded\[2\] holds a object"):
        ek.save({"d": {"q": coded(0, extra=object())}}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


class LowBit(torch.optim.Optimizer):
    """Its momentum is a composite tensor, one kind of which no value describes, and a plain one whose name has a dot."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["pair"] = TwoTensor(torch.zeros_like(p), torch.zeros_like(p))
                    state["pair.a"] = torch.zeros_like(p)
                    state["deep"] = [TwoTensor(torch.zeros(2), torch.ones(2)), {"n": None}]
                state["pair"].a.mul_(0.9).add_(p.grad)
                state["pair"].b.add_(p.grad.square())
                state["deep"][0].a.add_(1)
                p.sub_(group["lr"] * state["pair"].a / (state["pair"].b.sqrt() + 1))


class LowBitPlain(LowBit):
    """The same without the state that would have the name of a part."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for state in self.state.values():
            state.pop("pair.a", None)


def test_an_optimizer_that_made_no_step_gets_composite_states(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = LowBitPlain(model.parameters())
    _train(model, optimizer, range(3))
    run = ek.Run(tmp_path / "run", {"m": model, "o": optimizer})
    run.restore()
    run.save(3)
    run.close()
    again = nn.Linear(4, 3)
    fresh = LowBitPlain(again.parameters())
    other = ek.Run(tmp_path / "run", {"m": again, "o": fresh})
    assert other.restore().step == 3
    other.close()
    _train(model, optimizer, range(3, 6))
    _train(again, fresh, range(3, 6))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert same(optimizer.state[p]["pair"], fresh.state[q]["pair"])
        assert same(optimizer.state[p]["deep"][0], fresh.state[q]["deep"][0])
        assert fresh.state[q]["deep"][1] == {"n": None}


def test_a_state_with_the_name_of_a_part_is_refused(tmp_path: Path) -> None:
    """[UCF-112]"""
    model = nn.Linear(4, 3)
    optimizer = LowBit(model.parameters())
    _train(model, optimizer, range(1))
    with pytest.raises(ek.errors.StructureConflict, match=r"params/m/weight/pair\.a"):
        ek.save({"m": model, "o": optimizer}, tmp_path / "a")


def test_a_class_that_cannot_be_made_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ek.save({"o": Keeper({"q": coded(0)})}, tmp_path / "a")
    with pytest.raises(StateMismatch, match=r"extra/o/q: value: .*Mode.*cannot be made from a checkpoint"):
        ek.load({"o": Keeper({})}, tmp_path / "a")
    peer = nn.Module()
    peer.register_buffer("q", coded(1))
    ek.save({"o": Keeper({"q": coded(0)}), "m": peer}, tmp_path / "b")
    keeper = Keeper({})
    ek.load({"o": keeper, "m": peer}, tmp_path / "b")  # with the context of the one that is there
    assert same(keeper.state["q"], coded(0))
    assert (keeper.state["q"].factor, keeper.state["q"].mode) == (1.0, Mode.SIGNED)
    monkeypatch.delitem(globals(), "Coded")
    with pytest.raises(StateMismatch, match=r"has loaded no class .*Coded: import its module before loading"):
        ek.load({"o": Keeper({})}, tmp_path / "a")


def test_a_plain_state_of_a_composite_parameter_is_made_plain(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Module()
        model.register_parameter("w", nn.Parameter(pair(seed)))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make(0)
    momentum = torch.rand(2, 3)
    optimizer.state[model.w]["momentum_buffer"] = momentum
    ek.save({"m": model, "o": optimizer}, tmp_path / "a")
    again, fresh = make(1)
    ek.load({"m": again, "o": fresh}, tmp_path / "a")
    assert same(again.w.detach(), pair(0))
    found = fresh.state[again.w]["momentum_buffer"]
    assert type(found) is torch.Tensor
    assert torch.equal(found, momentum)


@pytest.mark.parametrize("kind", ["SGD", "SparseAdam"])
def test_a_sparse_embedding_resumes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Torch resumes a sparse momentum, which has other indices in every step."""

    def make(seed: int) -> tuple[nn.Embedding, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Embedding(50, 4, sparse=True)
        options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "SparseAdam": {"lr": 0.1}}[kind]
        return model, getattr(torch.optim, kind)(list(model.parameters()), **options)

    def train(model: nn.Embedding, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(step))
            model(ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make(0)
    train(model, optimizer, range(3))
    ek.save({"m": model, "o": optimizer}, tmp_path / "a")
    for steps in (range(0), range(1), range(9)):  # into no state, and into one with fewer and more indices
        again, fresh = make(1)
        train(again, fresh, steps)
        ek.load({"m": again, "o": fresh}, tmp_path / "a")
        expected, taught = make(2)
        expected.load_state_dict(model.state_dict())
        taught.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(again, fresh, range(3, 6))
        train(expected, taught, range(3, 6))
        assert torch.equal(again.weight, expected.weight)


def test_an_index_outside_of_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    broken = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), is_coalesced=True, check_invariants=False)
    ek.save({"d": {"t": broken}}, tmp_path / "a")
    with pytest.raises(Malformed, match="an index outside of it"):
        ek.load({"d": {"t": torch.zeros(3).to_sparse()}}, tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [{"part": []}, {"part": "codes"}, {"shape": [-1]}, {"class": 1}, {"dtype": "float32"}, {"more": 1}, {"part": None}],
)
def test_a_composition_of_another_form_is_refused(change: dict[str, Any]) -> None:
    """[UCF-108]"""
    good = {"class": "C", "shape": [2], "dtype": DtypeValue("float32"), "context": None, "parts": [["a", None]], "part": ["a"]}
    assert composition_in({"composition": good}) == ({k: v for k, v in good.items() if k != "part"}, ("a",))
    with pytest.raises(Malformed, match="composition"):
        composition_in({"composition": {**good, **change}})
