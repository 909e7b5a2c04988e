"""State that exists only through a module's own state dict, its overrides and hooks: saved, given back, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from own_ways import SD, Derived, Metric, Old, Renames
from torch import nn

import elastickpt as ek
from elastickpt.errors import EntryFailed, StateMismatch, ValueNotCarried


class Saves(nn.Module):
    """`_save_to_state_dict` and its counterpart, around codes in a parameter: torch's own loading in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        self.scale = torch.ones(1)

    def _save_to_state_dict(self, destination: SD, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale
        destination[prefix + "scheme"] = {"bits": 8, "names": ["a", "b"]}

    def _load_from_state_dict(self, sd: SD, prefix: str, *rest: Any) -> None:
        self.scale = sd.pop(prefix + "scale")
        self.scheme = sd.pop(prefix + "scheme")
        super()._load_from_state_dict(sd, prefix, *rest)


class Hooked(nn.Module):
    """A linear layer with `total` beside it, carried by hooks; `public` ones, or torch's older private ones."""

    def __init__(self, *, public: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.total = torch.zeros(3)
        self.loaded = 0
        if public:
            self.register_state_dict_post_hook(lambda m, sd, prefix, metadata: sd.update({prefix + "total": m.total}))
            self.register_load_state_dict_pre_hook(lambda m, sd, prefix, *rest: m.take(sd, prefix))
        else:
            self._register_state_dict_hook(lambda m, sd, prefix, metadata: sd.update({prefix + "total": m.total}))
            self._register_load_state_dict_pre_hook(lambda sd, prefix, *rest: self.take(sd, prefix))
        self.register_load_state_dict_post_hook(lambda m, keys: m.count())

    def take(self, sd: SD, prefix: str) -> None:
        self.total = sd.pop(prefix + "total")

    def count(self) -> None:
        self.loaded += 1


def roundtrip(saved: nn.Module, live: nn.Module, path: Path, **options: Any) -> ek.LoadReport:
    ek.save({"m": saved}, path)
    return ek.load({"m": live}, path, **options)


def refused(state: dict[str, Any], path: Path, match: str) -> None:
    with pytest.raises(ValueNotCarried, match=match):
        ek.save(state, path)
    assert not path.exists()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m), lambda m: nn.ModuleDict({"a": nn.Sequential(m)})])
def test_an_override_of_state_dict_is_carried_and_the_class_keeps_its_default(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    a, b = Metric(), Metric()
    a.total = torch.tensor(7.0)
    roundtrip(wrap(a), wrap(b), tmp_path / "c")
    assert (b.total.item(), Metric.total.item()) == (7.0, 0.0)


def test_a_checkpoint_with_own_entries_says_that_a_reader_must_know_them(tmp_path: Path) -> None:
    """[UCF-100, UCF-141]"""
    ek.save({"m": nn.Sequential(Metric())}, tmp_path / "own")
    ek.save({"m": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), "mm": {"a": 1}}, tmp_path / "plain")
    requires = [json.loads((tmp_path / name / "checkpoint.json").read_text())["requires"] for name in ("own", "plain")]
    assert requires == [["own-entries"], []]


def test_entries_stand_under_extra_with_their_own_key_and_plain_values_beside(tmp_path: Path) -> None:
    a, b = nn.ModuleDict({"q": Saves()}), nn.ModuleDict({"q": Saves()})
    a.q.codes.data.fill_(5)
    a.q.scale = torch.full((1,), 0.25)
    roundtrip(a, b, tmp_path / "c")
    assert b.q.codes.tolist() == [5] * 4
    assert b.q.scale.item() == 0.25
    assert b.q.scheme == {"bits": 8, "names": ["a", "b"]}
    arrays = ek.open(tmp_path / "c").arrays
    assert arrays["extra/m/q.scale"][...].tolist() == [0.25]


@pytest.mark.parametrize("public", [True, False])
def test_hooks_of_both_kinds_are_carried_and_loading_hooks_are_called(tmp_path: Path, public: bool) -> None:
    a, b = nn.Sequential(Hooked(public=public)), nn.Sequential(Hooked(public=public))
    a[0].total = torch.arange(3.0)
    roundtrip(a, b, tmp_path / "c")
    assert b[0].total.tolist() == [0.0, 1.0, 2.0]
    assert b[0].lin.weight.equal(a[0].lin.weight)
    assert b[0].loaded == 1


class Filled(nn.Module):
    """A buffer that only a pre-hook of the state dict brings up to date."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.count = 0
        self.in_place = in_place
        self.register_state_dict_pre_hook(Filled.fill)

    def fill(self, prefix: str, keep_vars: bool) -> None:
        if self.in_place:
            self.seen.fill_(self.count)
        else:
            self.seen = torch.full((2,), float(self.count))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_pre_hook_that_fills_a_buffer_runs_before_the_buffer_is_saved(tmp_path: Path, in_place: bool) -> None:
    a, b = Filled(in_place=in_place), Filled(in_place=in_place)
    a.count = 9
    roundtrip(a, b, tmp_path / "c")
    assert b.seen.tolist() == [9.0, 9.0]


@pytest.mark.parametrize("how", ["post", "override"])
def test_what_is_derived_on_loading_is_derived_from_the_checkpoints_contents(tmp_path: Path, how: str) -> None:
    a, b = nn.Sequential(Derived(how)), nn.Sequential(Derived(how))
    weight = b[0].weight
    optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
    roundtrip(a, b, tmp_path / "c")
    assert b[0].norm == a[0].weight.norm().item()
    assert b[0].weight is weight is optimizer.param_groups[0]["params"][0]


class Root(nn.Module):
    """A root whose `load_state_dict` is its own; it is called as users call it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.epoch = 0

    def state_dict(self) -> SD:  # type: ignore[override]
        return {**super().state_dict(), "epoch": self.epoch}

    def load_state_dict(self, sd: SD) -> None:  # type: ignore[override]
        self.epoch = sd.pop("epoch")
        super().load_state_dict(sd)


def test_a_root_that_overrides_both_without_torchs_arguments(tmp_path: Path) -> None:
    a, b = Root(), Root()
    a.epoch = 4
    roundtrip(a, b, tmp_path / "c")
    assert (b.epoch, b.lin.weight.tolist()) == (4, a.lin.weight.tolist())


class Lists(Metric):
    """States that are lists of tensors, as of metrics that keep all predictions."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.total = [torch.full((size,), float(size)) for size in sizes]  # type: ignore[assignment]


@pytest.mark.parametrize("live", [(), (3,), (1, 1, 1)])
def test_lists_of_tensors_come_back_at_the_saved_length(tmp_path: Path, live: tuple[int, ...]) -> None:
    b = Lists(*live)
    roundtrip(Lists(3, 2), b, tmp_path / "c")
    assert [one.tolist() for one in b.total] == [[3.0] * 3, [2.0] * 2]


# what hooks of loading do to names and shapes


def test_a_hook_that_renames_is_followed_also_by_the_optimizer(tmp_path: Path) -> None:
    def state(model: nn.Module) -> dict[str, Any]:
        return {"m": nn.Sequential(model), "o": torch.optim.AdamW(model.parameters())}

    a, b = state(Old()), state(Renames())
    a["m"][0].old(torch.ones(1, 2)).sum().backward()
    a["o"].step()
    ek.save(a, tmp_path / "c")
    ek.load(b, tmp_path / "c")
    assert b["m"][0].new.weight.equal(a["m"][0].old.weight)
    first, second = (next(iter(one["o"].state.values()))["exp_avg"] for one in (a, b))
    assert first.equal(second)


class Splits(nn.Module):
    """Takes one `qkv` apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        self.register_load_state_dict_pre_hook(Splits.split)

    def split(self, sd: SD, prefix: str, *rest: Any) -> None:
        if prefix + "qkv" in sd:
            sd[prefix + "q"], sd[prefix + "k"], sd[prefix + "v"] = sd.pop(prefix + "qkv").chunk(3)


def test_a_hook_that_makes_new_tensors_of_old_ones_gets_their_contents(tmp_path: Path) -> None:
    whole = nn.Module()
    whole.qkv = nn.Parameter(torch.arange(18.0).reshape(6, 3))
    b = Splits()
    roundtrip(whole, b, tmp_path / "c")
    assert torch.cat([b.q, b.k, b.v]).equal(whole.qkv)


def test_names_that_no_hook_brings_together_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    other = nn.ModuleDict({"other": nn.Linear(2, 2)})
    ek.save({"m": other}, tmp_path / "c")
    b = {"m": Renames()}
    before = fingerprint(b)
    with pytest.raises(StateMismatch, match=r"(?s)params/m/new.bias/value: missing.*params/m/other.weight/value: unexpected"):
        ek.load(b, tmp_path / "c")
    assert fingerprint(b) == before
    report = ek.load(b, tmp_path / "c", strict="none")
    assert len(report.skipped) == 4
    assert fingerprint(b) == before


class Observer(nn.Module):
    """Buffers whose shape follows from data; resized in loading, as torch's observers do it."""

    def __init__(self, channels: int, *, resizes: bool = True) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(channels))
        self.resizes = resizes

    def _load_from_state_dict(self, sd: SD, prefix: str, *rest: Any) -> None:
        if self.resizes:
            self.low.resize_(sd[prefix + "low"].shape)
        super()._load_from_state_dict(sd, prefix, *rest)


def test_a_buffer_loads_at_its_saved_shape_if_its_module_resizes_it(tmp_path: Path) -> None:
    a, b = nn.Sequential(Observer(4)), nn.Sequential(Observer(0))
    a[0].low.copy_(torch.arange(4.0))
    roundtrip(a, b, tmp_path / "c")
    assert b[0].low.tolist() == [0.0, 1.0, 2.0, 3.0]
    fixed = nn.Sequential(Observer(0, resizes=False))
    for strict in ("all", "none"):
        with pytest.raises(StateMismatch, match=r"params/m/0.low/value: shape: expected \(0,\)"):
            ek.load({"m": fixed}, tmp_path / "c", strict=strict)
    assert fixed[0].low.shape == (0,)


def test_torchs_own_observers_load_at_the_saved_shape(tmp_path: Path) -> None:
    from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    def one() -> nn.Module:
        return FakeQuantize(PerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, ch_axis=0)

    a, b = one(), one()
    a(torch.randn(3, 5))
    roundtrip(a, b, tmp_path / "c")
    assert b.activation_post_process.min_val.equal(a.activation_post_process.min_val)
    assert b.scale.equal(a.scale)


class Branches(Renames):
    """A hook that looks at contents cannot be rehearsed."""

    def migrate(self, sd: SD, prefix: str, *rest: Any) -> None:
        if sd[prefix + "old.bias"].sum().item() == 0.0:
            Renames.migrate(self, sd, prefix)

    def __init__(self) -> None:
        super().__init__()
        self._load_state_dict_pre_hooks.clear()
        self.register_load_state_dict_pre_hook(Branches.migrate)


def test_a_hook_that_needs_contents_gets_them(tmp_path: Path) -> None:
    a, b = Old(), Branches()
    nn.init.zeros_(a.old.bias)
    roundtrip(a, b, tmp_path / "c")
    assert b.new.weight.equal(a.old.weight)


# refusals


class Says(nn.Linear):
    """Its state dict says what `change` makes of it."""

    def __init__(self, change: Callable[[SD, str], object]) -> None:
        super().__init__(2, 2)
        self.change = change

    def _save_to_state_dict(self, destination: SD, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.change(destination, prefix)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def test_other_contents_under_a_parameters_name_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Says(lambda sd, prefix: sd.update({prefix + "weight": torch.ones(2, 2)})))
    refused({"m": model}, tmp_path / "c", r"module '0' \(Says\) puts other contents .* '0.weight'")
    half = nn.Sequential(Says(lambda sd, prefix: sd.update({prefix + "bias": sd[prefix + "bias"].half()})))
    refused({"m": half}, tmp_path / "c", r"module '0' \(Says\) puts other contents .* '0.bias'")


def test_a_parameter_that_the_state_dict_leaves_out_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Says(lambda sd, prefix: sd.pop(prefix + "weight")))
    refused({"m": model}, tmp_path / "c", r"module '0' \(Says\) leaves '0.weight' out of its state dict")


def test_what_no_checkpoint_can_hold_is_refused_with_its_entry(tmp_path: Path) -> None:
    model = nn.Sequential(Says(lambda sd, prefix: sd.update({prefix + "f": print})))
    refused({"m": model}, tmp_path / "c", "/m/0.f")


def test_an_entry_that_nothing_takes_back_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_state_dict_post_hook(lambda m, sd, prefix, metadata: sd.update({prefix + "note": 1}))
    refused(
        {"m": model}, tmp_path / "c", r"module '0' \(Linear\) writes '0.note' into its state dict, and nothing takes it back"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda sd, prefix: sd.update({prefix + "weight": sd[prefix + "weight"].clone()}),
        lambda sd, prefix: sd.update({prefix + "renamed": sd.pop(prefix + "weight")}),
        lambda sd, prefix: sd.update({prefix + "top": sd.pop(prefix + "weight")[:1], prefix + "low": sd[prefix + "bias"]}),
    ],
)
def test_copies_other_names_and_views_are_nothing_new(tmp_path: Path, change: Callable[[SD, str], object]) -> None:
    ek.save({"m": Says(change)}, tmp_path / "c")
    assert sorted(ek.open(tmp_path / "c").arrays["params/m"]) == ["bias", "weight"]


def test_an_entry_on_one_side_only_is_a_difference(tmp_path: Path) -> None:
    ek.save({"m": nn.Sequential(nn.Module())}, tmp_path / "a")
    with pytest.raises(StateMismatch, match=r"/m/0.total: missing"):
        ek.load({"m": nn.Sequential(Metric())}, tmp_path / "a")
    b = nn.Sequential(Metric())
    b[0].total = torch.tensor(3.0)
    ek.save({"m": b}, tmp_path / "b")
    with pytest.raises(StateMismatch, match=r"extra/m/0.total: unexpected"):
        ek.load({"m": nn.Sequential(nn.Module())}, tmp_path / "b")


class Untaken(Metric):
    """It saves an entry that its own loading, torch's in the end, does not know."""

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def test_an_entry_that_the_models_own_loading_rejects_is_said(tmp_path: Path) -> None:
    ek.save({"m": nn.ModuleDict({"x": Untaken()})}, tmp_path / "c")
    with pytest.raises(StateMismatch, match=r"the model \(ModuleDict\) did not take 'x.total' of the checkpoint"):
        ek.load({"m": nn.ModuleDict({"x": Untaken()})}, tmp_path / "c")


def test_a_hook_that_raises_is_reported_with_what_changed(tmp_path: Path) -> None:
    a = nn.Sequential(nn.Linear(1, 1))
    ek.save({"m": a, "n": nn.Linear(1, 1)}, tmp_path / "c")
    b = nn.Sequential(nn.Linear(1, 1))

    def broken(module: nn.Module, keys: object) -> None:
        raise KeyError("gone")

    b.register_load_state_dict_post_hook(broken)
    with pytest.raises(
        EntryFailed, match=r"entry 'm' \(Sequential\): loading its state raised KeyError: 'gone'; changed already"
    ):
        ek.load({"m": b, "n": nn.Linear(1, 1)}, tmp_path / "c")


def test_a_state_dict_that_raises_is_reported_with_its_entry(tmp_path: Path) -> None:
    def broken(sd: SD, prefix: str) -> None:
        raise KeyError("gone")

    with pytest.raises(EntryFailed, match=r"entry 'm' \(Says\): .*KeyError: 'gone'; nothing was changed"):
        ek.save({"m": Says(broken)}, tmp_path / "c")


def test_state_dicts_of_plain_models_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a save costs must not grow: class and hooks alone say that there is nothing beyond."""
    model = nn.Sequential(
        nn.Linear(2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.utils.spectral_norm(nn.Linear(2, 2))
    )
    asked: list[object] = []
    monkeypatch.setattr(nn.Module, "_save_to_state_dict", lambda *args: asked.append(args))
    ek.save({"m": torch.compile(model)}, tmp_path / "c")
    assert asked == []


class Fabrics(nn.Module):
    """A wrapper of a kind that nobody here knows: it holds what it wraps twice, and its own state dict adds no level."""

    def __init__(self, forward: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = forward, original

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore[override]
        return self._original_module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, sd: SD, strict: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._original_module.load_state_dict(sd, strict=strict, **kwargs)


@pytest.mark.parametrize("wrap", [lambda m: Fabrics(m, m), lambda m: Fabrics(torch.compile(m), m)])
def test_a_wrapper_is_known_by_the_names_of_its_own_state_dict(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    a, b, alone = (nn.ModuleDict({"lin": nn.Linear(2, 2), "metric": Metric()}) for _ in range(3))
    a.metric.total = torch.tensor(6.0)
    roundtrip(wrap(a), wrap(b), tmp_path / "c")
    assert sorted(ek.open(tmp_path / "c").arrays["params/m"]) == ["lin.bias", "lin.weight"]
    ek.load({"m": alone}, tmp_path / "c")
    for one in (b, alone):
        assert one.lin.weight.equal(a.lin.weight)
        assert one.metric.total.item() == 6.0


def test_a_wrapper_that_holds_more_than_its_state_dict_says_adds_its_level(tmp_path: Path) -> None:
    wrapper = Fabrics(nn.Linear(2, 2), nn.Linear(2, 2))
    refused({"m": wrapper}, tmp_path / "c", r"the model \(Fabrics\) leaves '_forward_module.weight' out of its state dict")


class Versioned(nn.Module):
    """From version 2 on its scale is kept as a logarithm."""

    _version = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen: list[int | None] = []

    def _load_from_state_dict(self, sd: SD, prefix: str, metadata: SD, *rest: Any) -> None:
        self.seen.append(metadata.get("version"))
        if metadata.get("version", 0) < self._version:
            sd[prefix + "scale"] = sd[prefix + "scale"].log()
        super()._load_from_state_dict(sd, prefix, metadata, *rest)


class Newer(Versioned):
    _version = 2


def test_loading_gets_the_version_that_saved(tmp_path: Path) -> None:
    """[UCF-142]"""
    old, new = nn.Sequential(Versioned()), nn.Sequential(Newer())
    old[0].scale.data.fill_(4.0)
    roundtrip(old, new, tmp_path / "a")
    assert new[0].seen == [1]
    assert new[0].scale.item() == pytest.approx(torch.tensor(4.0).log().item())
    same = nn.Sequential(Newer())
    roundtrip(new, torch.compile(same), tmp_path / "b")
    assert same[0].seen == [2]
    assert same[0].scale.equal(new[0].scale)
    plain = nn.Sequential(nn.Module())
    plain[0].scale = nn.Parameter(torch.zeros(1))
    ek.load({"m": plain}, tmp_path / "b")  # a version is no difference
    assert plain[0].scale.equal(new[0].scale)


def test_saves_beside_training_and_runs_carry_own_entries(tmp_path: Path) -> None:
    a, b = nn.Sequential(Metric()), nn.Sequential(Metric())
    a[0].total = torch.tensor(2.0)
    handle = ek.async_save({"m": a}, tmp_path / "c")
    a[0].total = torch.tensor(3.0)
    handle.result()
    ek.load({"m": b}, tmp_path / "c")
    assert b[0].total.item() == 2.0
    run = ek.Run(tmp_path / "run", {"m": a})
    run.restore()
    run.save(1).result()
    again = ek.Run(tmp_path / "run", {"m": b}, options=ek.RunOptions(take_over=True))
    again.restore()
    assert b[0].total.item() == 3.0
