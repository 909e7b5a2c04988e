"""Save at one layout, load at any other: bitwise, between real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import CASES, load_at, save_at

from tools.gloo_ranks import run_ranks

SAMPLE = ("single", "hsdp2x2", "tp4", "tp2fsdp2", "pp2fsdp2")


def _all_pairs(root: Path, names: tuple[str, ...], packed: tuple[str, ...]) -> None:
    """Every layout's plain checkpoint into every layout, and of some the packed one. These are also saved again: packed where
    the plain one was loaded, and plain where that was loaded, at the next layout."""
    for name in names:
        second = str(root / f"{name}-packed") if name in packed else ""
        run_ranks(save_at, CASES[name].world, name, str(root / f"{name}-plain"), second)
    paths = [str(root / f"{name}-plain") for name in names] + [str(root / f"{name}-packed") for name in packed]
    saved: list[str] = []  # by the layout before
    for at in names:
        through = {str(root / f"{name}-plain"): (str(root / f"{name}-by-{at}-packed"), "packed") for name in packed}
        through |= {path: (path.removesuffix("packed") + "plain", "plain") for path in saved}
        wrong = run_ranks(load_at, CASES[at].world, at, [*paths, *saved], through)
        assert wrong == [{path: [] for path in (*paths, *saved)}] * CASES[at].world
        saved = [str(root / f"{name}-by-{at}-packed") for name in packed]


@pytest.mark.ranks
def test_a_sample_of_layouts_loads_bitwise_into_each_other(tmp_path: Path) -> None:
    """The fast form: five layouts that have every kind of split between them, 25 ordered pairs, and 10 of packs."""
    _all_pairs(tmp_path, SAMPLE, ("tp2fsdp2", "hsdp2x2"))


@pytest.mark.ranks
@pytest.mark.long
def test_every_layout_loads_bitwise_into_every_other(tmp_path: Path) -> None:
    """All 144 ordered pairs of each placement."""
    _all_pairs(tmp_path, tuple(CASES), tuple(CASES))
