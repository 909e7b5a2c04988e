"""What libraries that write one folder for a checkpoint have in common: a folder for each step, or one for the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .entrants import Finish

if TYPE_CHECKING:
    from .contents import State

Saving = Callable[["State", Path], Finish]
Loading = Callable[["State", Path], None]
_PREFIX = "step-"


def nothing_left_to_wait_for() -> None:
    """The acknowledgement of a save that blocked."""


class StepFolders:
    """`step-N` for each step. `mark`: the file without which its users take a folder for none; "" if there is no such file."""

    def __init__(self, folder: Path, saving: Saving, loading: Loading, mark: str = "") -> None:
        self._folder, self._saving, self._loading, self._mark = folder, saving, loading, mark

    def save(self, state: State, step: int) -> Finish:
        return self._saving(state, self._folder / f"{_PREFIX}{step}")

    def places(self) -> list[tuple[str, int | None]]:
        names = sorted(path.name for path in self._folder.glob(f"{_PREFIX}*") if (path / self._mark).exists())
        return [(name, int(name.removeprefix(_PREFIX))) for name in names if name.removeprefix(_PREFIX).isdigit()]

    def load(self, state: State, place: str) -> None:
        self._loading(state, self._folder / place)


class Overwriting:
    """One folder, written anew at every step."""

    def __init__(self, folder: Path, saving: Saving, loading: Loading, mark: str = "") -> None:
        self._path, self._saving, self._loading, self._mark = folder / "newest", saving, loading, mark

    def save(self, state: State, step: int) -> Finish:
        return self._saving(state, self._path)

    def places(self) -> list[tuple[str, int | None]]:
        return [(self._path.name, None)] if (self._path / self._mark).exists() else []

    def load(self, state: State, place: str) -> None:
        self._loading(state, self._path)
