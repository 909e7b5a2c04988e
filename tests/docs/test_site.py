"""The site of documentation builds without a broken link, names all that is public, and its examples run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elastickpt as ek

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]


class Loader(list[int]):
    """A data loader with a position."""

    def state_dict(self) -> dict[str, object]:
        return {"position": 0}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert state == {"position": 0}


def names_of_a_script() -> dict[str, object]:
    """What the pages take for granted: a model with `layers.0.weight`, what trains it, and a loader."""
    model = torch.nn.Module()
    model.add_module("layers", torch.nn.ModuleList([torch.nn.Linear(4, 4)]))
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "loader": Loader([1, 2, 3]),
        "steps": 3,
        "train_step": lambda step: 1.0 / step if step else 2.0,
    }


def test_the_site_builds_without_a_broken_link_or_reference(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the tools of the site are not installed: pip install .[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text() for page in (tmp_path / "site" / "api").rglob("index.html"))
    assert [name for name in public_functions() if f'id="{name}"' not in pages] == []


def public_functions() -> list[str]:
    """Of the package and of `elastic`, by their full names."""
    found = [f"elastickpt.{name}" for name in ek.__all__ if inspect.isfunction(getattr(ek, name))]
    found += [f"elastickpt.elastic.{name}" for name in ek.elastic.__all__ if inspect.isfunction(getattr(ek.elastic, name))]
    of_checkfree = [name for name, one in vars(ek.elastic.checkfree).items() if inspect.isfunction(one) and name[0] != "_"]
    return [*found, *(f"elastickpt.elastic.checkfree.{name}" for name in of_checkfree)]


def test_the_reference_names_all_that_is_public() -> None:
    named = set(re.findall(r"^::: elastickpt\.(\w+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))
    assert named | {"elastic", "__version__"} == set(ek.__all__)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_a_script()
    if page.stem == "read-in-a-notebook":
        ek.save({key: names[key] for key in ("model", "scheduler", "optimizer")}, "out/step-1000")
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
