"""The texts of the programs and name maps that come with the package: files of the language. Parses nothing."""

from __future__ import annotations

from importlib.resources import files

from elastickpt.errors import Refused

_FOLDERS = {"programs": "program", "names": "name map"}


def programs() -> tuple[str, ...]:
    """Names of the shipped programs."""
    return _names("programs")


def name_maps() -> tuple[str, ...]:
    """Names of the shipped name maps."""
    return _names("names")


def program_text(name: str) -> str:
    """The text of a shipped program. Raises Refused for another name."""
    return _text("programs", name)


def names_text(name: str) -> str:
    """The text of a shipped name map. Raises Refused for another name."""
    return _text("names", name)


def config_text(name: str) -> str | None:
    """The template of `config.json` that goes with a shipped name map, if one does."""
    if name not in name_maps():
        return None
    template = files("elastickpt.language") / "names" / f"{name}.json"
    return template.read_text("utf-8") if template.is_file() else None


def purpose(name: str) -> str:
    """What a shipped name map says of itself in its first line."""
    return names_text(name).splitlines()[0].lstrip("# ")


def _names(folder: str) -> tuple[str, ...]:
    found = (files("elastickpt.language") / folder).iterdir()
    return tuple(sorted(one.name.removesuffix(".ucl") for one in found if one.name.endswith(".ucl")))


def _text(folder: str, name: str) -> str:
    known = _names(folder)
    if name not in known:
        raise Refused(f"{name!r} is no shipped {_FOLDERS[folder]}: expected one of {', '.join(known)}, or a file")
    return (files("elastickpt.language") / folder / f"{name}.ucl").read_text("utf-8")
