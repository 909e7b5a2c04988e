"""The machine in words, and the folders to measure in."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from .plan import Job, Place, disk_nbytes, memory_nbytes
from .records import Machine

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "out" / "bench"
SHARED_MEMORY = Path("/dev/shm")


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds `folder`, as /proc/mounts calls it."""
    best, kind = "", "unknown"
    target = str(folder.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def usual_places(names: Sequence[str]) -> tuple[Place, ...]:
    """Of "disk" and "tmpfs" those that exist here; folders are private to this process and made when used."""
    own = f"elastickpt-bench-{os.getpid()}"
    found: list[Place] = []
    if "disk" in names:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        found.append(Place("disk", str(OUTPUT / own), file_system_of(OUTPUT)))
    if "tmpfs" in names and SHARED_MEMORY.is_dir() and file_system_of(SHARED_MEMORY) == "tmpfs":
        found.append(Place("tmpfs", str(SHARED_MEMORY / own), "tmpfs"))
    return tuple(found)


def place_at(folder: Path) -> Place:
    """A folder of the user's choice, called by its file system's type in all output."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = file_system_of(folder)
    return Place(kind, str(folder / f"elastickpt-bench-{os.getpid()}"), kind)


def free_nbytes(job: Job) -> int:
    """What is free now where the job's folder will be."""
    return shutil.disk_usage(Path(job.place.folder).parent).free


def lacking_space(job: Job) -> str | None:
    """Why the job does not fit into this machine now, or None."""
    needed, free = disk_nbytes(job), free_nbytes(job)
    if needed > free:
        return f"needs {needed / 1e9:.1f} GB in {job.place.name}, {free / 1e9:.1f} GB are free"
    memory = memory_nbytes(job) + (0 if job.place.has_device else needed)
    available = psutil.virtual_memory().available
    if memory > available:
        return f"needs {memory / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
    return None


def describe(places: Sequence[Place]) -> Machine:
    """Cores, memory, file systems and versions."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(psutil.virtual_memory().total / 1e9),
        places=tuple((place.name, place.file_system) for place in places),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        python=platform.python_version(),
        torch=metadata.version("torch"),
    )


def free_stem(folder: Path, stem: str) -> str:
    """`stem`, or with -2, -3, ... where an earlier run's record has it."""
    candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in candidates if not (folder / f"{name}.json").exists())


def in_words(machine: Machine) -> str:
    """A file name part such as `2-cores-25-gb-ext4-tmpfs`."""
    kinds = "-".join(dict.fromkeys(kind for _, kind in machine.places))
    words = f"{machine.cores} cores {machine.memory_gb} gb {kinds}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
