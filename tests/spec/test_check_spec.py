"""The check of the specification finds each kind of fault."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import check_spec

ROOT = Path(__file__).parent.parent.parent

NEW = "UCF-149"  # in brackets only in the copy: a citation in a test counts
QUIET = "UCF-42"  # in valid vectors only; not in brackets here for the same reason


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "spec"
    shutil.copytree(ROOT / "spec", copy)
    monkeypatch.setattr(check_spec, "SPEC", copy)
    return copy


def _edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("format-v1.md", "[UCF-44 malformed]", "[UCF-43 malformed]", "UCF-43 is defined twice"),
        ("format-v1.md", "[UCF-44 malformed]", "[UCF-44 malformd]", "names kind 'malformd'"),
        ("format-v1.md", " [UCF-7]", "", "a MUST without an identifier"),
        ("format-v1.md", "[UCF-44 malformed]", "[UCF-448 malformed]", "cites UCF-44, which no document defines"),
        ("format-v1.md", " [UCF-7]", f" [UCF-7] It MUST last. [{NEW}]", "UCF-149: no vector"),
        ("coverage.md", "| UCF-70 | ", "| UCF-71 | ", "UCF-70: no vector"),
        ("format-v1.md", f" [{QUIET}]", f" [{QUIET} malformed]", "UCF-42: no invalid vector of kind malformed"),
        ("coverage.md", "| UCF-70 | ", "| UCF-70 to 71 | ", "UCF-71: coverage.md lists it, but it is covered"),
        ("errors.md", "`no-space`", "`no-room`", "kind 'no-space' is in errors.py only"),
        ("errors.md", "`no-space`", "`no-room`", "kind 'no-room' is in spec/errors.md only"),
        ("glossary.md", "| array |", "| attempt |", "'attempt' has a meaning in glossary.md already"),
        ("glossary.md", "| array |", "".join(f"| {k} | x |\n" for k in range(9)) + "| array |", "words, expected at most 40"),
        ("runs-v1.md", "| claim |", "| stage |", "'stage' has a meaning in"),
        ("runs-v1.md", "| claim |", "".join(f"| {k} | x |\n" for k in range(20)) + "| claim |", "expected at most 20"),
        ("README.md", "](cli.md)", "](clu.md)", "link to clu.md"),
        ("vectors/boxes/corner.json", "corner", "corners", "differs from what its generator makes"),
        ("schemas/vector.schema.json", '"minProperties": 1', '"minProperties": 9', "does not have enough properties"),
        ("format-v1.md", "[UCF-74 checksum-mismatch]", "[UCF-74 malformed]", "refused as checksum-mismatch, but"),
    ],
)
def test_a_fault_is_a_problem(spec: Path, name: str, old: str, new: str, problem: str) -> None:
    _edited(spec / name, old, new)
    assert any(problem in one for one in check_spec.problems())


def test_a_vector_that_nobody_makes_is_a_problem(spec: Path) -> None:
    (spec / "vectors/boxes/mine.json").write_text("{}")
    (spec / "vectors/boxes/corner.json").unlink()
    problems = check_spec.problems()
    assert any("mine.json: not made by a generator" in one for one in problems)
    assert any("corner.json: not committed" in one for one in problems)
