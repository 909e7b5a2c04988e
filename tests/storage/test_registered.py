"""Stores of other packages, found by their entry point in every process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.errors import Refused
from elastickpt.saving.async_save import close_all
from elastickpt.storage.opening import STORES, open_store

CODE = """
from pathlib import Path

from elastickpt.storage.local import LocalStore


class Mine(LocalStore):
    def __init__(self, url):
        super().__init__(url.removeprefix("mine://"))

    @property
    def url(self):
        return "mine://" + str(Path(super().url.removeprefix("file://")))
"""


def install(folder: Path, name: str, *, module: str, scheme: str) -> None:
    """A package as pip leaves it behind."""
    (folder / f"{module}.py").write_text(CODE)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{STORES}]\n{scheme} = {module}:Mine\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))  # of writer processes
    close_all()  # a writer process that another test started knows no package that came later
    yield folder
    close_all()


def test_a_registered_store_is_saved_to_and_loaded_from_also_by_a_writer_process(tmp_path: Path, packages: Path) -> None:
    install(packages, "mine", module="a_store_of_mine", scheme="mine")
    root = tmp_path / "root"
    root.mkdir()
    assert type(open_store(f"mine://{root}")).__module__ == "a_store_of_mine"
    state = {"t": torch.arange(6.0)}
    ek.save(state, f"mine://{root}/blocking")
    ek.async_save(state, f"mine://{root}/beside").result()
    for name in ("blocking", "beside"):
        found = {"t": torch.zeros(6)}
        ek.load(found, f"mine://{root}/{name}")
        assert found["t"].tolist() == list(range(6))
        assert (root / name / "checkpoint.json").exists()
    sys.modules.pop("a_store_of_mine", None)


def test_a_scheme_that_two_packages_register_is_refused(packages: Path) -> None:
    install(packages, "mine", module="a_store_of_mine", scheme="twice")
    install(packages, "yours", module="a_store_of_yours", scheme="twice")
    with pytest.raises(Refused, match=r"twice://: expected one package .* a_store_of_mine:Mine, a_store_of_yours:Mine"):
        open_store("twice://x")
