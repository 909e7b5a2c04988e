"""elastickpt itself."""

from __future__ import annotations

from pathlib import Path

import numpy.ma  # noqa: F401 (numpy.unique imports it at its first use, in every fork anew)

import elastickpt as ek

from .contents import State
from .entrants import Contestant, Entrant, Finish
from .step_folders import StepFolders, nothing_left_to_wait_for

SAVE, LOAD = ek.save, ek.load  # looked up here once, so that forks of this process need not import what is behind them


def blocking(folder: Path) -> Contestant:
    """`ek.save` into a folder for each step."""

    def saving(state: State, path: Path) -> Finish:
        SAVE(state, path)
        return nothing_left_to_wait_for

    def loading(state: State, path: Path) -> None:
        LOAD(state, path)

    return StepFolders(folder, saving, loading)


ENTRANTS = {
    "elastickpt": Entrant("elastickpt", ek.__version__, "ek.save, durability='power'; a folder for each step", blocking),
}
