"""torch_checkpointing on CPU, with the three accommodations that it needs there.

1. Its metadata is gathered through CUDA tensors; here `all_gather_object` does it.
2. A plain tensor counts as replicated over the world, and all but the first rank's are then dropped from the metadata;
   here it is a replica of its own rank.
3. With its metadata cache on, a blocking saver writes the metadata into the first checkpoint only, and the later ones
   cannot be resharded; here the cache is off.
O_DIRECT is off: its writer fails on ext4 with EINVAL.
"""

# The library is an extra: type checks run without it too, where its classes are Any.
# mypy: allow-subclassing-any

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch_checkpointing.builder import make_async_checkpoint_saver, make_sync_checkpoint_saver
from torch_checkpointing.checkpoint_base import CheckpointBase, CheckpointItem
from torch_checkpointing.checkpoint_loader import CheckpointLoader
from torch_checkpointing.checkpoint_reader import CheckpointReader
from torch_checkpointing.checkpoint_writer import CallbackArgs, CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.dtensor_metadata import DTensorShardingMetadata, ReplicateSpec, get_device_mesh_spec
from torch_checkpointing.metadata_manager import DefaultMetadataManager
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
from torch_checkpointing.types import RankInfo

from .records import Durability, Finish
from .state import State

USUAL_THREADS = 2  # 1, 2 and 4 were tried: 2 is best at 1.8 GB on two cores, at 0.1 GB they are alike
BARRIER_LIMIT_S = 120


class TorchCheckpointing:
    """A blocking saver and a loader. durability "none" is the library as it is; "power" syncs files and directories

    in its own callbacks: files before its barrier, the parent directory after its rename.
    """

    def __init__(self, threads: int = USUAL_THREADS, *, durability: Durability) -> None:
        logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
        self.durability: Durability = durability
        self.name = "tc" if durability == "none" else "tc+fsync"
        self.version = metadata.version("torch_checkpointing")
        synced = "never syncs" if durability == "none" else "files and directories synced by us"
        self.settings = f"use_direct_io=False, file_write_max_threads={threads}, mmap loads, DefaultResharder; {synced}"
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._rank = rank
        self._resharder = OwnRankResharder(rank)
        info = RankInfo(global_world_size=ranks, global_rank=rank, role_rank=rank, role_world_size=ranks)
        self._metadata = GatheringMetadata(info, should_cache_metadata=False, enable_serialization=False)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        writer = CheckpointWriterConfig(checkpoint_write_barrier_timeout_sec=BARRIER_LIMIT_S, file_write_max_threads=threads)
        self._saver = make_sync_checkpoint_saver(
            config=SyncCheckpointSaverConfig(writer_config=writer),
            rank_info=info,
            storage_config=storage,
            checkpoint_metadata_manager=self._metadata,
            pre_finalize_callback=None if durability == "none" else self._sync_files,
            finalize_callback=None if durability == "none" else self._sync_parent,
        )
        self._loader = CheckpointLoader(CheckpointReader(info, storage), self._metadata)

    def save(self, state: State, path: Path) -> None:
        self._saver.save(str(path), Items(state, self._resharder))

    def load(self, state: State, path: Path) -> None:
        self._loader.load(str(path), Items(state, self._resharder), strict=True)

    def close(self) -> None:
        self._saver.close()
        self._loader.close()
        self._metadata.close()

    def _sync_files(self, arguments: CallbackArgs) -> None:
        folder = Path(arguments.path)
        names = [name for name in os.listdir(folder) if name.endswith(f"_{self._rank}.pt")]
        if self._rank == 0:
            names += [name for name in os.listdir(folder) if not name.endswith(".pt")]
        for name in names:
            _sync(folder / name)
        _sync(folder)

    def _sync_parent(self, arguments: CallbackArgs) -> None:
        if self._rank == 0:
            _sync(Path(arguments.path).parent)


class BesideTorchCheckpointing:
    """Its saver beside training, with a writer process; staged within the call, as nothing else is right for host tensors."""

    durability: Durability = "none"

    def __init__(self, threads: int = USUAL_THREADS) -> None:
        logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
        self.name = "tc"
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._resharder = OwnRankResharder(rank)
        info = RankInfo(global_world_size=ranks, global_rank=rank, role_rank=rank, role_world_size=ranks)
        self._metadata = GatheringMetadata(info, should_cache_metadata=False, enable_serialization=False)
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
        writer = CheckpointWriterConfig(checkpoint_write_barrier_timeout_sec=BARRIER_LIMIT_S, file_write_max_threads=threads)
        self._saver = make_async_checkpoint_saver(
            config=AsyncCheckpointSaverConfig(writer_config=writer, staging_config=staging),
            rank_info=info,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            checkpoint_metadata_manager=self._metadata,
        )

    def begin(self, state: State, path: Path) -> Finish:
        staged, written = self._saver.save(str(path), Items(state, self._resharder))
        staged.result()

        def finish() -> None:
            written.result(300.0)

        return finish

    def close(self) -> None:
        self._saver.close()
        self._metadata.close()


class Items(CheckpointBase):
    """The state's top-level entries as items, filled in place by a load."""

    def __init__(self, state: State, resharder: DefaultResharder) -> None:
        self._items = {key: CheckpointItem(value=value, resharder=resharder) for key, value in state.items()}

    def get_items(self) -> dict[str, CheckpointItem]:
        return self._items

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to do: tensors were filled in place."""


class OwnRankResharder(DefaultResharder):
    """Says of a plain tensor that this rank alone holds it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def extract_sharding_metadata(self, item_key: str, item_value: Any) -> dict[Any, Any]:
        own = get_device_mesh_spec("cpu", (1,), (self._rank,))
        found: dict[Any, Any] = super().extract_sharding_metadata(item_key, item_value)
        return {path: replace(entry, mesh_spec=own) if _is_plain(entry) else entry for path, entry in found.items()}


class GatheringMetadata(DefaultMetadataManager):
    """Gathers over the process group that exists instead of over CUDA."""

    def _all_gather_pickled_data(self, data: Any, process_group: dist.ProcessGroup | None = None) -> dict[int, Any]:
        gathered: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(gathered, data, group=process_group)
        return dict(enumerate(gathered))


def _is_plain(entry: DTensorShardingMetadata) -> bool:
    return all(isinstance(placement, ReplicateSpec) for placement in entry.placements)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
