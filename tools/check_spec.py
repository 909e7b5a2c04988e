"""Holds spec/, its vectors and the code against each other: `python -m tools.check_spec`. Exit code 1: problems.

Identifiers are unique; every MUST has one; each is exercised by a vector (one that names a kind of error: by an invalid vector
of that kind), cited by a test, or listed in coverage.md;
what code and tests cite exists; a word has one meaning; kinds are those of errors.py, and spec/errors.md lists them; vectors
follow their schema and are what generators make.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tools import make_vectors

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
NORMATIVE = (
    "format-v1.md",
    "fragments-v1.md",
    "save-protocol.md",
    "save-beside-training.md",
    "runs-v1.md",
    "recovery-v1.md",
    "foreign-files.md",
    "cli.md",
    "language-v1.md",
)
PREFIXES = "UCF|FRAG|SAVE|RUN|REC|FOR|CLI|LANG"
DEFINED = re.compile(rf"\[((?:{PREFIXES})-\d+)(?: ([a-z-]+))?\]")
CITED = re.compile(rf"\[((?:(?:{PREFIXES})-\d+(?:\.\.\d+)?(?:, )?)+)\]")
ONE = re.compile(rf"({PREFIXES})-(\d+)(?:\.\.(\d+))?")
LISTED = re.compile(rf"^\| ((?:{PREFIXES})-\d+)(?: to (\d+))? \| (.+) \|$", re.MULTILINE)
MOST_CORE_WORDS, MOST_WORDS = 40, 20  # of the glossary, and of a document's own
HEAD = re.compile(r"^\| (?:term|word of this document) \| meaning \|\n", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def _without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and table rows of a document, without code and without its section Conventions."""
    section = ""
    for block in re.split(r"\n\s*\n|\n(?=[-|#] |\d+\. |\| )", _without_code(text)):
        heading = re.match(r"#+ (.+)", block)
        section = heading[1] if heading else section
        if section != "Conventions":
            yield " ".join(block.split())


class Check:
    """Collects problems; each method is one rule."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.kind_of: dict[str, str | None] = {}
        self.vectors: dict[str, dict[str, Any]] = {}

    def say(self, problem: str) -> None:
        self.problems.append(problem)

    def definitions(self) -> None:
        kinds = set(re.findall(r'^    kind(?:: ClassVar\[str\])? = "([a-z-]+)"', self._text("elastickpt/errors.py"), re.M))
        for name in NORMATIVE:
            for identifier, kind in DEFINED.findall(_without_code((SPEC / name).read_text())):
                if identifier in self.kind_of:
                    self.say(f"{name}: {identifier} is defined twice")
                if kind and kind not in kinds:
                    self.say(f"{name}: {identifier} names kind {kind!r}, which is not in errors.py")
                self.kind_of[identifier] = kind or None

    def kinds_are_those_of_the_code(self) -> None:
        code = set(re.findall(r'^    kind(?:: ClassVar\[str\])? = "([a-z-]+)"', self._text("elastickpt/errors.py"), re.M))
        listed = re.findall(r"^\| (?:· )*`([a-z-]+)` \|", (SPEC / "errors.md").read_text(), re.M)
        for kind in sorted(code ^ set(listed)):
            self.say(f"kind {kind!r} is in {'errors.py' if kind in code else 'spec/errors.md'} only")
        for kind in sorted({kind for kind in listed if listed.count(kind) > 1}):
            self.say(f"spec/errors.md: kind {kind!r} stands twice")

    def every_must_has_an_identifier(self) -> None:
        for name in NORMATIVE:
            for block in _blocks((SPEC / name).read_text()):
                for sentence in re.split(r"(?=\bMUST\b)", block)[1:]:
                    if not DEFINED.search(sentence):
                        self.say(f"{name}: a MUST without an identifier: ...{sentence[:80]}")

    def words(self) -> None:
        """A term has one meaning, in the glossary or in the document of its part."""
        seen: dict[str, str] = {}
        for path in sorted(SPEC.glob("*.md")):
            table = HEAD.split(path.read_text(), maxsplit=1)[-1].partition("\n\n")[0] if HEAD.search(path.read_text()) else ""
            terms = [term for term in re.findall(r"^\| (.+?) \| ", table, re.M) if term != "---"]
            core = path.name == "glossary.md"
            most = MOST_CORE_WORDS if core else MOST_WORDS
            if len(terms) > most:
                self.say(f"{path.name}: {len(terms)} words, expected at most {most}")
            for term in terms:
                if term in seen:
                    self.say(f"{path.name}: {term!r} has a meaning in {seen[term]} already")
                seen[term] = path.name

    def links(self) -> None:
        for path in SPEC.rglob("*.md"):
            for target in LINK.findall(_without_code(path.read_text())):
                if not (path.parent / target).exists():
                    self.say(f"spec/{path.relative_to(SPEC)}: link to {target}, which is not there")

    def vectors_are_generated(self) -> None:
        wanted = make_vectors.files()
        found = {path.relative_to(SPEC / "vectors").as_posix(): path for path in (SPEC / "vectors").rglob("*.json")}
        for name in sorted(set(wanted) ^ set(found)):
            self.say(f"spec/vectors/{name}: {'not made by a generator' if name in found else 'not committed'}")
        for name in sorted(set(wanted) & set(found)):
            if found[name].read_text() != wanted[name]:
                self.say(f"spec/vectors/{name}: differs from what its generator makes")
            elif name != make_vectors.INDEX:
                self.vectors[name] = json.loads(wanted[name])

    def vectors_follow_the_schema(self) -> None:
        schemas = {path.name: json.loads(path.read_text()) for path in (SPEC / "schemas").glob("*.json")}
        for name, schema in schemas.items():
            Draft202012Validator.check_schema(schema)
            if schema.get("$schema") != "https://json-schema.org/draft/2020-12/schema":
                self.say(f"spec/schemas/{name}: no $schema of 2020-12")
        validator = Draft202012Validator(schemas["vector.schema.json"])
        for name, vector in self.vectors.items():
            for error in validator.iter_errors(vector):
                self.say(f"spec/vectors/{name}: {error.message[:120]}")
            kinds = [self.kind_of.get(identifier) for identifier in vector["requires"]]
            if "error" in vector and vector["error"] not in kinds:
                self.say(f"spec/vectors/{name}: refused as {vector['error']}, but {vector['requires']} state {kinds}")
        valid = sum("expect" in vector for name, vector in self.vectors.items())
        if valid * 2 > len(self.vectors):
            self.say(f"{valid} of {len(self.vectors)} vectors are valid: invalid ones should outnumber them")

    def citations(self) -> set[str]:
        """Identifiers that tests cite. Problems: citations in code, tools and tests of what does not exist."""
        tested: set[str] = set()
        for folder in ("elastickpt", "tools", "tests"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                for found in CITED.findall(path.read_text()):
                    names = set(self._expanded(found, path))
                    tested |= names if folder == "tests" else set()
        return tested

    def _expanded(self, citation: str, path: Path) -> Iterator[str]:
        for prefix, first, last in ONE.findall(citation):
            numbers = range(int(first), int(last or first) + 1)
            names = [f"{prefix}-{number}" for number in numbers if f"{prefix}-{number}" in self.kind_of]
            if not names:
                self.say(f"{path.relative_to(ROOT)}: cites {prefix}-{first}, which no document defines")
            yield from names

    def coverage(self, tested: set[str]) -> None:
        exercised = {identifier for vector in self.vectors.values() for identifier in vector["requires"]}
        for name in sorted(exercised - set(self.kind_of)):
            self.say(f"vectors require {name}, which no document defines")
        listed: set[str] = set()
        for first, last, _ in LISTED.findall((SPEC / "coverage.md").read_text()):
            prefix, number = first.split("-")
            listed |= {f"{prefix}-{k}" for k in range(int(number), int(last or number) + 1)} & set(self.kind_of)
        refused = {name for vector in self.vectors.values() for name in vector["requires"] if self._refuses(vector, name)}
        covered = {name for name in exercised if not self.kind_of.get(name)} | refused | tested
        for name in sorted(set(self.kind_of) - covered - listed):
            missing = f"no invalid vector of kind {self.kind_of[name]}" if name in exercised else "no vector"
            self.say(f"{name}: {missing}, no test cites it, and coverage.md does not list it")
        for name in sorted(listed & covered):
            self.say(f"{name}: coverage.md lists it, but it is covered")

    def _refuses(self, vector: dict[str, Any], name: str) -> bool:
        return "error" in vector and vector["error"] == self.kind_of.get(name)

    def _text(self, path: str) -> str:
        return (ROOT / path).read_text()


def problems() -> list[str]:
    """All problems, one line each."""
    check = Check()
    check.definitions()
    check.kinds_are_those_of_the_code()
    check.every_must_has_an_identifier()
    check.words()
    check.links()
    check.vectors_are_generated()
    check.vectors_follow_the_schema()
    check.coverage(check.citations())
    return check.problems


def _report(found: Iterable[str]) -> int:
    listed = list(found)
    for problem in listed:
        print(problem)
    print(f"spec: {len(listed)} problems" if listed else "spec: no problems", file=sys.stderr)
    return 1 if listed else 0


if __name__ == "__main__":
    raise SystemExit(_report(problems()))
