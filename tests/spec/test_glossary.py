"""The words of the specification: few, and each with one meaning."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

SPEC = Path(__file__).parents[2] / "spec"
PARTS = ("format-v1.md", "save-protocol.md", "save-beside-training.md", "runs-v1.md", "language-v1.md")


def words_of(name: str, head: str) -> list[str]:
    table = (SPEC / name).read_text().partition(f"| {head} | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    return re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)


def test_the_core_has_at_most_forty_words_and_each_part_twenty() -> None:
    core = words_of("glossary.md", "term")
    assert 20 < len(core) <= 40
    for part in PARTS:
        assert 0 < len(words_of(part, "word of this document")) <= 20, part


def test_a_word_is_explained_once() -> None:
    counts = Counter(words_of("glossary.md", "term"))
    for part in PARTS:
        counts.update(words_of(part, "word of this document"))
    assert [word for word, count in counts.items() if count > 1] == []
