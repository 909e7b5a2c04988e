"""What the trainer asks of where it saves to; without a run, nothing is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from elastickpt.runs.view_saves import Claims
from elastickpt.saving.task import SaveHandle


class Saves(Protocol):
    """See `runs.view_saves.ViewSaves`."""

    @property
    def claims(self) -> Claims: ...

    def stand(self, view: str) -> None: ...

    def goes_on(self, epoch: int) -> None: ...

    def at(self, step: int, state: Mapping[str, object]) -> SaveHandle | None: ...

    def now(self, step: int, state: Mapping[str, object]) -> SaveHandle | None: ...

    def interrupt(self) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


class NoSaves:
    claims = Claims()

    def stand(self, view: str) -> None:
        """Nothing is made for it."""

    def goes_on(self, epoch: int) -> None:
        """Nothing is claimed."""

    def at(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        return None

    def now(self, step: int, state: Mapping[str, object]) -> SaveHandle | None:
        return None

    def interrupt(self) -> None:
        """Nothing waits."""

    def leave(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""
