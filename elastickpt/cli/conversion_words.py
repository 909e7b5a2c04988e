"""Words of the command line that conversions share: KEY=VALUE, AXIS=N, sizes."""

from __future__ import annotations

import argparse
import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_FLOAT = re.compile(r"[0-9]+\.[0-9]*(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def constant(text: str) -> tuple[str, int | tuple[int, ...]]:
    """`vocab=101`, or `stages=2,0,3`."""
    name, value = number(text)
    if isinstance(value, float):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return name, value


def number(text: str) -> tuple[str, int | float | tuple[int, ...]]:
    """The same, or `rms_norm_eps=1e-5`."""
    name, equals, value = text.partition("=")
    if equals and name.isidentifier() and _FLOAT.fullmatch(value):
        return name, float(value)
    if not equals or not name.isidentifier() or not re.fullmatch(r"[0-9]+(,[0-9]+)*|true|false", value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=NUMBER, or KEY=NUMBER,NUMBER,... of whole ones")
    if value in ("true", "false"):
        return name, int(value == "true")
    numbers = tuple(map(int, value.split(",")))
    return name, numbers if len(numbers) > 1 else numbers[0]


def mesh(text: str) -> dict[str, int]:
    """`pp=2,tp=4`."""
    found: dict[str, int] = {}
    for one in text.split(","):
        axis, equals, size = one.partition("=")
        if not equals or not axis.isidentifier() or not size.isdecimal() or axis in found:
            raise argparse.ArgumentTypeError(f"{text!r}: expected AXIS=N,AXIS=N,..., each axis once")
        found[axis] = int(size)
    return found


def cast(text: str) -> tuple[str, str]:
    """`value=bfloat16`."""
    state, equals, dtype = text.partition("=")
    if not equals or not state or not dtype:
        raise argparse.ArgumentTypeError(f"{text!r}: expected STATE=TYPE")
    return state, dtype


def size(text: str) -> int:
    """`5GB`, `500MiB`, `1000`: bytes."""
    found = _SIZE.fullmatch(text.strip())
    nbytes = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size as 5GB or 500MiB")
    return nbytes
