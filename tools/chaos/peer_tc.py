"""torch_checkpointing: its blocking saver, bare and with all synced in its callbacks, and its asynchronous one.

One path overwritten is left out: the library refuses to rename onto a folder that is occupied.
"""

# The library is an extra: type checks run without it too, where its classes are Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed
from torch_checkpointing.builder import make_async_checkpoint_saver
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
from torch_checkpointing.types import RankInfo

from tools.bench.peer_tc import BARRIER_LIMIT_S, GatheringMetadata, Items, OwnRankResharder, TorchCheckpointing
from tools.bench.records import Durability

from .contents import State
from .entrants import Contestant, Entrant, Finish
from .step_folders import StepFolders, nothing_left_to_wait_for


def _blocking(durability: Durability, folder: Path) -> Contestant:
    library = TorchCheckpointing(durability=durability)

    def saving(state: State, path: Path) -> Finish:
        library.save(state, path)
        return nothing_left_to_wait_for

    return StepFolders(folder, saving, library.load)


class _Asynchronous:
    """Writes in a process of its own, which the first save starts."""

    def __init__(self) -> None:
        logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        info = RankInfo(global_world_size=ranks, global_rank=rank, role_rank=rank, role_world_size=ranks)
        self._resharder = OwnRankResharder(rank)
        writer = CheckpointWriterConfig(checkpoint_write_barrier_timeout_sec=BARRIER_LIMIT_S, file_write_max_threads=2)
        self._saver: Any = make_async_checkpoint_saver(
            config=AsyncCheckpointSaverConfig(writer_config=writer),
            rank_info=info,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            checkpoint_metadata_manager=GatheringMetadata(info),
        )

    def save(self, state: State, path: Path) -> Finish:
        staged, written = self._saver.save(str(path), Items(state, self._resharder))
        staged.result()
        finish: Finish = written.result
        return finish


class _LoadedByBlocking(StepFolders):
    """The asynchronous saver, made at the first save, so that a reader starts no process."""

    def __init__(self, folder: Path) -> None:
        saver: list[_Asynchronous] = []

        def saving(state: State, path: Path) -> Finish:
            if not saver:
                saver.append(_Asynchronous())
            return saver[0].save(state, path)

        super().__init__(folder, saving, TorchCheckpointing(durability="none").load)


def _version() -> str:
    from importlib import metadata

    return metadata.version("torch_checkpointing")


SETTINGS = f"use_direct_io=False, file_write_max_threads=2, a barrier of {BARRIER_LIMIT_S} s; step folders"
ENTRANTS = {
    "tc": Entrant("tc", _version(), f"blocking, {SETTINGS}, nothing synced", partial(_blocking, "none")),
    "tc+fsync": Entrant(
        "tc+fsync", _version(), f"blocking, {SETTINGS}, synced by us in its callbacks", partial(_blocking, "power")
    ),
    "tc-async": Entrant(
        "tc-async",
        _version(),
        f"in a process, {SETTINGS}, nothing synced",
        _LoadedByBlocking,
        roles=("committer", "trainer", "helper"),
    ),
}
