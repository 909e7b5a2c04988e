"""Which jobs a run consists of, decided from the options alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .state import SMALL_ELEMENTS, SMALL_TENSORS

Topic = Literal["save", "load", "reshard", "small", "async", "memory"]
Kind = Literal["same", "prepare", "reshard", "small", "async", "memory"]
TOPICS: tuple[Topic, ...] = ("save", "load", "reshard", "small", "async", "memory")
RESHARDS = ((2, 4), (4, 2))
QUICK_SIZES, FULL_SIZES = (100_000_000,), (100_000_000, 1_800_000_000)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder to measure in. `name` is what the tables say; `folder` never leaves this machine."""

    name: str
    folder: str
    file_system: str

    @property
    def has_device(self) -> bool:
        """Whether there is anything below the page cache, so that cold reads mean something."""
        return self.file_system not in ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Options:
    topics: tuple[Topic, ...]
    sizes: tuple[int, ...]  # bytes of the whole state
    ranks: tuple[int, ...]
    repeats: int
    contestants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """What one set of ranks does from its start to its end."""

    kind: Kind
    place: Place
    ranks: int
    from_ranks: int
    nbytes: int
    repeats: int
    contestants: tuple[str, ...]
    loads: bool = True

    @property
    def title(self) -> str:
        """In words, for progress lines."""
        layout = f"{self.from_ranks} → {self.ranks} ranks" if self.from_ranks != self.ranks else f"{self.ranks} ranks"
        if self.kind == "small":
            return f"{SMALL_TENSORS:,} small tensors, {layout}, {self.place.name}"
        who = f" of {self.contestants[0]}" if self.kind == "memory" else ""
        what = {"same": "save and load", "prepare": "save to reshard", "reshard": "resharding load", "memory": "memory"}
        what["async"] = "saves beside training"
        return f"{what[self.kind]}{who}, {self.nbytes / 1e9:g} GB, {layout}, {self.place.name}"


def jobs(options: Options, places: Sequence[Place]) -> tuple[Job, ...]:
    """All jobs, cheap ones first. A "prepare" job is always followed at once by the "reshard" job that needs it."""
    found: list[Job] = []

    def add(kind: Kind, place: Place, *, ranks: int, nbytes: int, from_ranks: int = 0, who: tuple[str, ...] = ()) -> None:
        loads = "load" in options.topics or kind != "same"
        who = who or options.contestants
        found.append(Job(kind, place, ranks, from_ranks or ranks, nbytes, options.repeats, who, loads=loads))

    for nbytes in sorted(options.sizes):
        for place in places:
            if "save" in options.topics or "load" in options.topics:
                for ranks in options.ranks:
                    add("same", place, ranks=ranks, nbytes=nbytes)
            if "async" in options.topics:
                for ranks in options.ranks:
                    add("async", place, ranks=ranks, nbytes=nbytes)
            if "reshard" in options.topics:
                for before, after in RESHARDS:
                    add("prepare", place, ranks=before, nbytes=nbytes)
                    add("reshard", place, ranks=after, from_ranks=before, nbytes=nbytes)
    for place in places:
        if "small" in options.topics:
            for ranks in options.ranks:
                add("small", place, ranks=ranks, nbytes=SMALL_TENSORS * SMALL_ELEMENTS * 4)
    if "memory" in options.topics and places:
        for ranks in options.ranks:
            for name in options.contestants:
                add("memory", places[0], ranks=ranks, nbytes=max(options.sizes), who=(name,))
    return tuple(found)


def _tree_nbytes(job: Job) -> int:
    return int(job.nbytes * 1.1) + (64 << 20)


def disk_nbytes(job: Job) -> int:
    """An upper bound of what a job keeps in its folder at one time, metadata included."""
    per_tree = _tree_nbytes(job)
    return per_tree * (len(job.contestants) + 2 if job.kind in ("prepare", "reshard") else 2)


def memory_nbytes(job: Job) -> int:
    """What the job's processes need at most: state, floor buffer, two copies inside a library, interpreters."""
    copies = 4 + (len(job.contestants) if job.kind == "async" else 0)  # each keeps its copy from save to save
    return job.nbytes * copies + job.ranks * (500 << 20)
