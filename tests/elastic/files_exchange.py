"""What members of one view tell each other, by files of a folder: an exchange without a job."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from elastickpt.errors import DeadlineExceeded


class FilesExchange:
    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def set(self, key: str, value: bytes) -> None:
        path = self._folder / key.replace("/", "-")
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(value)
        draft.rename(path)

    def get(self, key: str, *, limit_s: float) -> bytes:
        path, limit = self._folder / key.replace("/", "-"), time.monotonic() + limit_s
        while not path.exists():
            if time.monotonic() > limit:
                raise DeadlineExceeded(key)
            time.sleep(0.002)
        return path.read_bytes()

    def get_all(self, keys: Sequence[str], *, limit_s: float) -> list[bytes]:
        return [self.get(key, limit_s=limit_s) for key in keys]
