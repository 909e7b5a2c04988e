"""Long texts of typed JSON, read by the types that most of them have: 1.5 µs a reference, where to read it as any JSON, to
spell it again and to look at it takes 4.

Nothing is refused here. What is spelled otherwise than writers spell it is left to `canonical_json.parse`, which finds members
that stand twice, and says what is wrong: a canonical text without escapes has exactly the length of what was found in it.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from elastickpt.errors import CheckpointError
from elastickpt.format.canonical_json import is_within_bounds, parse
from elastickpt.format.decode_values import decode_value
from elastickpt.format.values import ArrayReference, Value

if TYPE_CHECKING:
    import msgspec

LONG = 4096  # characters: below, any way is quick

_NAMES = attrgetter("item", "name")
_AROUND = len('"":{"$tensor":{"item":"","name":""}},')


@cache
def _members() -> msgspec.json.Decoder[dict[str, msgspec.Raw]]:
    import msgspec

    return msgspec.json.Decoder(dict[str, msgspec.Raw])


@cache
def _references() -> msgspec.json.Decoder[dict[str, dict[Literal["$tensor"], ArrayReference]]]:
    import msgspec

    return msgspec.json.Decoder(dict[str, dict[Literal["$tensor"], ArrayReference]])


def _is_plain(text: str) -> bool:
    return len(text) >= LONG and text.isascii() and "\\" not in text and is_within_bounds(text)


def members_in(text: str) -> dict[str, str] | None:
    """The texts of an object's members; None for what is better read otherwise."""
    if not _is_plain(text):
        return None
    try:
        found = {name: bytes(one).decode("ascii") for name, one in _members().decode(text).items()}
    except (ValueError, RecursionError):
        return None
    length = sum(len(name) + len(one) + len('"":,') for name, one in found.items()) + len("{}") - 1
    return found if length == len(text) else None


def references_in(text: str) -> dict[str, ArrayReference] | None:
    """The references to tensors that are all that a text spells; None for what is better read otherwise."""
    if not _is_plain(text) or not text.startswith('{"') or '":{"$tensor":{"' not in text[:LONG]:
        return None
    try:
        told = _references().decode(text)
    except (ValueError, RecursionError):
        return None
    try:
        found = {name: one["$tensor"] for name, one in told.items()}
    except KeyError:
        return None
    length = sum(map(len, found)) + sum(len(item) + len(name) for item, name in map(_NAMES, found.values()))
    usual = length + _AROUND * len(found) + len("{}") - 1 == len(text) and text.count('"$') == len(found)
    return found if usual else None


def decode_text(data: str, *, where: str) -> Value:
    """The value of a typed JSON text. Raises as `decode_value`."""
    found = references_in(data)
    return decode_value(parse(data, where=where), where=where) if found is None else found


def decode_long_pointers(data: str, *, where: str) -> dict[str, Value] | None:
    """As `decode_pointers` of a JSON text; None where it is not long, or better read otherwise."""
    found = members_in(data)
    if found is None or any(not name.startswith("/") for name in found):
        return None
    try:
        return {name: decode_text(one, where=f"{where}{name}") for name, one in found.items()}
    except CheckpointError:
        return None
