"""The specification quotes the grammar; names of tensors stand in files of the language and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from elastickpt.language.parse import grammar_text, parse
from elastickpt.language.shelf import name_maps, names_text, program_text, programs

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "spec" / "language-v1.md").read_text()


def test_the_specification_quotes_the_grammar() -> None:
    assert f"```\n{grammar_text().rstrip()}\n```" in SPEC


def test_the_examples_of_the_specification_are_programs() -> None:
    examples = [text for text in re.findall(r"```\n(.*?)```", SPEC, re.DOTALL) if text.startswith("ucl 1")]
    assert len(examples) == 2
    for text in examples:
        assert parse(text).version == 1


def test_no_name_of_a_tensor_stands_in_python() -> None:
    texts = [*(program_text(name) for name in programs()), *(names_text(name) for name in name_maps())]
    names = {
        part for text in texts for part in re.findall(r"[a-z]\w*(?:_proj|_layernorm|norm|_fc\d|_qkv|_embeddings|_attn)\b", text)
    }
    assert {"linear_qkv", "q_proj", "input_layernorm"} <= names
    found = [
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("language", "convert", "foreign")
        for path in sorted((ROOT / "elastickpt" / folder).rglob("*.py"))
        for name in names
        if re.search(rf"\b{name}\b", path.read_text())
    ]
    assert found == []
