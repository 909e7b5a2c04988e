"""torch.distributed.checkpoint beside training: both executors, each with a stager that is made once.

By default it makes a stager for each call, and so pays for fresh memory each time; here it is kept. Shared memory is on for
the process executor, which would copy once more without it.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, cast

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from .peer_dcp import USUAL_THREADS
from .records import Durability, Finish
from .state import State

Executor = Literal["thread", "process"]


class BesideDcp:
    """`dcp.async_save` over a gloo group of its own. Files are synced, the directory that names them is not."""

    durability: Durability = "files"

    def __init__(self, executor: Executor, threads: int = USUAL_THREADS) -> None:
        self.name = f"dcp {executor}"
        self._type = AsyncCheckpointerType.THREAD if executor == "thread" else AsyncCheckpointerType.PROCESS
        self._threads = threads
        self._group: Any = dist.new_group(backend="gloo")
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=executor == "process",
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def begin(self, state: State, path: Path) -> Finish:
        response = async_save(
            cast("dict[str, Any]", state),
            storage_writer=FileSystemWriter(path, sync_files=True, single_file_per_rank=True, thread_count=self._threads),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            process_group=self._group,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        saved = response if isinstance(response, Future) else response.upload_completion

        def finish() -> None:
            saved.result(300.0)

        return finish

    def close(self) -> None:
        self._stager.close()
