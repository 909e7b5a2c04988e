"""Saves that are refused or fail: one typed error that names the thing, nothing left behind, and the next save works."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt import errors
from elastickpt.saving import save as saving
from elastickpt.storage import opening
from elastickpt.storage.local import LocalStore
from elastickpt.testing.faults import FailAt, FaultyStore


class _Thing:
    pass


class _OfList(list[int]):
    pass


def _looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class _Hides(nn.Module):
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "hidden"] = torch.ones(1)


UNCARRIED: dict[str, tuple[Callable[[], object], str]] = {
    "lambda": (lambda: {"f": [1, {"g": lambda: 0}]}, "/v/f/1/g"),
    "open file": (lambda: {"log": sys.stdout}, "/v/log"),
    "object": (lambda: [_Thing()], "/v/0"),
    "class": (lambda: {"c": _Thing}, "/v/c"),
    "lock": (lambda: (threading.Lock(),), "/v/0"),
    "generator": (lambda: iter([1]), "/v"),
    "module": (lambda: {"m": nn.Linear(1, 1)}, "/v/m"),
    "subclass of a list": (lambda: {"l": _OfList()}, "/v/l"),
    "key that is no plain value": (lambda: {"d": {_Thing(): 1}}, "/v/d"),
    "container inside itself": (_looped, "/v/0/0"),
    "too deep": (lambda: _nested(40), "/v/0/0"),
    "sparse tensor by rows": (lambda: {"t": torch.eye(2).to_sparse_csr()}, "v/t"),
    "meta tensor": (lambda: {"t": torch.empty(2, device="meta")}, "v/t"),
    "quantised tensor": (lambda: {"t": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "v/t"),
    "conjugate view": (lambda: {"t": torch.ones(2, dtype=torch.complex64).conj()}, "v/t"),
    "lazy parameter": (lambda: nn.LazyLinear(2), "v/weight"),
    "hidden state": (_Hides, "hidden"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", UNCARRIED)
def test_a_value_that_cannot_be_carried_is_named_by_its_place(tmp_path: Path, name: str) -> None:
    make, place = UNCARRIED[name]
    with pytest.raises(errors.ValueNotCarried) as caught:
        ek.save({"a": torch.ones(3), "v": make()}, tmp_path / "c")
    assert place in str(caught.value), str(caught.value)
    _require_nothing_left(tmp_path)


@pytest.mark.parametrize("key", [1, "", None, ("a",), "k" * 1025])
def test_a_key_of_the_state_that_is_no_name_is_refused(tmp_path: Path, key: Any) -> None:
    with pytest.raises(errors.ValueNotCarried, match="key"):
        ek.save({key: torch.ones(1)}, tmp_path / "c")
    _require_nothing_left(tmp_path)


@pytest.mark.parametrize("state", [nn.Linear(1, 1), [1], None, torch.ones(1)])
def test_a_state_that_is_no_mapping_is_refused_by_its_type(tmp_path: Path, state: Any) -> None:
    ek.save({"t": torch.ones(1)}, tmp_path / "c")
    for attempt in (lambda: ek.save(state, tmp_path / "d"), lambda: ek.load(state, tmp_path / "c")):
        with pytest.raises(errors.ValueNotCarried, match=type(state).__name__):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_keys_that_are_one_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.StructureConflict, match="extra/d/1"):
        ek.save({"d": {1: torch.ones(1), "1": torch.ones(1)}}, tmp_path / "c")
    _require_nothing_left(tmp_path)


def test_an_optimizer_of_a_model_that_is_not_in_the_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.StructureConflict, match="'opt'"):
        ek.save({"opt": torch.optim.SGD(nn.Linear(2, 2).parameters())}, tmp_path / "c")
    _require_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"placement": "striped"}, "striped"),
        ({"durability": "maybe"}, "maybe"),
        ({"step": -1}, "-1"),
        ({"step": 1.5}, "1.5"),
        ({"step": True}, "True"),
        ({"step": 1 << 63}, str(1 << 63)),
    ],
)
def test_options_that_do_not_exist_are_refused_by_name(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.Refused, match=text):
        ek.save({"t": torch.ones(1)}, tmp_path / "c", **options)
    _require_nothing_left(tmp_path)


def _require_nothing_left(parent: Path) -> None:
    """The folder is as it was, and a save to the same path works."""
    assert list(parent.iterdir()) == []
    ek.save({"t": torch.ones(1)}, parent / "c", durability="process")
    assert [path.name for path in parent.iterdir()] == ["c"]
    assert ek.open(parent / "c").verify().sound


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_path_that_holds_something_is_never_overwritten(tmp_path: Path) -> None:
    ek.save({"t": torch.ones(1)}, tmp_path / "c")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in tmp_path.rglob("*")}
    for name, found in (("c", "a checkpoint"), ("file", "a file"), ("folder", "1 entries"), ("link", "link")):
        with pytest.raises(errors.PathOccupied, match=found) as caught:
            ek.save({"t": torch.zeros(1)}, tmp_path / name)
        assert f"{tmp_path.name}/{name}" in str(caught.value)
    assert {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in tmp_path.rglob("*")} == before


def test_a_path_that_is_taken_while_writing_stays_the_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = saving.commit

    def overtaken(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(saving, "commit", real)
            ek.save({"t": torch.ones(1)}, tmp_path / "c", step=1)
        return real(*args, **options)

    monkeypatch.setattr(saving, "commit", overtaken)
    with pytest.raises(errors.PathOccupied, match="/c"):
        ek.save({"t": torch.zeros(1)}, tmp_path / "c", step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert ek.open(tmp_path / "c").step == 1
    assert ek.open(tmp_path / "c").verify().sound


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, ".c", ".c.draft-x", "a b%", "-c", "c.aborted"])
def test_a_checkpoint_may_have_any_name_that_the_file_system_has(tmp_path: Path, name: str) -> None:
    ek.save({"t": torch.ones(1)}, tmp_path / name)
    live = {"t": torch.zeros(1)}
    ek.load(live, tmp_path / name)
    assert torch.equal(live["t"], torch.ones(1))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_beyond_what_the_file_system_has_is_an_error_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="nnnn") as caught:
        ek.save({"t": torch.ones(1)}, tmp_path / ("n" * 256))
    assert caught.type is not errors.CheckpointError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.Refused, match="path ''"):
        ek.save({"t": torch.ones(1)}, "")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_become_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    ek.save({"t": torch.ones(1)}, tmp_path / "c")
    assert ek.open(tmp_path / "c").verify().sound


def test_a_parent_that_is_a_file_is_an_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "c", tmp_path / "file" / "deeper" / "c"):
        with pytest.raises(errors.CheckpointError, match="file") as caught:
            ek.save({"t": torch.ones(1)}, path)
        assert caught.type is not errors.CheckpointError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_missing_parents_are_made_but_not_for_a_state_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ValueNotCarried):
        ek.save({"v": lambda: 0}, tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    ek.save({"v": 0}, tmp_path / "a" / "b" / "c")
    assert ek.open(tmp_path / "a" / "b" / "c").verify().sound


@pytest.mark.parametrize("path", ["relative/c", "./c", "a/../c", "c/"])
def test_relative_paths_are_those_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    info = ek.save({"t": torch.ones(1)}, path)
    assert ek.open(path).verify().sound
    assert info.path == os.path.abspath(path)


# -- what the store refuses --------------------------------------------------------------------------------------------

STATE = {"m": torch.arange(100.0), "n": [torch.ones(3), 5]}


@pytest.mark.parametrize(("code", "cls"), [(errno.ENOSPC, errors.NoSpace), (errno.EIO, errors.StorageFailed)])
def test_each_storage_operation_that_fails_fails_the_save_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cls: type[Exception]
) -> None:
    """Operation 1, 2, 3, ... fails once. What is committed stays; before that nothing stands at the path or beside it."""
    ended = []
    for number in range(1, 200):
        parent = tmp_path / str(number)
        parent.mkdir()
        faulty = FaultyStore(LocalStore(parent), FailAt(number, errno=code))
        with monkeypatch.context() as patch:
            patch.setattr("elastickpt.commit.attempt.locate_for_saving", lambda path, store=faulty: (store, "c"))
            try:
                ek.save(STATE, parent / "c")
                raised: errors.CheckpointError | None = None
            except errors.CheckpointError as error:
                raised = error
        ended.append(raised)
        if not faulty.struck:
            break
        if raised is None:
            continue  # an operation whose failure changes nothing, such as sweeping
        if "is committed" in str(raised):
            assert ek.open(parent / "c").verify().sound
            continue
        assert isinstance(raised, cls)
        assert list(parent.iterdir()) == [], (number, raised)
        ek.save(STATE, parent / "c", durability="process")
        assert ek.open(parent / "c").verify().sound
    assert ended[-1] is None
    assert sum(error is not None for error in ended) > 20


MOUNTED = """
import sys
from pathlib import Path
import torch
import elastickpt as ek
root = Path(sys.argv[1])
large, small = {"t": torch.ones(1 << 19), "u": torch.ones(8)}, {"t": torch.ones(1 << 10)}
for cls, parent in ((ek.errors.NoSpace, root / "small"), (ek.errors.ReadOnly, root / "fixed")):
    before = sorted(p.name for p in parent.iterdir())
    try:
        ek.save(large, parent / "c")
        raise SystemExit("saved")
    except ek.errors.CheckpointError as error:
        assert type(error) is cls, repr(error)
        assert str(parent) in str(error), error
    assert sorted(p.name for p in parent.iterdir()) == before
ek.save(small, root / "small" / "c")
assert ek.open(root / "small" / "c").verify().sound
assert ek.open(root / "fixed" / "old").verify().sound
"""


def test_a_full_device_and_a_read_only_one(tmp_path: Path) -> None:
    """Real ones, in a mount namespace of a process of its own."""
    for name in ("small", "fixed"):
        (tmp_path / name).mkdir()
    ek.save({"t": torch.ones(2)}, tmp_path / "fixed" / "old")
    mounts = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/small && mount --bind -o ro {tmp_path}/fixed {tmp_path}/fixed"
    try:
        tried = subprocess.run(["unshare", "-m", "sh", "-c", mounts], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if tried.returncode != 0:
        pytest.skip(f"nothing may be mounted here: {tried.stderr.strip()}")
    command = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$0" -c "$1" {tmp_path}', sys.executable, MOUNTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("lacks", "placement", "text"),
    [("ranged_writes", "plain", "objects.*packed"), ("no_replace_rename", "auto", "objects.*rename")],
)
def test_a_store_that_cannot_hold_a_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, placement: Any, text: str
) -> None:
    """[SAVE-120]"""
    store = LocalStore(tmp_path)
    store.capabilities = replace(store.capabilities, **{lacks: False}, name="objects")
    monkeypatch.setattr("elastickpt.commit.attempt.locate_for_saving", lambda path: (store, "c"))
    with pytest.raises(errors.PlacementUnsupported, match=text):
        ek.save(STATE, tmp_path / "c", placement=placement)
    assert list(tmp_path.iterdir()) == []
    assert opening.locate_for_saving(tmp_path / "c")[1] == "c"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no CheckpointError; the draft goes all the same."""

    def interrupted(self: LocalStore, path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "sync_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ek.save(STATE, tmp_path / "c")
    _require_nothing_left(tmp_path)
