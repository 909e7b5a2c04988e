"""A checkpoint whose pieces lie in another one beside it: v1 writers make none, v1 readers honour it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt import errors
from elastickpt.format.digest import file_digest
from elastickpt.format.records import Base, FragmentMap

WEIGHT = "params/model/first.weight/value/c.0.0"


def _with_base(case: Any, uri: str, digest: str) -> None:
    """The weight's chunk lies in the base from now on."""

    def change(fragments: FragmentMap) -> FragmentMap:
        files = tuple(replace(file, base=1) if file.path == WEIGHT else file for file in fragments.files)
        return replace(fragments, files=files)

    case.forge.manifest(lambda manifest: replace(manifest, bases=(Base(uri, digest),)))
    case.forge.fragments(change)


@pytest.fixture
def base(case: Any) -> Path:
    """A checkpoint beside `case` that has all of it; `case` has lost the weight."""
    path = case.path.with_name("base")
    shutil.copytree(case.path, path)
    (case.path / WEIGHT).unlink()
    return Path(path)


def _digest(path: Path) -> str:
    return file_digest((path / "checkpoint.json").read_bytes())


def test_pieces_in_a_checkpoint_beside_it_are_read(case: Any, base: Path, new_job: Callable[[int], dict[str, Any]]) -> None:
    _with_base(case, "../base", _digest(base))
    state = new_job(2)
    ek.load(state, case.path)
    assert torch.equal(state["model"].first.weight, new_job(1)["model"].first.weight)
    opened = ek.open(case.path)
    assert opened.arrays[WEIGHT.rpartition("/")[0]][...].tobytes() == state["model"].first.weight.detach().numpy().tobytes()


@pytest.mark.parametrize(
    "uri", ["/etc", "file:///etc", "../../base", "base", "..", "../", "../.", "../..", "../a/b", "http://x/y", ""]
)
def test_a_base_that_is_not_beside_it_is_not_opened(case: Any, base: Path, uri: str) -> None:
    _with_base(case, uri, _digest(base))
    tried = case.load()
    assert type(tried.error) is errors.Unsafe, tried.error
    assert tried.unchanged


def test_another_checkpoint_under_the_name_of_the_base_is_refused(case: Any, base: Path) -> None:
    _with_base(case, "../base", "0" * 32)
    tried = case.load()
    assert type(tried.error) is errors.ChecksumMismatch
    assert "../base" in str(tried.error)
    assert tried.unchanged


def test_a_base_that_is_gone_is_named(case: Any, base: Path) -> None:
    digest = _digest(base)
    shutil.rmtree(base)
    _with_base(case, "../base", digest)
    tried = case.load()
    assert type(tried.error) is errors.MissingFile
    assert "base" in str(tried.error)
    assert tried.unchanged


def test_a_spoiled_chunk_in_a_base_is_found(case: Any, base: Path) -> None:
    _with_base(case, "../base", _digest(base))
    data = bytearray((base / WEIGHT).read_bytes())
    data[3] ^= 1
    (base / WEIGHT).write_bytes(data)
    assert type(case.load().error) is errors.ChecksumMismatch
    assert [problem.kind for problem in ek.open(case.path).verify().problems] == ["checksum-mismatch"]
