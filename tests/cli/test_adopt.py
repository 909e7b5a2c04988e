"""`adopt`: what it says, its exit codes, what it leaves. [CLI-40..42]"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_actors import tree
from whole_runs import Place, flip

from elastickpt.cli.main import main

Answer = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Without any object under `commits/`."""
    found = Place(str(tmp_path / "run"))
    found.job(1, 2, 3, continues=0)
    found.job(4, 5, continues=3)
    found.store.remove_tree("commits")
    return found


def test_only_what_verifies_is_adopted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """[RUN-106, CLI-40, CLI-41]"""
    flip(place.store, "step-0000000005.2.1/extra/w/c.0")
    place.store.rename("step-0000000001.1.1", "step-0000000009.2.1")
    assert main(["adopt", place.root]) == 3
    out, err = capsys.readouterr()
    left = [line for line in out.splitlines() if line.startswith("left")]
    assert ["step-0000000009.2.1" in line and "expected step 9" in line for line in left] == [True, False]
    assert "step-0000000005.2.1" in left[1]
    assert "extra/w/c.0" in left[1]
    assert err == f"{place.root}: 3 checkpoints adopted by epoch 3\n"
    assert place.entries == [(4, 2, "live"), (3, 1, "live"), (2, 1, "live")]
    place.job(6, continues=4, expected_notes=2)
    assert "step-0000000009.2.1" in place.folders, "above the live branch, so it waits"
    assert "step-0000000005.2.1" not in place.folders


def test_where_nothing_verifies_nothing_is_changed(place: Place, json_of: Answer) -> None:
    """[RUN-105, CLI-41, CLI-42]"""
    for folder in place.folders:
        flip(place.store, f"{folder}/extra/w/c.0")
    before = tree(place.store)
    code, answer = json_of("adopt", place.root)
    assert (code, answer["epoch"], answer["adopted"]) == (3, 0, [])
    assert [one["folder"] for one in answer["left"]] == sorted(place.folders, reverse=True)  # type: ignore[attr-defined]
    assert tree(place.store) == before
    place.demand_refusal()


def test_the_command_says_what_it_did(place: Place, capsys: pytest.CaptureFixture[str], json_of: Answer) -> None:
    """[CLI-40, CLI-42]"""
    code, answer = json_of("adopt", place.root)
    assert (code, answer["epoch"], answer["left"]) == (0, 3, [])
    assert answer["adopted"] == [{"folder": one, "state": "live"} for one in sorted(place.folders, reverse=True)]
    assert main(["adopt", place.root]) == 0
    assert capsys.readouterr() == ("", f"{place.root}: nothing to adopt: no whole checkpoint is without a register\n")


def test_what_is_no_run_or_not_there_is_an_error(place: Place, capsys: pytest.CaptureFixture[str], json_of: Answer) -> None:
    """[CLI-42]"""
    assert main(["adopt", "/nonexistent/run"]) == 1
    assert "[not-a-checkpoint]" in capsys.readouterr().err
    code, answer = json_of("adopt", place.root, "step-0000000077.1.1")
    assert (code, answer["error"]["kind"]) == (1, "not-a-checkpoint")  # type: ignore[index]
    assert main(["adopt"]) == 2
