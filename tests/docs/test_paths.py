"""Every file that the pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "elastickpt"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "spec").glob("*.md")]
HISTORY = {"CHANGELOG.md"}  # what it names was there once
# A path of a module: below the root, or as `package/file.py` below elastickpt, or of a test below tests.
MODULE = re.compile(r"(?<![\w/.-])((?:[\w-]+/)+[\w-]+\.py)\b")
MADE_UP = ("my_", "your_")  # the reader's own


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_the_modules_that_a_page_names_exist(page: Path) -> None:
    places = (ROOT, PACKAGE, ROOT / "tests", page.parent)
    named = {name for name in MODULE.findall(page.read_text()) if not name.rpartition("/")[2].startswith(MADE_UP)}
    assert [name for name in sorted(named) if not any((place / name).is_file() for place in places)] == []


def test_the_pages_name_some() -> None:
    assert len({name for page in PAGES for name in MODULE.findall(page.read_text())}) > 50
