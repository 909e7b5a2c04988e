"""Golden checkpoints: what earlier releases wrote is read, bit for bit, by the library and by the mini reader."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from fingerprint import fingerprint

import elastickpt as ek
from elastickpt.format.arrays import ArrayId
from elastickpt.format.values import ArrayReference
from tools import golden_job, make_golden, mini_reader

GOLDEN = Path(__file__).parent.parent / "golden"
V1 = GOLDEN / "v1-by-0.1.0"
PACKED = GOLDEN / "v1-packed-by-0.1.0"
TRUTHS = sorted(GOLDEN.glob("*.truth.json"))


def _name(identity: ArrayId) -> str:
    return "/".join(part for part in (identity.item, identity.name, identity.state) if part)


def _said(array: Any) -> dict[str, Any]:
    digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).tobytes())
    return {"dtype": str(array.dtype), "shape": list(array.shape), "xxh3": digest}


@pytest.mark.parametrize("path", TRUTHS, ids=lambda path: path.name)
def test_the_library_reads_it_whole(path: Path) -> None:
    checkpoint = ek.open(path.with_name(path.name.removesuffix(".truth.json")))
    assert checkpoint.verify().problems == ()
    assert {_name(one): _said(checkpoint.read(one)) for one in checkpoint.records} == json.loads(path.read_text())


@pytest.mark.parametrize("path", TRUTHS, ids=lambda path: path.name)
def test_the_mini_reader_agrees(path: Path) -> None:
    folder = path.with_name(path.name.removesuffix(".truth.json"))
    keys = {record.key: _name(one) for one, record in ek.open(folder).records.items()}
    assert {keys[key]: _said(array) for key, array in mini_reader.read(folder).items()} == json.loads(path.read_text())


def test_the_truth_is_that_of_the_whole_tensors() -> None:
    assert make_golden.truth() == json.loads((GOLDEN / "v1-by-0.1.0.truth.json").read_text())


def test_a_golden_checkpoint_is_never_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(V1, tmp_path / V1.name)
    monkeypatch.setattr(make_golden, "FOLDER", tmp_path)
    monkeypatch.setattr(make_golden, "RELEASE", "0.1.0")
    assert make_golden.main() == 1


def test_values_come_back_with_their_types() -> None:
    checkpoint = ek.open(V1)
    found: Any = dict(checkpoint.values["/values"])  # type: ignore[call-overload]
    wanted = golden_job.values()
    assert found.pop("set") == wanted.pop("set")
    assert repr(found) == repr(wanted)  # types and order too, and nan beside nan
    extra: Any = checkpoint.values["/extra"]
    assert extra["ids"] == ArrayReference("extra", "ids")
    loaders: list[Any] = [checkpoint.per_rank(rank)["/loader"] for rank in range(4)]
    assert [loader["cursor"] for loader in loaders] == [100, 101, 102, 103]
    assert (checkpoint.step, checkpoint.manifest.world_size) == (golden_job.STEP, golden_job.WORLD)


@pytest.mark.parametrize("golden", [V1, PACKED], ids=lambda path: path.name)
def test_it_loads_into_a_live_state_of_one_process(golden: Path) -> None:
    random.seed(99)
    state = golden_job.state(0, parallel=False, filled=False)
    wanted = golden_job.state(0, parallel=False, filled=True)
    report = ek.load(state, golden)
    assert report.step == golden_job.STEP
    for key in ("model", "optimizer", "scheduler", "extra", "values"):
        assert fingerprint({key: state[key]}) == fingerprint({key: wanted[key]})
    assert state["loader"].value.position == {"cursors": [100, 101, 102, 103]}
    assert any("torch" in note and "seeded anew" in note for note in report.notes)
    drawn = random.random()
    assert drawn == random.Random(5).random()  # it was the same on all ranks, so it goes on


def test_how_a_step_is_executed_stays_the_choice_of_this_process() -> None:
    """[UCF-88]"""
    state = golden_job.state(0, parallel=False, filled=False)
    first, second = state["optimizer"].param_groups
    first["foreach"], second["lr"] = True, 5.0
    report = ek.load(state, V1)
    assert (first["foreach"], second["foreach"], second["lr"]) == (True, False, 0.001)
    (note,) = [note for note in report.notes if "foreach" in note]
    assert "True stays" in note
