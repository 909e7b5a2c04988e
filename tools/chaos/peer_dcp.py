"""torch.distributed.checkpoint: its blocking save and both of its asynchronous ones; step folders, and one path overwritten.

A folder counts once its `.metadata` exists, which its library renames into place last.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import distributed
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from .contents import State
from .entrants import ALL_STEPS, Contestant, Entrant, Finish
from .step_folders import Overwriting, StepFolders, nothing_left_to_wait_for

Where = Literal["step folders", "one path"]
SETTINGS = "FileSystemWriter(sync_files=True, single_file_per_rank=True, thread_count=2)"


def _writer(path: Path) -> FileSystemWriter:
    return FileSystemWriter(path, sync_files=True, single_file_per_rank=True, thread_count=2)


def _blocking(state: State, path: Path) -> Finish:
    save(cast("dict[str, Any]", state), storage_writer=_writer(path), planner=DefaultSavePlanner(enable_plan_caching=True))
    return nothing_left_to_wait_for


def _load(state: State, path: Path) -> None:
    load(cast("dict[str, Any]", state), storage_reader=FileSystemReader(path))


class _Asynchronous:
    """Saves through a group of its own, as its documentation has it for jobs that train on gloo meanwhile."""

    def __init__(self, kind: AsyncCheckpointerType) -> None:
        self._kind = kind
        self._group = distributed.new_group(backend="gloo") if distributed.get_world_size() > 1 else None

    def save(self, state: State, path: Path) -> Finish:
        future: Any = async_save(
            cast("dict[str, Any]", state),
            storage_writer=_writer(path),
            process_group=self._group,
            async_checkpointer_type=self._kind,
        )
        finish: Finish = future.result
        return finish


def _make(how: AsyncCheckpointerType | None, where: Where, folder: Path) -> Contestant:
    saving = _blocking if how is None else _Asynchronous(how).save
    return (StepFolders if where == "step folders" else Overwriting)(folder, saving, _load, mark=".metadata")


def _entrants() -> dict[str, Entrant]:
    ways = {"": None, "-thread": AsyncCheckpointerType.THREAD, "-process": AsyncCheckpointerType.PROCESS}
    places: dict[str, Where] = {"": "step folders", "-overwrite": "one path"}
    found = {}
    for way, how in ways.items():
        for ending, where in places.items():
            name = f"dcp{way}{ending}"
            call = "save" if how is None else f"async_save({how.name})"
            found[name] = Entrant(
                name,
                version=str(torch.__version__),
                settings=f"{call}, {SETTINGS}; {where}",
                make=partial(_make, how, where),
                keeps=ALL_STEPS if where == "step folders" else 0,
                roles=("committer", "trainer", "helper") if way == "-process" else ("committer", "trainer"),
            )
    return found


ENTRANTS = _entrants()
