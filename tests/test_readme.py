"""The README's example runs, and its first lines say what they must."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.ledger.branch import history

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with a model whose parameters have the name that they read; the two ways to save get a path each."""
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = torch.nn.Module()
    model.add_module("layers", torch.nn.ModuleList([torch.nn.Module()]))
    model.layers[0].add_module("attn", torch.nn.Module())  # type: ignore[index,union-attr]
    model.layers[0].attn.add_module("wq", torch.nn.Linear(16, 16, bias=False))  # type: ignore[index,union-attr]
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    names: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    exec(first, names | {"steps": 5, "train_step": lambda step: 1.0 / (step + 1)})
    assert [entry.step for entry in history("runs/llama")] != []
    names["state"] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": ek.RNG()}
    exec(
        "import elastickpt as ek\n" + second.replace('async_save(state, "out/step-1000"', 'async_save(state, "out/again"'),
        names,
    )
    assert names["report"].step == 1000  # type: ignore[attr-defined]
    assert names["ckpt"].verify().problems == ()  # type: ignore[attr-defined]


def test_the_first_forty_lines_say_it_all() -> None:
    head = "\n".join(README.splitlines()[:40])
    for wanted in (
        "pip install",
        "ek.Run(",
        "run.restore()",
        "run.save(",
        "Atomic and durable",
        "spec/README.md",
        "does not do yet",
    ):
        assert wanted in head


def test_links_point_to_files_of_the_project() -> None:
    root = Path(__file__).parent.parent
    for page in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#:]+)\)", (root / page).read_text())
        assert len(links) > 3
        assert [link for link in links if not (root / link).exists()] == []


def test_the_pages_for_whoever_carries_on_stay_short() -> None:
    """Two pages and one, of 66 lines: what grows longer is read by nobody."""
    root = Path(__file__).parent.parent
    lengths = {page: len((root / page).read_text().splitlines()) for page in ("ARCHITECTURE.md", "CONTRIBUTING.md")}
    assert lengths["ARCHITECTURE.md"] <= 132
    assert lengths["CONTRIBUTING.md"] <= 66
