"""Save at one layout, load at any other: bitwise, between real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import CASES, load_at, save_at

from elastickpt.testing.ranks import run_ranks

SAMPLE = ("single", "hsdp2x2", "tp4", "tp2fsdp2", "pp2fsdp2")


def _all_pairs(root: Path, names: tuple[str, ...]) -> None:
    paths = {name: str(root / name) for name in names}
    for name, path in paths.items():
        run_ranks(save_at, CASES[name].world, name, path)
    for name in names:
        wrong = run_ranks(load_at, CASES[name].world, name, list(paths.values()))
        assert wrong == [{path: [] for path in paths.values()}] * CASES[name].world


@pytest.mark.ranks
def test_a_sample_of_layouts_loads_bitwise_into_each_other(tmp_path: Path) -> None:
    """The fast form: five layouts that have every kind of split between them, 25 ordered pairs."""
    _all_pairs(tmp_path, SAMPLE)


@pytest.mark.ranks
@pytest.mark.long
def test_every_layout_loads_bitwise_into_every_other(tmp_path: Path) -> None:
    """All 144 ordered pairs."""
    _all_pairs(tmp_path, tuple(CASES))
