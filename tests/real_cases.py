"""Real checkpoints of other libraries lie beside the repository, in `shared/data`; without them their tests are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Case:
    """One real checkpoint with its truth, gathered by who made it."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "truth.json").read_text())
        with np.load(folder / "truth.npz") as found:
            self.truth = {name: found[name] for name in found.files}


@pytest.fixture
def megatron_case() -> Case:
    return Case(DATA / "megatron" / "legacy_tp2_pp2")


@pytest.fixture
def dcp_case() -> Case:
    return Case(DATA / "dcp" / "fsdp2_dp2_adamw")


@pytest.fixture
def hf_case() -> Case:
    return Case(DATA / "hf" / "llama_gqa_sharded")


@pytest.fixture
def plain_ddp() -> Case:
    return Case(DATA / "plain" / "ddp")


@pytest.fixture
def plain_single() -> Case:
    return Case(DATA / "plain" / "single")


@pytest.fixture(params=["single", "ddp"])
def plain_case(request: pytest.FixtureRequest) -> Case:
    return Case(DATA / "plain" / str(request.param))
