"""The files that transformers wants beside weights: copied from a folder, or made from constants."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elastickpt.convert.contents import Array, Contents
from elastickpt.errors import NotACheckpoint, Refused
from elastickpt.foreign.folder import open_folder
from elastickpt.language.shelf import config_text, name_maps

MAX_FILE_NBYTES = 64 << 20
CONFIG = "config.json"
_OF_ARRAYS: Mapping[str, Callable[[Array], object]] = {
    "rows": lambda one: one.node.shape[0],
    "columns": lambda one: one.node.shape[-1],
    "dtype": lambda one: one.node.dtype,
}
_LEFT = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")


def config_files(
    folder: str | None, names: tuple[str, ...], contents: Contents, facts: Mapping[str, object]
) -> dict[str, bytes]:
    """Name → content.

    `folder` is `--config`: all of it but weights. Else `config.json` is what the source has of transformers, or is made from
    constants by the template of the last name map that has one, or of another map, whose names are there; without any there
    is none. Raises NotACheckpoint for a folder without `config.json`, Refused for constants that are missing, naming them.
    """
    if folder is not None:
        return _copied(folder)
    config = contents.values.get("/config")
    if isinstance(config, dict) and "model_type" in config:
        return {CONFIG: _text(config)}
    for name in templates_for(names):
        template = json.loads(config_text(name) or "{}")
        wanted = template.pop("requires", {})
        filling = _Filling(contents, facts)
        made = filling.fill(template)
        if filling.lacking and name in names:
            raise Refused(f"{CONFIG} says the size of {filling.lacking[0]}, which is not written: give --config DIR")
        if not filling.lacking:
            _require(wanted, facts, name)
            if filling.missing:
                lacks = ", ".join(filling.missing)
                raise Refused(f"{CONFIG} needs {lacks}, which no file states: give --config DIR, or --set KEY=VALUE")
            return {CONFIG: _text(made)}
    return {CONFIG: _text(config)} if isinstance(config, dict) else {}


def _require(wanted: Mapping[str, object], facts: Mapping[str, object], name: str) -> None:
    """Raises Refused where the source states something else than every model of the family is like."""
    for constant, value in wanted.items():
        if facts.get(constant) not in (None, value):
            said = f"{constant} is {facts[constant]!r}, and the models of {name} have {value!r}"
            raise Refused(f"{CONFIG} cannot say it: {said}; give --config DIR where it is no difference")


def templates_for(names: tuple[str, ...]) -> list[str]:
    """The maps whose templates may fit what is written: the last given one that has one, else all that have one."""
    if not names:
        return []
    own = next((name for name in reversed(names) if config_text(name) is not None), None)
    return [own] if own is not None else [name for name in name_maps() if config_text(name) is not None]


def constants_in(template: object) -> set[str]:
    """The constants that a template asks for."""
    if not isinstance(template, dict):
        return set()
    inner = {one for value in template.values() for one in constants_in(value)}
    return inner | {*template.get("of", ()), *template.get("when", ())}


def require_agreement(template: object, facts: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Raises Refused where the source states otherwise, under any of its names, what is given for a template."""
    if not isinstance(template, dict):
        return
    for name in (name for name in template.get("of", ()) if name in given):
        other = next((one for one in template["of"] if facts.get(one) not in (None, given[name])), None)
        if other is not None:
            raise Refused(f"--set {name}={given[name]}: the source states {other} {facts[other]!r}")
    for value in template.values():
        require_agreement(value, facts, given)


def _text(config: object) -> bytes:
    return json.dumps(config, indent=2).encode() + b"\n"


def _copied(folder: str) -> dict[str, bytes]:
    at = open_folder(folder)
    found = {
        entry.name: at.store.read(entry.name, MAX_FILE_NBYTES)
        for entry in at.entries()
        if entry.kind == "file" and not entry.name.endswith(_LEFT)
    }
    if CONFIG not in found:
        raise NotACheckpoint(f"--config {folder}: expected {CONFIG} there, found {', '.join(found) or 'nothing'}")
    return found


@dataclass(slots=True)
class _Filling:
    """Fills a template: {"of": constants, "else": default}, {"when": constants, "then": ..., "else": ...}, and of what is
    written {"rows" | "columns" | "dtype": names} and {"has": names, "then": ..., "else": ...}.
    """

    contents: Contents
    facts: Mapping[str, object]
    missing: list[str]
    lacking: list[str]

    def __init__(self, contents: Contents, facts: Mapping[str, object]) -> None:
        self.contents, self.facts, self.missing, self.lacking = contents, facts, [], []

    def fill(self, template: object) -> object:
        if not isinstance(template, dict):
            return template
        if "of" in template:
            found = [self.facts[name] for name in template["of"] if self.facts.get(name) is not None]
            if found:
                return found[0]
            if "else" not in template:
                self.missing.append(" or ".join(template["of"]))
            return template.get("else")
        if "when" in template:
            return self.fill(template["then" if any(self.facts.get(name) for name in template["when"]) else "else"])
        if "has" in template:
            there = {one.id.name for one in self.contents.arrays.values()}
            return self.fill(template["then" if there & set(template["has"]) else "else"])
        if template.keys() & _OF_ARRAYS.keys():
            return self._of_array(template)
        return {key: self.fill(one) for key, one in template.items()}

    def _of_array(self, template: Mapping[str, object]) -> object:
        ((what, names),) = template.items()
        for one in self.contents.arrays.values():
            if isinstance(names, list) and one.id.name in names and one.id.state == "value":
                return _OF_ARRAYS[what](one)
        self.lacking.append(" or ".join(names if isinstance(names, list) else []))
        return None
