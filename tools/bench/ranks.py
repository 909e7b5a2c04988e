"""Runs a job on ranks forked from one process that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .plan import Job
    from .session import Message

PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch_checkpointing",
    "torch_checkpointing.default_resharder",
    "elastickpt",
]
SILENCE_LIMIT_S = 400.0
GROUP_LIMIT_S = 300.0


class JobFailed(Exception):
    """A job's ranks ended early or stopped reporting; what they reported before stands."""


class Launcher(Protocol):
    """Runs a job to its end, passing on every message of its ranks. Raises JobFailed."""

    def __call__(self, job: Job, on_message: Callable[[Message], None]) -> None: ...


class ForkedRanks:
    """A launcher whose ranks are forks of a server process that is started on first use and lives until exit."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, job: Job, on_message: Callable[[Message], None]) -> None:
        Path(job.place.folder).mkdir(parents=True, exist_ok=True)
        meeting = Path(job.place.folder, f"store-{os.getpid()}")
        meeting.unlink(missing_ok=True)
        pipes = [self._context.Pipe(duplex=False) for _ in range(job.ranks)]
        workers = [
            self._context.Process(target=_rank_main, args=(job, rank, str(meeting), pipes[rank][1]), daemon=False)
            for rank in range(job.ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            for _, sender in pipes:
                sender.close()
            _listen([receiver for receiver, _ in pipes], on_message)
            for worker in workers:
                worker.join(timeout=60)
        finally:
            for worker in workers:
                if worker.pid is not None and worker.is_alive():
                    worker.kill()
                    worker.join()
            meeting.unlink(missing_ok=True)


def _listen(receivers: list[Connection], on_message: Callable[[Message], None]) -> None:
    """Pass messages on until every rank has closed its end."""
    from .session import Failed

    open_ends = list(receivers)
    finished = 0
    while open_ends:
        ready = wait(open_ends, timeout=SILENCE_LIMIT_S)
        if not ready:
            raise JobFailed(f"no rank reported anything for {SILENCE_LIMIT_S:.0f} s")
        for end in ready:
            assert isinstance(end, Connection)
            try:
                message: Message | None = end.recv()
            except EOFError:
                open_ends.remove(end)
                continue
            if message is None:
                finished += 1
            elif isinstance(message, Failed):
                raise JobFailed(f"rank {message.rank}: {message.text}")
            else:
                on_message(message)
    if finished != len(receivers):
        raise JobFailed(f"{len(receivers) - finished} of {len(receivers)} ranks died without a word")


def _rank_main(job: Job, rank: int, meeting: str, connection: Connection) -> None:
    from . import schedule
    from .session import Failed, Session, one_thread

    one_thread()
    try:
        _join_group(rank, job.ranks, Path(meeting))
        session = Session(job, connection)
        schedule.run(session)
        session.close()
        _leave_group()
        connection.send(None)
    except Exception:
        connection.send(Failed(rank, traceback.format_exc(limit=8)))
        raise SystemExit(1) from None
    finally:
        connection.close()


def _join_group(rank: int, ranks: int, meeting: Path) -> None:
    """gloo over a TCP store of rank 0 on a free port, with torchrun's variables set as libraries expect them."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=GROUP_LIMIT_S)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        meeting.with_suffix(".part").write_text(str(store.port))
        meeting.with_suffix(".part").rename(meeting)
    else:
        while not meeting.exists():
            time.sleep(0.01)
        store = TCPStore("127.0.0.1", int(meeting.read_text()), is_master=False, wait_for_workers=False, timeout=limit)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)


def _leave_group() -> None:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
