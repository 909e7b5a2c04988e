"""What one rank of a job has: its state, its contestants, and the one way to time something on all ranks together."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from . import caches
from .contestants import Contestant, make
from .floors import SMALL_BLOCK_NBYTES, MemoryCopy, OwnMemory, RawFiles, WarmBuffer, Way
from .plan import Job
from .records import Memory, Setting
from .state import SMALL_TENSORS, State, fill, local_nbytes, sharded_state, small_state


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call of one contestant over all ranks. With `error` set, the contestant takes no further part."""

    setting: Setting
    contestant: str
    seconds: float
    requested_nbytes: int
    device_nbytes: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps of the job's schedule that are done."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank ended with an exception that no contestant caused."""

    rank: int
    text: str


Message = Sample | Memory | Progress | Failed


@dataclass(frozen=True, slots=True)
class _Span:
    begun: float
    ended: float
    requested_nbytes: int
    device_nbytes: int
    error: str | None


class Session:
    """One rank's side of a job. Made after the process group; every method that waits is called by all ranks."""

    def __init__(self, job: Job, connection: Connection) -> None:
        self.job = job
        self.rank = dist.get_rank()
        self.folder = Path(job.place.folder)
        self._connection = connection
        self.state = self._make_state()
        fill(self.state)
        self.nbytes = self._sum(local_nbytes(self.state))
        self.tensors = SMALL_TENSORS if job.kind == "small" else sum(len(entries) for entries in self.state.values())
        self.contestants: dict[str, Contestant] = {}
        self.silent = False

    def enter_libraries(self) -> None:
        """Make the job's contestants."""
        for name in self.job.contestants:
            self.contestants[name] = make(name)

    def enter_floors(self) -> None:
        """Add raw files over one buffer of this rank's size: buffered, and by O_DIRECT or, in memory, in small blocks. Where
        the same bytes are saved and loaded, also from and into the state's own memory."""
        self.buffer = WarmBuffer(local_nbytes(self.state))
        self.memory_copy = MemoryCopy(self.buffer)
        floors: list[Contestant] = [RawFiles(self.buffer, "buffered")]
        ways: list[Way] = ["buffered"]
        if not self.job.place.has_device:
            floors.append(RawFiles(self.buffer, "buffered", SMALL_BLOCK_NBYTES))
        elif _takes_direct(self.folder):
            floors.append(RawFiles(self.buffer, "direct"))
            ways.append("direct")
        if self.job.kind == "same":
            floors += [OwnMemory(self.state, way) for way in ways]
        self.contestants |= {floor.name: floor for floor in floors}

    def order(self, repeat: int) -> list[str]:
        """Contestants still in, starting with another one in every repeat."""
        names = list(self.contestants)
        turn = repeat % len(names) if names else 0
        return names[turn:] + names[:turn]

    def timed(self, setting: Setting | None, name: str, action: Callable[[], None]) -> bool:
        """Time `action` from the first rank's start to the last one's end; False if it failed on any rank.

        A failing contestant is withdrawn on all ranks. Nothing is reported while `silent` (warm-up), except errors, nor without
        a setting.
        """
        gc.collect()
        error = None
        dist.barrier()
        before = caches.read_counters()
        begun = time.perf_counter()
        try:
            action()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:400]
        ended = time.perf_counter()
        after = caches.read_counters()
        requested = after.requested_nbytes - before.requested_nbytes
        span = _Span(begun, ended, requested, after.device_nbytes - before.device_nbytes, error)
        spans: list[_Span] = [span] * dist.get_world_size()
        dist.all_gather_object(spans, span)
        return self._report(setting, name, spans)

    def withdraw(self, setting: Setting | None, name: str, why: str) -> None:
        """Take the contestant out on this rank and say why; called by all ranks with the same arguments."""
        self.contestants.pop(name, None)
        if setting is not None:
            self.send(Sample(setting, name, 0.0, 0, 0, why))

    def on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait."""
        if self.rank == 0:
            action()
        dist.barrier()

    def remove(self, path: Path) -> None:
        """Nothing stands at the path any more."""
        self.on_first_rank(lambda: discard(path, keeps_inodes=self.job.place.has_device))

    def make_room(self, path: Path) -> None:
        """The same, and the disk comes to rest, so that no earlier writeback falls into the next measure."""

        def sweep() -> None:
            discard(path, keeps_inodes=self.job.place.has_device)
            os.sync()

        self.on_first_rank(sweep)

    def any_rank(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        numbers = [number] * dist.get_world_size()
        dist.all_gather_object(numbers, number)
        return max(numbers)

    def send(self, message: Message) -> None:
        """Pass a message to the parent, once for all ranks."""
        if self.rank == 0:
            self._connection.send(message)

    def close(self) -> None:
        """Close every contestant still in."""
        for contestant in self.contestants.values():
            contestant.close()

    def _report(self, setting: Setting | None, name: str, spans: list[_Span]) -> bool:
        errors = [f"rank {rank}: {span.error}" for rank, span in enumerate(spans) if span.error]
        if errors:
            self.withdraw(setting, name, errors[0])
            return False
        if setting is not None and not self.silent:
            seconds = max(span.ended for span in spans) - min(span.begun for span in spans)
            requested = sum(span.requested_nbytes for span in spans)
            device = sum(span.device_nbytes for span in spans)
            self.send(Sample(setting, name, seconds, requested, device, None))
        return True

    def _sum(self, number: int) -> int:
        numbers = [number] * dist.get_world_size()
        dist.all_gather_object(numbers, number)
        return sum(numbers)

    def _make_state(self) -> State:
        if self.job.kind == "small":
            return small_state(rank=self.rank, ranks=self.job.ranks)
        mesh = init_device_mesh("cpu", (self.job.ranks,), mesh_dim_names=("fsdp",))
        return sharded_state(self.job.nbytes, mesh)


def trim_memory() -> None:
    """Give freed memory back to the system, so that resident size means memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def one_thread() -> None:
    """Keep torch's kernels on one thread per rank: ranks share the cores."""
    torch.set_num_threads(1)


def _takes_direct(folder: Path) -> bool:
    probe = folder / f"direct-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def discard(path: Path, *, keeps_inodes: bool) -> None:
    """Removes a tree, or empties its files and moves it aside until the end of the run.

    ext4 does not hand out an inode again for a minute after its deletion, and passes over each such one at every file that it
    makes: where trees are removed between measures, everyone's files cost up to ten times the CPU.
    """
    if not keeps_inodes:
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        for file in path.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
        path.rename(path.with_name(f"emptied-{uuid4().hex}"))
