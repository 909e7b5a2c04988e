"""What a conversion is, in words, so that the same one is known again: its source, its programs, its options. [CLI-67]"""

from __future__ import annotations

from collections.abc import Iterable

from elastickpt.convert.conversion import Conversion, names_of, shown_program, target_program
from elastickpt.convert.options import Options
from elastickpt.format.digest import file_digest
from elastickpt.format.version import RELEASE
from elastickpt.language.printer import print_program


def description_of(conversion: Conversion, written: Iterable[object]) -> dict[str, str]:
    """Name of a fact → the fact. `written` decides where bytes go. How many workers share the work is no part of it."""
    options, source = conversion.options, conversion.source
    found = {"release": RELEASE, "SOURCE": f"{source.format} at {source.url}"}
    found |= {f"file {path}": stamp for path, stamp in source.files}
    found |= {f"option --{name}": value for name, value in _given(options)}
    found["option --to"] = conversion.target
    programs = [("the program of SOURCE", shown_program(conversion)), ("the program of OUT", target_program(conversion))]
    programs += [(f"name map {name}", names_of(name)) for name in options.names]
    found |= {name: _digest(print_program(program)) for name, program in programs if program is not None}
    found["what is written"] = _digest("\n".join(map(repr, written)))
    return found


def _given(options: Options) -> Iterable[tuple[str, str]]:
    """Options that change what is written, as they are told."""
    yield "step", str(options.step)
    yield "set", _pairs({**options.constants, **options.settings})
    yield "mesh", _pairs(options.mesh)
    yield "names", " then ".join(options.names)
    yield "only", " ".join(options.only)
    yield "skip", " ".join(options.skip)
    yield "cast", _pairs(options.casts)
    yield "weights", str(options.weights)
    yield "config", str(options.config)
    yield "shard-size", str(options.shard_nbytes)


def _pairs(given: object) -> str:
    return ",".join(f"{name}={value}" for name, value in given.items()) if isinstance(given, dict) else str(given)


def _digest(text: str) -> str:
    return file_digest(text.encode())
