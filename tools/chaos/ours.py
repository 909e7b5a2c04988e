"""elastickpt itself."""

from __future__ import annotations

import time
from pathlib import Path

import numpy.ma  # noqa: F401 (numpy.unique imports it at its first use, in every fork anew)

import elastickpt as ek
from elastickpt.ledger.branch import history
from elastickpt.saving import saver, staging
from elastickpt.writer.arena import Arena

from .contents import State
from .entrants import Contestant, Entrant, Finish
from .step_folders import StepFolders, nothing_left_to_wait_for

SAVE, ASYNC_SAVE, LOAD, RUN = ek.save, ek.async_save, ek.load, ek.Run  # looked up here once, so that forks need not import them
KEPT = 3
PART_NBYTES, PART_S = 16 << 10, 0.002  # of what is staged slowly
RUN_OPTIONS = ek.RunOptions(signals={}, orphans_s=30.0, take_over=True)


def loading(state: State, path: Path) -> None:
    LOAD(state, path)


def blocking(folder: Path) -> Contestant:
    """`ek.save` into a folder for each step."""

    def saving(state: State, path: Path) -> Finish:
        SAVE(state, path)
        return nothing_left_to_wait_for

    return StepFolders(folder, saving, loading)


def packed(folder: Path) -> Contestant:
    """The same in packs."""

    def saving(state: State, path: Path) -> Finish:
        SAVE(state, path, placement="packed")
        return nothing_left_to_wait_for

    return StepFolders(folder, saving, loading)


def asynchronous(folder: Path) -> Contestant:
    """`ek.async_save` into a folder for each step."""

    def saving(state: State, path: Path) -> Finish:
        return ASYNC_SAVE(state, path).result

    return StepFolders(folder, saving, loading)


def packed_beside(folder: Path) -> Contestant:
    """`ek.async_save` in packs."""

    def saving(state: State, path: Path) -> Finish:
        return ASYNC_SAVE(state, path, placement="packed").result

    return StepFolders(folder, saving, loading)


def large(folder: Path) -> Contestant:
    """The same as it is of a large state: written while it is staged, which takes its time."""
    copied = Arena.fill_to

    def slowly(arena: Arena, nbytes: int) -> None:
        copied(arena, nbytes)
        time.sleep(PART_S)

    saver.MEANWHILE_NBYTES, staging.PART_NBYTES = 0, PART_NBYTES
    Arena.fill_to = slowly  # type: ignore[assignment, method-assign]
    return asynchronous(folder)


class InARun:
    """`ek.Run`, with retention. What a user takes for checkpoints is what the run lists."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "run"
        self._run: ek.Run | None = None

    def save(self, state: State, step: int) -> Finish:
        if self._run is None:
            self._run = RUN(self._root, state, keep=ek.Keep(last=KEPT), options=RUN_OPTIONS)
            held = {item: {name: tensor.clone() for name, tensor in part.items()} for item, part in state.items()}
            self._run.restore()
            for item, part in held.items():  # what is to be saved is what training has got to, not what was there
                for name, tensor in part.items():
                    state[item][name].copy_(tensor)
        return self._run.save(step).result

    def places(self) -> list[tuple[str, int | None]]:
        if not (self._root / "commits").exists():
            return []
        return [(entry.folder, entry.step) for entry in reversed(history(self._root)) if entry.state == "live"]

    def load(self, state: State, place: str) -> None:
        LOAD(state, self._root / place)


ENTRANTS = {
    "elastickpt": Entrant("elastickpt", ek.__version__, "ek.save, durability='power'; a folder for each step", blocking),
    "elastickpt-packed": Entrant(
        "elastickpt-packed",
        ek.__version__,
        "ek.save, placement='packed', durability='power'; a folder for each step",
        packed,
    ),
    "elastickpt-async": Entrant(
        "elastickpt-async",
        ek.__version__,
        "ek.async_save, durability='power'; a folder for each step",
        asynchronous,
        roles=("committer", "trainer", "helper"),
    ),
    "elastickpt-packed-async": Entrant(
        "elastickpt-packed-async",
        ek.__version__,
        "ek.async_save, placement='packed', durability='power'; a folder for each step",
        packed_beside,
        roles=("committer", "trainer", "helper"),
    ),
    "elastickpt-large": Entrant(
        "elastickpt-large",
        ek.__version__,
        f"ek.async_save, written while it is staged: {PART_NBYTES >> 10} KiB each {PART_S * 1e3:g} ms; a folder for each step",
        large,
        roles=("committer", "trainer", "helper"),
    ),
    "elastickpt-run": Entrant(
        "elastickpt-run",
        ek.__version__,
        f"ek.Run, Keep(last={KEPT}), durability='power'",
        InARun,
        keeps=KEPT,
        roles=("committer", "trainer", "helper"),
    ),
}
