"""The JSON Schemas take what the valid vectors hold, and the specification holds together."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tools import check_spec

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


def test_the_specification_holds_together() -> None:
    assert check_spec.problems() == []
