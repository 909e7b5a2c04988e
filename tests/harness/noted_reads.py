"""Which ranges of local files this process reads, by a note at each."""

from __future__ import annotations

import pytest

from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import RangeReader


class NotingReader:
    """A reader that notes (path, start, stop) of what it reads."""

    def __init__(self, path: str, inner: RangeReader, noted: list[tuple[str, int, int]]) -> None:
        self._path, self._inner, self._noted = path, inner, noted
        self.nbytes, self.close = inner.nbytes, inner.close

    def read_into(self, offset: int, into: memoryview) -> None:
        self._noted.append((self._path, offset, offset + into.nbytes))
        self._inner.read_into(offset, into)


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """All reads of local stores from now on, until `monkeypatch` is undone."""
    noted: list[tuple[str, int, int]] = []
    opened = LocalStore.open_reader
    monkeypatch.setattr(
        LocalStore, "open_reader", lambda self, path, **more: NotingReader(path, opened(self, path, **more), noted)
    )
    return noted
