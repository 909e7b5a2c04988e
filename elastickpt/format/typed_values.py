"""A value and its typed JSON text, each made of the other when it is first asked for, and then known: a value that is saved
again and again is encoded once. Nobody changes the value. [UCF-50]
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from elastickpt.format.canonical_json import dump
from elastickpt.format.encode_values import encode_value, typed_digest
from elastickpt.format.long_texts import decode_text
from elastickpt.format.values import Value


class TypedValue:
    """What stands at `where`, a JSON pointer. Of a value or of a text: `of` and `told`."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._is_readable = False

    @classmethod
    def of(cls, value: Value, where: str) -> TypedValue:
        """Of a value, which may turn out to have no text."""
        found = cls(where)
        found.__dict__["value"] = value
        return found

    @classmethod
    def told(cls, text: str, where: str) -> TypedValue:
        """Of a text that `text` made, perhaps in another process."""
        found = cls(where)
        found.__dict__["text"] = text
        return found

    def __eq__(self, other: object) -> bool:
        """Whether the texts are the same."""
        return isinstance(other, TypedValue) and (self.where, self.text) == (other.where, other.text)

    def __hash__(self) -> int:
        return hash((self.where, self.text))

    @cached_property
    def value(self) -> Value:
        """Raises Malformed kinds for a text that none made."""
        return decode_text(self.text, where=self.where)

    @cached_property
    def text(self) -> str:
        """Canonical typed JSON. Raises ValueNotCarried."""
        return self._encoded[0]

    @property
    def digest(self) -> str:
        """As `value_digest` has it. Raises ValueNotCarried."""
        return self._encoded[1]

    @cached_property
    def _encoded(self) -> tuple[str, str]:
        typed = encode_value(self.value, where=self.where)
        text = dump(typed)
        return text, typed_digest(typed, text)

    def require_readable(self) -> None:
        """A reader takes the text, which is tried once. Raises what it raises."""
        if not self._is_readable:
            decode_text(self.text, where=self.where)
            self._is_readable = True


def typed_values(values: Mapping[str, Value]) -> dict[str, TypedValue]:
    """Of values by JSON pointer."""
    return {pointer: TypedValue.of(value, pointer) for pointer, value in values.items()}
