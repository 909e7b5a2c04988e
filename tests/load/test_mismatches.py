"""A state that differs from the checkpoint: one error that names all differences and both sides, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.errors import NotACheckpoint, Refused, StateMismatch, Uncommitted

State = dict[str, Any]


def _with_parameter(state: State) -> None:
    state["model"].added = nn.Parameter(torch.zeros(2))


def _without_parameter(state: State) -> None:
    del state["model"].frozen


def _other_shape(state: State) -> None:
    state["model"].first.weight.data = torch.zeros(7, 4)


def _other_dtype(state: State) -> None:
    state["model"].norm.running_mean = state["model"].norm.running_mean.double()


def _added_key(state: State) -> None:
    state["extra"]["more"] = 1


def _dropped_item(state: State) -> None:
    del state["epoch"]


def _added_item(state: State) -> None:
    state["unknown"] = {"x": torch.zeros(2)}


def _other_kind(state: State) -> None:
    state["extra"]["mean"] = 3


CHANGES = {
    "missing parameter": (_with_parameter, ["params/model/added/value: missing", "float32 (2,)", "in this process"]),
    "unexpected parameter": (_without_parameter, ["params/model/frozen/value: unexpected", "(2,)", "in the checkpoint"]),
    "other shape": (
        _other_shape,
        ["params/model/first.weight/value: shape", "expected (7, 4) (in this", "found (6, 4) (in the"],
    ),
    "other dtype": (_other_dtype, ["model/norm.running_mean/value: dtype", "expected float64 (in", "found float32 (in"]),
    "added key": (_added_key, ["/extra/more: missing", "expected 1 (in this process)"]),
    "dropped item": (_dropped_item, ["/epoch: unexpected", "(in the checkpoint)"]),
    "added item": (_added_item, ["/unknown: missing"]),
    "other kind": (_other_kind, ["/extra/mean: value", "in this process"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_difference_is_named_with_both_sides_and_nothing_changes(case: Any, name: str) -> None:
    change, texts = CHANGES[name]
    tried = case.load(change)
    assert type(tried.error) is StateMismatch
    assert tried.unchanged
    for text in texts:
        assert text in str(tried.error), str(tried.error)
    assert "nothing was changed" in str(tried.error)


def test_all_differences_come_in_one_error(case: Any) -> None:
    def change(state: State) -> None:
        _with_parameter(state)
        _other_dtype(state)
        _dropped_item(state)

    message = str(case.load(change).error)
    assert "3 differences" in message
    assert message.count("\n") == 4


PASSES = {"missing": {"unexpected"}, "unexpected": {"missing"}, "none": {"missing", "unexpected"}, "all": set()}
KINDS = {"missing": _with_parameter, "unexpected": _dropped_item, "shape": _other_shape, "dtype": _other_dtype}


@pytest.mark.parametrize("strict", PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_strict_modes(case: Any, new_job: Callable[[int], State], strict: Any, kind: str) -> None:
    """ "missing" minds what the checkpoint lacks, "unexpected" what it has beside; shapes and types always count."""
    if kind not in PASSES[strict]:
        tried = case.load(KINDS[kind], strict=strict)
        assert type(tried.error) is StateMismatch
        assert tried.unchanged
        return
    state, saved = new_job(2), new_job(1)
    KINDS[kind](state)
    report = ek.load(state, case.path, strict=strict)
    assert len(report.skipped) == 1
    assert f": {kind}:" in report.skipped[0]
    for name, tensor in saved["model"].state_dict().items():
        assert torch.equal(state["model"].state_dict()[name], tensor), name
    if kind == "missing":
        assert torch.equal(state["model"].added, torch.zeros(2))
    assert state["extra"]["tokens"] == 10


def test_an_exact_load_reports_nothing_skipped(case: Any, new_job: Callable[[int], State]) -> None:
    state, saved = new_job(2), new_job(1)
    report = ek.load(state, case.path)
    assert (report.step, report.skipped) == (5, ())
    assert state["epoch"] == 1
    assert state["extra"]["names"] == ["a", "1"]
    assert torch.equal(state["extra"]["mean"], saved["extra"]["mean"])
    assert state["optimizer"].param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("options", [{"strict": "some"}, {"verify": "maybe"}])
def test_options_that_do_not_exist_are_refused(case: Any, options: dict[str, str]) -> None:
    tried = case.load(**options)
    assert type(tried.error) is Refused
    assert tried.unchanged
    assert next(iter(options.values())) in str(tried.error)


# -- what is no checkpoint ---------------------------------------------------------------------------------------------


def _refusal(path: Path | str) -> ek.errors.CheckpointError:
    for attempt in (ek.open, lambda where: ek.load({"t": torch.zeros(1)}, where)):
        with pytest.raises(NotACheckpoint) as caught:
            attempt(path)
    return caught.value


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    assert "an empty folder" in str(_refusal(tmp_path / "empty"))
    assert "found notes.txt" in str(_refusal(tmp_path / "other"))
    for nowhere in ("file", "absent", "absent/deeper", "file/below"):
        assert nowhere.partition("/")[0] in str(_refusal(tmp_path / nowhere))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "other"]


def test_a_draft_is_said_to_be_uncommitted(case: Any) -> None:
    draft = case.path.with_name(".c.draft-host-1-2-0123456789abcdef")
    (case.path / "checkpoint.json").unlink()
    path = case.path
    for name in (path, draft, Path(f"{draft}.aborted")):
        path = path.rename(name)
        error = _refusal(path)
        assert type(error) is Uncommitted
        assert path.name in str(error)


@pytest.mark.parametrize(
    ("saved", "live", "strict", "told"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "all", "strict='missing' lets pass what the checkpoint has beside"),
        ({"a": 1}, {"a": 1, "b": 2}, "all", "strict='unexpected' lets pass what the state has and the checkpoint lacks"),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, "all", "strict='none' lets pass what the state has and the checkpoint lacks and"),
        ({"a": 1}, {"a": 1, "b": 2}, "missing", "strict='none' lets pass what the state has and the checkpoint lacks"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "none", "shapes, element types and values must fit in every mode"),
    ],
)
def test_a_mismatch_says_which_mode_would_let_it_pass(
    saved: dict[str, Any], live: dict[str, Any], strict: Any, told: str, tmp_path: Path
) -> None:
    ek.save(saved, tmp_path / "c")
    with pytest.raises(StateMismatch) as error:
        ek.load(live, tmp_path / "c", strict=strict)
    assert f"(strict={strict!r}; {told}" in error.value.message
