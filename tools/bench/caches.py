"""Outside the timed regions: what the page cache holds, and what a process has read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLD_BY = "posix_fadvise(DONTNEED) on every file after fsync; the disk's own and the hypervisor's caches stay as they are"
_BLOCK_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ReadCounters:
    """Bytes read by this process so far: asked for through system calls, and fetched from a device."""

    requested_nbytes: int
    device_nbytes: int


def read_counters() -> ReadCounters:
    """This process's counters; page faults of a mapping count as device bytes only."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return ReadCounters(int(fields["rchar"]), int(fields["read_bytes"]))


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file of the tree."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def evict(folder: Path) -> None:
    """Drop the tree's pages from the page cache, once they are clean; blocks until the tree is on the device."""
    for path in files_below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(folder: Path) -> None:
    """Read the tree once, so that the page cache holds it."""
    buffer = bytearray(_BLOCK_NBYTES)
    for path in files_below(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def tree_nbytes(folder: Path) -> int:
    """Sum of the sizes of the tree's files."""
    return sum(path.stat().st_size for path in files_below(folder))


def reset_peak_memory() -> bool:
    """Forget this process's peak resident size; False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_nbytes() -> int:
    """Resident size of this process now."""
    return _status_nbytes("VmRSS")


def peak_resident_nbytes() -> int:
    """Largest resident size since `reset_peak_memory`."""
    return _status_nbytes("VmHWM")


def _status_nbytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {field} in /proc/self/status")
