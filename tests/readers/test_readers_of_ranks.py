"""What several real ranks wrote together is read by others, bit for bit: the golden checkpoint of four, and a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
import xxhash

import elastickpt as ek
from tools.gloo_ranks import run_ranks

SCRIPT = Path(__file__).with_name("plain_reader.py")
GOLDEN = Path(__file__).parent.parent / "golden" / "v1-by-0.1.0"
EXTENSION = ("bfloat16", "float8_e4m3fn", "float8_e5m2")

Truth = Mapping[str, tuple[list[int], str]]  # key of an array → its shape, and the digest of its bits in C order


def require_read(reader: str, tree: Path, truth: Truth, out: Path) -> None:
    """A reader in a process without elastickpt gives these bits and shapes."""
    command = [sys.executable, "-I", str(SCRIPT), reader, str(tree), str(out), *sorted(truth)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, Any] = json.loads(done.stdout)["arrays"]
    with np.load(out) as found:
        read = {key: (said[key][1], xxhash.xxh3_128_hexdigest(found[key].tobytes())) for key in truth}
    assert read == dict(truth)


def golden_truth() -> tuple[dict[str, tuple[list[int], str]], dict[str, str]]:
    """By key: the truth that was written down when the checkpoint was made; the data types."""
    noted = json.loads(GOLDEN.with_name(f"{GOLDEN.name}.truth.json").read_text())
    truth, types = {}, {}
    for identity, record in ek.open(GOLDEN).records.items():
        one = noted["/".join(part for part in (identity.item, identity.name, identity.state) if part)]
        truth[record.key], types[record.key] = (one["shape"], one["xxh3"]), record.spec.dtype
    assert len(truth) == len(noted)
    return truth, types


@pytest.mark.parametrize("reader", ["zarr_paths", "zarrs", "xarray_group", "tensorstore"])
def test_the_golden_checkpoint_of_four_ranks_is_read_bit_for_bit(tmp_path: Path, reader: str) -> None:
    """All of it by tensorstore, by the others what is not of a type that they lack (for xarray: in a group with one)."""
    truth, types = golden_truth()
    lacking = {key for key, dtype in types.items() if dtype in EXTENSION}
    if reader == "xarray_group":
        groups = {key.rpartition("/")[0] for key in lacking}
        lacking = {key for key in types if key.rpartition("/")[0] in groups}
    wanted = truth if reader == "tensorstore" else {key: one for key, one in truth.items() if key not in lacking}
    assert len(wanted) >= len(truth) - len(lacking) > len(truth) / 2
    assert any(len(record.writers) > 1 for record in ek.open(GOLDEN).records.values() if record.key in wanted)
    require_read(reader, GOLDEN, wanted, tmp_path / "out.npz")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """TP2 × FSDP2, uneven; its truth from the names of the arrays alone."""
    tree = tmp_path_factory.mktemp("ranks") / "c"
    run_ranks(layouts.save_at, 4, "tp2fsdp2", str(tree))
    truth = {}
    for identity, record in ek.open(tree).records.items():
        dtype = getattr(torch, record.spec.dtype)
        whole = layouts.dense(identity.name, identity.state, record.spec.shape, dtype)
        truth[record.key] = (list(whole.shape), xxhash.xxh3_128_hexdigest(whole.numpy().tobytes()))
    return tree, truth


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("reader", ["zarr_group", "zarr_paths", "zarrs", "xarray", "xarray_group", "tensorstore"])
def test_a_checkpoint_of_four_ranks_is_read_whole(fresh: tuple[Path, Truth], tmp_path: Path, reader: str) -> None:
    require_read(reader, *fresh, tmp_path / "out.npz")
