"""The JSON Schemas take what the valid vectors hold and what is really written, and the specification holds together."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import layouts
import msgpack
import pytest
import torch
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

import elastickpt as ek
from tools import check_spec, golden_job
from tools.gloo_ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
SPEC = ROOT / "spec"

SCHEMAS = {path.name: json.loads(path.read_text()) for path in (SPEC / "schemas").glob("*.json")}


def validator(name: str) -> Draft202012Validator:
    resources = [(other, Resource.from_contents(schema)) for other, schema in SCHEMAS.items()]
    return Draft202012Validator(SCHEMAS[name], registry=Registry().with_resources(resources))


def inputs(suite: str) -> list[Any]:
    return [pytest.param(json.loads(path.read_text()), id=path.stem) for path in sorted((SPEC / "vectors" / suite).glob("*"))]


def hexed(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: hexed(one) for name, one in value.items()}
    return [hexed(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("vector", inputs("manifests/valid"))
def test_manifests(vector: Any) -> None:
    validator("manifest.schema.json").validate(json.loads(vector["input"]["text"]))


@pytest.mark.parametrize("vector", inputs("fragment-maps/valid"))
def test_fragment_maps(vector: Any) -> None:
    record = msgpack.unpackb(base64.b64decode(vector["input"]["base64"]))
    validator("fragment-map.schema.json").validate(hexed(record))


@pytest.mark.parametrize("vector", inputs("indexes/valid"))
def test_indexes(vector: Any) -> None:
    record = msgpack.unpackb(base64.b64decode(vector["input"]["base64"]))
    validator("index.schema.json").validate(hexed(record))


@pytest.mark.parametrize("vector", [one for one in inputs("documents") if "array" in one.values[0]["input"]])
def test_documents(vector: Any) -> None:
    validator("array-document.schema.json").validate(json.loads(vector["expect"]["text"]))


# -- what is really written --------------------------------------------------------------------------------------------


def require_schemas(tree: Path) -> dict[str, int]:
    """Every record and document of a checkpoint is as its schema says; how many of each there are."""
    sealed = json.loads((tree / "checkpoint.json").read_text())
    validator("manifest.schema.json").validate(sealed)
    counts = {"manifest": 1, "index": 0, "fragments": 0, "arrays": 0, "groups": 0}
    for kind, name in (("index", "index.schema.json"), ("fragments", "fragment-map.schema.json")):
        for entry in sealed[kind]:
            validator(name).validate(hexed(msgpack.unpackb((tree / entry["path"]).read_bytes())))
            counts[kind] += 1
    texts = [path.read_text() for path in tree.rglob("zarr.json")]
    if sealed["placement"] == "packed":
        refs = json.loads((tree / "references.json").read_text())["refs"]
        texts = [text for key, text in refs.items() if key.endswith("zarr.json")]
    for text in texts:
        document = json.loads(text)
        if document["node_type"] == "array":
            validator("array-document.schema.json").validate(document)
        counts[f"{document['node_type']}s"] += 1
    assert counts["arrays"] == len(ek.open(tree).records)
    return counts


@pytest.mark.parametrize("tree", sorted(path for path in (ROOT / "tests" / "golden").iterdir() if path.is_dir()), ids=str)
def test_golden_checkpoints(tree: Path) -> None:
    counts = require_schemas(tree)
    assert counts["fragments"] == golden_job.WORLD
    assert counts["arrays"] > 20


def test_a_save_of_everything_that_one_process_holds(tmp_path: Path) -> None:
    """Values of every type, per-rank values, tables, odd names, tied and 0-d and empty tensors."""
    state = golden_job.state(0, parallel=False, filled=True)
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    ek.save(state | {"tied": tied, "columns": torch.ones(4, 6).T}, tmp_path / "c", step=3)
    assert require_schemas(tmp_path / "c")["groups"] > 10


def test_a_save_beside_training(tmp_path: Path) -> None:
    options = ek.AsyncOptions(executor="thread")
    ek.async_save({"w": torch.ones(3, 4)}, tmp_path / "c", options=options).result(60)
    require_schemas(tmp_path / "c")


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("layout", layouts.CASES)
def test_a_save_of_real_ranks(tmp_path: Path, layout: str) -> None:
    world = layouts.CASES[layout].world
    run_ranks(layouts.save_at, world, layout, str(tmp_path / "c"))
    assert require_schemas(tmp_path / "c")["fragments"] == world


def test_a_change_of_any_member_of_a_saved_record_is_seen(tmp_path: Path) -> None:
    """The schemas can fail: without any one member of a record, or with one more."""
    ek.save({"model": torch.nn.Linear(2, 3)}, tmp_path / "c")
    sealed = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    records = {
        "manifest.schema.json": sealed,
        "index.schema.json": hexed(msgpack.unpackb((tmp_path / "c" / sealed["index"][0]["path"]).read_bytes())),
        "fragment-map.schema.json": hexed(msgpack.unpackb((tmp_path / "c" / sealed["fragments"][0]["path"]).read_bytes())),
    }
    for name, record in records.items():
        for member in record:
            assert not validator(name).is_valid({key: one for key, one in record.items() if key != member}), (name, member)
        assert not validator(name).is_valid(record | {"extra": 1}), name


def test_the_specification_holds_together() -> None:
    assert check_spec.problems() == []
