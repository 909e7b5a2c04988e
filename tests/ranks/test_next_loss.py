"""After a load the next steps are those of the run that was saved: bitwise at the same layout, to rounding at another."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import CASES
from next_steps import DTYPES, resume, train_and_save

from tools.gloo_ranks import run_ranks

pytestmark = pytest.mark.ranks

LIMIT_S = 300.0  # of one launch, which may resume twelve checkpoints twice on a busy machine
SAME_ARITHMETIC = ({"ddp2", "fsdp2"},)  # the same rows on each rank, and a mean over two


def _next_losses(root: Path, sources: tuple[str, ...], targets: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Three losses after the save, in these dtypes, with every target that resumes every source."""
    expected = {}
    for source in sources:
        every = run_ranks(train_and_save, CASES[source].world, source, str(root / source), labels, timeout_s=LIMIT_S)
        assert every == every[:1] * len(every)
        expected[source] = every[0]
        for losses in expected[source].values():
            assert len(set(losses)) == 3  # the steps do change the model
    for target in targets:
        folders = [str(root / source) for source in sources]
        every = run_ranks(resume, CASES[target].world, target, folders, labels, timeout_s=LIMIT_S)
        assert every == every[:1] * len(every)
        for source in sources:
            found = every[0][str(root / source)]
            assert found.keys() == set(labels)
            if target == source or {target, source} in SAME_ARITHMETIC:
                assert found == expected[source], (source, target)
            for label, losses in found.items():
                assert losses == pytest.approx(expected[source][label], rel=1e-6, abs=0), (source, target, label)


def test_the_next_losses_are_those_of_the_saved_run(tmp_path: Path) -> None:
    """The fast form: saved sharded, and from a pipeline of sharded stages."""
    _next_losses(tmp_path, ("fsdp2", "pp2fsdp2"), ("single", "ddp2", "fsdp2", "tp4", "pp2fsdp2"), ("float32",))


@pytest.mark.long
def test_the_next_losses_are_those_of_the_saved_run_between_all_layouts(tmp_path: Path) -> None:
    """All 144 ordered pairs."""
    _next_losses(tmp_path, tuple(CASES), tuple(CASES), tuple(DTYPES))


def test_losses_tell_what_was_not_loaded(tmp_path: Path) -> None:
    """The comparison can fail: without the optimizer's state the first loss is right and the next are not."""
    folder = str(tmp_path / "single")
    expected = run_ranks(train_and_save, 1, "single", folder, ("float32",))[0]["float32"]
    found = run_ranks(resume, 1, "single", [folder], ("float32",), ("model",))[0][folder]["float32"]
    assert found[0] == expected[0]
    assert found[1:] != pytest.approx(expected[1:], rel=1e-6, abs=0)
