"""Vectors of CheckFree: weights and averages to the bit, by numpy and ml_dtypes; counterparts and sources by hand."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from tools.vector_kit.kit import Json, Vector

_TYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


def _bits(value: float) -> str:
    return struct.pack("<d", value).hex()


def _share(x: float | None, y: float | None, weighting: str) -> float:
    if x is None or y is None or weighting == "uniform":
        return 0.5
    with np.errstate(all="ignore"):
        one, other, eps = np.float64(x), np.float64(y), np.float64(1e-4)
        if weighting == "norm2":
            one, other = one * one, other * other
        total = one + other
        if not np.isfinite(total):
            return 0.5
        return float((one + eps) / (total + np.float64(2) * eps))


_WEIGHTS: tuple[tuple[str, str, float | None, float | None, str], ...] = (
    ("alpha-norm", "The published rule: norms, not their squares.", 3.0, 1.0, "norm"),
    ("alpha-clipped", "Both norms clipped to 1: exactly one half.", 1.0, 1.0, "norm"),
    ("alpha-thirds", "Rounds in binary64.", 1 / 3, 0.7, "norm"),
    ("alpha-squares", "The paper's text: squares, ε added to them.", 3.0, 1.0, "norm2"),
    ("alpha-zeros", "Two stages without gradient.", 0.0, 0.0, "norm"),
    ("alpha-one-zero", "ε keeps a share for a stage without gradient.", 0.0, 2.0, "norm"),
    ("alpha-unknown", "One norm is not known.", None, 2.0, "norm"),
    ("alpha-infinite", "A norm that is not finite.", math.inf, 2.0, "norm"),
    ("alpha-overflow", "The sum of two finite norms overflows.", 1e308, 1e308, "norm"),
    ("alpha-square-overflow", "The square overflows.", 1e200, 1.0, "norm2"),
    ("alpha-uniform", "Norms do not count.", 3.0, 1.0, "uniform"),
)


def _weights() -> Iterator[Vector]:
    for name, about, x, y, weighting in _WEIGHTS:
        norms = [None if norm is None else _bits(norm) for norm in (x, y)]
        inputs = {"operation": "alpha", "norms": norms, "weighting": weighting}
        yield Vector("checkfree", name, about, ("REC-1",), inputs, expect={"alpha": _bits(_share(x, y, weighting))})
    for name, about, x, y, weighting in (
        ("alpha-negative", "A negative norm.", -1.0, 1.0, "norm"),
        ("alpha-weighting", "A weighting that is none.", 1.0, 1.0, "square"),
    ):
        inputs = {"operation": "alpha", "norms": [_bits(x), _bits(y)], "weighting": weighting}
        yield Vector("checkfree", name, about, ("REC-2",), inputs, error="refused")


def _averages() -> Iterator[Vector]:
    draw = np.random.default_rng(2506)
    for dtype, kind in _TYPES.items():
        wide: Json = np.float64 if dtype == "float64" else np.float32
        before, after = (draw.normal(size=8).astype(kind) for _ in range(2))
        share = _share(1 / 3, 0.7, "norm")
        one, other = wide(share), wide(np.float64(1) - np.float64(share))
        mixed = (before.astype(wide) * one + after.astype(wide) * other).astype(kind)
        yield _average(
            f"average-{dtype}", f"Elements of {dtype}: two products, one sum, one cast.", dtype, before, after, share, mixed
        )
    whole = np.array([1, -2, 3], np.int64)
    yield _average("average-int64", "Integers are those of the stage before.", "int64", whole, whole[::-1], 0.25, whole)
    yield _average(
        "average-infinite",
        "What is not finite stays so; it is not for the average to judge.",
        "float32",
        np.array([np.inf, 1, np.nan], np.float32),
        np.array([1, 2, 3], np.float32),
        0.5,
        np.array([np.inf, 1.5, np.nan], np.float32),
    )
    for name, about, dtype, share in (
        ("average-complex", "Complex numbers.", "complex64", 0.5),
        ("average-share-above-one", "A share above 1.", "float32", 1.5),
        ("average-share-nan", "A share that is no number.", "float32", math.nan),
    ):
        data = np.ones(2, dtype)
        inputs = _average(name, about, dtype, data, data, share, data).input
        yield Vector("checkfree", name, about, ("REC-5",), inputs, error="refused")


def _average(name: str, about: str, dtype: str, before: Json, after: Json, share: float, mixed: Json) -> Vector:
    inputs = {
        "operation": "average",
        "dtype": dtype,
        "before": before.tobytes().hex(),
        "after": after.tobytes().hex(),
        "alpha": _bits(share),
    }
    return Vector("checkfree", name, about, ("REC-4",), inputs, expect={"elements": mixed.tobytes().hex()})


_LAYERS: Json = {"h.2.w": [2, 3], "h.3.w": [2, 3], "h.2.b": [3]}


def _matches() -> Iterator[Vector]:
    inputs = {
        "operation": "match",
        "lost": {"layers.10.w": [2], "layers.9.w": [2]},
        "before": {"layers.7.w": [2], "layers.8.w": [2]},
        "after": {"layers.12.w": [2], "layers.11.w": [2]},
    }
    pairs = {"layers.10.w": ["layers.8.w", "layers.12.w"], "layers.9.w": ["layers.7.w", "layers.11.w"]}
    about = "In the order of numbers, which is not that of text."
    yield Vector("checkfree", "match-numbers", about, ("REC-3",), inputs, expect={"pairs": pairs})
    for name, about, before in (
        ("match-depth", "The stage before has one layer less.", {"h.0.w": [2, 3], "h.0.b": [3]}),
        ("match-depth-more", "The stage before has one layer more.", {f"h.{k}.w": [2, 3] for k in range(3)} | {"h.0.b": [3]}),
        ("match-shape", "A tensor of another shape.", {"h.0.w": [2, 3], "h.1.w": [3, 2], "h.0.b": [3]}),
        ("match-name", "A tensor of another name.", {"h.0.w": [2, 3], "h.1.w": [2, 3], "h.0.bias": [3]}),
    ):
        after = {"h.4.w": [2, 3], "h.5.w": [2, 3], "h.4.b": [3]}
        inputs = {"operation": "match", "lost": _LAYERS, "before": before, "after": after}
        yield Vector("checkfree", name, about, ("REC-3",), inputs, error="refused")


def _stages() -> Iterator[Vector]:
    for name, about, stages, partners in (
        ("partner-6", "Six stages.", 6, [1, 0, None, None, 5, 4]),
        ("partner-4", "Four stages are two pairs.", 4, [1, 0, 3, 2]),
        ("partner-3", "Two pairs of three stages would share one.", 3, [None, None, None]),
    ):
        yield Vector(
            "checkfree", name, about, ("REC-6",), {"operation": "partner", "stages": stages}, expect={"partners": partners}
        )
    cases: tuple[tuple[str, str, list[int], str | None, dict[str, list[int]]], ...] = (
        ("sources-middle", "Both neighbours.", [2], None, {"2": [1, 3]}),
        ("sources-end", "A first stage without swap has none.", [0, 5], None, {"0": [], "5": []}),
        ("sources-swap", "A stage of an end pair has its partner only.", [1, 4], "microbatch", {"1": [0], "4": [5]}),
        ("sources-adjacent", "Two adjacent ones.", [2, 3], None, {"2": [], "3": []}),
        ("sources-adjacent-swap", "One of two adjacent ones has a partner.", [1, 2], "step", {"1": [0], "2": []}),
        ("sources-apart", "Two apart share a source.", [1, 3], None, {"1": [0, 2], "3": [2, 4]}),
    )
    for name, about, lost, swap, found in cases:
        inputs = {"operation": "sources", "stages": 6, "lost": lost, "swap": swap}
        yield Vector("checkfree", name, about, ("REC-7",), inputs, expect={"sources": found})


def vectors() -> Iterator[Vector]:
    for vector in (*_weights(), *_averages(), *_matches(), *_stages()):
        folder = "checkfree/valid" if vector.error is None else "checkfree/invalid"
        yield Vector(folder, vector.name, vector.about, vector.requires, vector.input, vector.expect, vector.error)
