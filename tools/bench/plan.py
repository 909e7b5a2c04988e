"""Which jobs a run consists of, decided from the options alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from .state import SMALL_ELEMENTS, SMALL_TENSORS

Topic = Literal["save", "load", "reshard", "small", "async", "memory"]
Kind = Literal["same", "prepare", "reshard", "small", "async", "memory"]
TOPICS: tuple[Topic, ...] = ("save", "load", "reshard", "small", "async", "memory")
RESHARDS = ((2, 4), (4, 2))
SMALL, LARGE = 100_000_000, 1_800_000_000  # bytes of a state


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
class Part:
    """Some topics, each at all of these sizes and numbers of ranks, in all of these places."""

    topics: tuple[Topic, ...]
    sizes: tuple[int, ...] = (SMALL,)  # bytes of the whole state
    ranks: tuple[int, ...] = (2, 4)
    places: tuple[str, ...] = ("disk", "tmpfs")


USUAL = (  # what matters most first
    Part(("save", "load"), (LARGE,), places=("disk",)),
    Part(("reshard", "async"), (LARGE,), ranks=(2,), places=("disk",)),
    Part(("save", "load", "reshard"), (SMALL,), places=("disk",)),
    Part(("small",), ranks=(1, 2)),
    Part(("async",), (SMALL,), places=("disk",)),
    Part(("save", "load"), (LARGE,), ranks=(2,), places=("tmpfs",)),
    Part(("save", "load", "reshard"), (SMALL,), places=("tmpfs",)),
)
USUAL_MINUTES = 22  # in which its jobs begin; the longest one takes about three


@dataclass(frozen=True, slots=True)
class Options:
    """Some parts, by whom and how often."""

    parts: tuple[Part, ...]
    repeats: int
    contestants: tuple[str, ...]
    minutes: float | None = None  # in which jobs may begin


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
    """All jobs, part by part. A "prepare" job is always followed at once by the "reshard" job that needs it."""
    return tuple(job for part in options.parts for job in _jobs_of(part, options, places))


def _jobs_of(part: Part, options: Options, places: Sequence[Place]) -> Iterator[Job]:
    def one(kind: Kind, place: Place, ranks: int, nbytes: int, from_ranks: int = 0, who: tuple[str, ...] = ()) -> Job:
        loads = "load" in part.topics or kind != "same"
        return Job(kind, place, ranks, from_ranks or ranks, nbytes, options.repeats, who or options.contestants, loads=loads)

    where = [place for place in places if place.name in part.places]
    for nbytes, place in product(sorted(part.sizes), where):
        if "save" in part.topics or "load" in part.topics:
            yield from (one("same", place, ranks, nbytes) for ranks in part.ranks)
        if "async" in part.topics:
            yield from (one("async", place, ranks, nbytes) for ranks in part.ranks)
        if "reshard" in part.topics:
            for before, after in RESHARDS:
                yield one("prepare", place, before, nbytes)
                yield one("reshard", place, after, nbytes, from_ranks=before)
    if "small" in part.topics:
        yield from (
            one("small", place, ranks, SMALL_TENSORS * SMALL_ELEMENTS * 4) for place, ranks in product(where, part.ranks)
        )
    if "memory" in part.topics and where:
        for ranks, name in product(part.ranks, options.contestants):
            yield one("memory", where[0], ranks, max(part.sizes), who=(name,))


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
