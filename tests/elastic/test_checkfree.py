"""CheckFree's formula, counterparts and sources: to the bit against vectors that numpy made. [REC-1..7]"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastickpt.elastic import checkfree
from elastickpt.errors import Refused

VECTORS = Path(__file__).parent.parent.parent / "spec" / "vectors" / "checkfree"


def number(bits: str) -> float:
    return float(struct.unpack("<d", bytes.fromhex(bits))[0])


def elements(dtype: str, bits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(bits), dtype=torch.uint8).view(getattr(torch, dtype)).clone()


def stage(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["operation"] == "alpha":
        x, y = (None if bits is None else number(bits) for bits in asked["norms"])
        return {"alpha": struct.pack("<d", checkfree.alpha(x, y, weighting=asked["weighting"])).hex()}
    if asked["operation"] == "average":
        before, after = ({"w": elements(asked["dtype"], asked[side])} for side in ("before", "after"))
        made = checkfree.average(before, after, number(asked["alpha"]))["w"]
        return {"elements": made.view(torch.uint8).numpy().tobytes().hex()}
    if asked["operation"] == "match":
        pairs = checkfree.match(stage(asked["lost"]), stage(asked["before"]), stage(asked["after"]))
        return {"pairs": {name: list(pair) for name, pair in pairs.items()}}
    if asked["operation"] == "partner":
        return {"partners": [checkfree.partner(stage, asked["stages"]) for stage in range(asked["stages"])]}
    found = checkfree.sources(set(asked["lost"]), stages=asked["stages"], swap=asked["swap"])
    return {"sources": {str(lost): list(sources) for lost, sources in found.items()}}


@pytest.mark.parametrize("path", sorted(VECTORS.glob("valid/*.json")), ids=lambda path: path.stem)
def test_vectors(path: Path) -> None:
    vector = json.loads(path.read_text())
    assert answer(vector["input"]) == vector["expect"]


@pytest.mark.parametrize("path", sorted(VECTORS.glob("invalid/*.json")), ids=lambda path: path.stem)
def test_what_is_refused(path: Path) -> None:
    with pytest.raises(Refused):
        answer(json.loads(path.read_text())["input"])


@given(
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=20),
)
def test_an_average_is_numpys_to_the_bit(x: float, y: float, pairs: list[tuple[float, float]]) -> None:
    """Odd sizes and short ones take other vector paths in torch than round ones: none fuses the product with the sum."""
    share = checkfree.alpha(x, y)
    before, after = (np.array([pair[side] for pair in pairs], np.float32) for side in (0, 1))
    wanted = before * np.float32(share) + after * np.float32(np.float64(1) - np.float64(share))
    made = checkfree.average({"w": torch.from_numpy(before)}, {"w": torch.from_numpy(after)}, share)["w"]
    assert made.numpy().tobytes() == wanted.tobytes()


@given(st.floats(0, allow_infinity=False), st.floats(0, allow_infinity=False), st.sampled_from(["norm", "norm2"]))
def test_shares_of_both_sides_are_one_whole(x: float, y: float, weighting: Any) -> None:
    one, other = checkfree.alpha(x, y, weighting=weighting), checkfree.alpha(y, x, weighting=weighting)
    assert 0 <= one <= 1
    assert math.isclose(one + other, 1.0, abs_tol=1e-12)


def test_inputs_stay_and_results_share_nothing_with_them() -> None:
    before = {"w": torch.nn.Parameter(torch.ones(3)), "n": torch.tensor([1, 2])}
    after = {"w": torch.nn.Parameter(torch.zeros(3)), "n": torch.tensor([3, 4])}
    made = checkfree.average(before, after, 1.0)
    made["w"].fill_(9)
    made["n"].fill_(9)
    assert not made["w"].requires_grad
    assert before["w"].tolist() == [1, 1, 1]
    assert before["n"].tolist() == [1, 2]
    assert after["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)],
    ids=["sparse", "quantised"],
)
def test_what_is_not_dense_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(Refused, match="'codes'"):
        checkfree.average({"codes": tensor}, {"codes": tensor}, 0.5)


def test_names_that_one_side_lacks_are_refused() -> None:
    one = {"w": torch.ones(1)}
    with pytest.raises(Refused, match=r"'w'.*after"):
        checkfree.average(one, {}, 0.5)
    with pytest.raises(Refused, match=r"'w'.*before"):
        checkfree.average({}, one, 0.5)


def test_matching_names_the_first_that_differs() -> None:
    lost = {"h.2.a": torch.zeros(2), "h.2.b": torch.zeros(2)}
    other = {"h.0.a": torch.zeros(2), "h.0.b": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(Refused, match=r"after the lost one: 'h\.0\.b' is bfloat16 \(2,\), expected float32"):
        checkfree.match(lost, lost, other)


def test_a_stage_that_is_none_is_refused() -> None:
    with pytest.raises(Refused, match="stage 6"):
        checkfree.sources({6}, stages=6, swap=None)
