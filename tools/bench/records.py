"""What a run leaves behind: one `Report` of measures, and its JSON form.

A measure is (case, cache, place, ranks, from_ranks, nbytes) x contestant. Floors are measures like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, cast

Case = Literal["save", "load", "reshard", "small save", "small load", "stall", "async save", "slow-down", "copy"]
Cache = Literal["cold", "warm", "none"]
Finish = Callable[[], None]  # waits until what was begun has ended
Durability = Literal["power", "files", "none", "floor"]

SCHEMA_VERSION = 1
CASES: tuple[Case, ...] = ("save", "load", "reshard", "small save", "small load", "stall", "async save", "slow-down", "copy")
RAW, OWN = ("raw buffered", "raw 1 MiB", "raw direct"), ("own buffered", "own direct")  # floors that are files
FLOORS = (*RAW, *OWN, "memcpy")
PAST_CACHE = ("raw direct", "own direct")  # nothing of these is ever warm


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured, apart from who did it. `from_ranks` differs from `ranks` for a resharding load only."""

    case: Case
    cache: Cache
    place: str
    ranks: int
    from_ranks: int
    nbytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Measure:
    """All repeats of one contestant in one setting, slowest rank counted.

    seconds: from the first rank's start to the last rank's end, one per repeat.
    requested_nbytes, device_nbytes: read by all ranks through system calls and from the device, one per repeat.
    error: why there are no (more) repeats.
    """

    setting: Setting
    contestant: str
    seconds: tuple[float, ...]
    requested_nbytes: tuple[int, ...] = ()
    device_nbytes: tuple[int, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Growth of resident memory over the state itself, of the rank that grew most. `kept`: what stays after it."""

    contestant: str
    place: str
    ranks: int
    state_nbytes: int
    first_peak_nbytes: int
    later_peak_nbytes: int
    kept_nbytes: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contestant as it took part: its version, settings, and what its save promises after a power cut."""

    name: str
    version: str
    settings: str
    durability: Durability
    absent_because: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine in words; names neither a host nor a path."""

    cores: int
    memory_gb: int
    places: tuple[tuple[str, str], ...]  # (place, file system type)
    system: str
    python: str
    torch: str


@dataclass(frozen=True, slots=True)
class Report:
    date: str
    repeats: int
    cold_by: str
    machine: Machine
    entrants: tuple[Entrant, ...]
    measures: tuple[Measure, ...]
    memories: tuple[Memory, ...]
    notes: tuple[str, ...] = ()


def to_json(report: Report) -> str:
    """The report as indented JSON text with its schema version first."""
    return json.dumps({"schema": SCHEMA_VERSION, **asdict(report)}, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote. ValueError: another schema; KeyError, TypeError: other members."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"expected schema {SCHEMA_VERSION} in the file, found {tree.get('schema')!r}")
    machine = dict(tree["machine"])
    machine["places"] = tuple((place, kind) for place, kind in machine["places"])
    return Report(
        date=tree["date"],
        repeats=tree["repeats"],
        cold_by=tree["cold_by"],
        machine=Machine(**machine),
        entrants=tuple(Entrant(**entrant) for entrant in tree["entrants"]),
        measures=tuple(_measure(measure) for measure in tree["measures"]),
        memories=tuple(Memory(**memory) for memory in tree["memories"]),
        notes=tuple(tree["notes"]),
    )


def _measure(tree: Mapping[str, object]) -> Measure:
    setting = cast("Mapping[str, object]", tree["setting"])
    return Measure(
        setting=Setting(**cast("dict[str, str | int]", setting)),  # type: ignore[arg-type]
        contestant=str(tree["contestant"]),
        seconds=tuple(cast("list[float]", tree["seconds"])),
        requested_nbytes=tuple(cast("list[int]", tree["requested_nbytes"])),
        device_nbytes=tuple(cast("list[int]", tree["device_nbytes"])),
        error=cast("str | None", tree["error"]),
    )
