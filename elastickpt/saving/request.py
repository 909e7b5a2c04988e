"""What a caller asks for beside the state, whether chunks or packs follow from it, how saves beside training go, and what is
reported of the checkpoint. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, SupportsIndex, cast, get_args

from elastickpt.errors import PlacementUnsupported, Refused
from elastickpt.format.digest import block_checksum
from elastickpt.format.records import Placement
from elastickpt.format.values import as_integer, described
from elastickpt.ranks.team import require_limit
from elastickpt.ranks.threads import IoPriority
from elastickpt.storage.kernel import ONE_SIDED
from elastickpt.storage.store import Durability, Store
from elastickpt.writer.plans import MIN_ARENA_NBYTES

PlacementChoice = Literal["auto", "plain", "packed"]
Replicas = Literal["owner", "sample", "verify"]
SHARES = 16  # into so many what a sample looks at is divided


@dataclass(frozen=True, slots=True)
class Request:
    """Where to save, as the caller says it, and how."""

    path: str
    step: int | None
    placement: PlacementChoice = "auto"
    durability: Durability = "power"
    replicas: Replicas = "owner"
    wait_limit_s: float | None = None

    @property
    def compares_replicas(self) -> bool:
        """Whether contents of replicas are looked at."""
        return self.replicas != "owner"

    @property
    def share(self) -> int:
        """Which share of the replicas a sample looks at, in [0, SHARES): another one for another step or name, the same on all
        ranks, and not always the first ones in a job that is often restarted."""
        return block_checksum(f"{self.step} {self.path.rstrip('/').rpartition('/')[2]}".encode()) % SHARES

    def require_known(self) -> None:
        """Raises Refused kinds for what no caller that passes a type checker asks for, by name."""
        require_limit("wait_limit_s", self.wait_limit_s)
        if not self.path:
            raise Refused("path '': expected a folder to be made, found an empty text")
        if self.placement not in get_args(PlacementChoice):
            raise PlacementUnsupported(f"placement {self.placement!r}: expected 'auto', 'plain' or 'packed'")
        if self.durability not in get_args(Durability):
            raise Refused(f"durability {self.durability!r}: expected one of {', '.join(get_args(Durability))}")
        if self.replicas not in get_args(Replicas):
            raise Refused(f"replicas {self.replicas!r}: expected one of {', '.join(get_args(Replicas))}")
        if self.step is not None and (type(self.step) is not int or not 0 <= self.step < 1 << 63):
            raise Refused(f"step {described(self.step)}: expected None or the number of completed steps, an int from 0 on")


def step_of(step: SupportsIndex | None) -> int | None:
    """A step as callers have it, also numpy's integers and tensors of one; what is none is left for `require_known`."""
    return cast("int | None", as_integer(step))


Executor = Literal["process", "thread"]


@dataclass(frozen=True, slots=True)
class AsyncOptions:
    """How saves beside training go; the same on all ranks.

    Attributes:
        arenas: How many saves of a rank can be under way, each in host memory of its own.
        arena_nbytes: At most so much memory each; what does not fit goes in portions, of which all but the last keep the
            caller until they are written.
        stall_limit_s: How long a call waits for a free arena, and for other ranks where it must; in vain, the save is
            skipped on all ranks.
        executor: "process" writes in a process of its own, which finishes what was staged even when this one ends; "thread"
            is for stores that only this process reaches. It keeps three threads a store, and no descriptor beside the
            arena's, until the process or its process group ends; among several ranks also its connections.
        copy_threads: How many threads stage.
        niceness: Lowers the writer process's priority for the processor, 0 to 19.
        io: Its priority for the disk.
        exit_limit_s: How long the end of this process waits for saves under way; then they are left to their writers.

    Raises:
        Refused: A value means nothing.

    Examples:
        >>> options = ek.AsyncOptions(arenas=2, stall_limit_s=3.0)
        >>> ek.async_save(state, "out/step-2000", options=options).result().stall_s < 60
        True
    """

    arenas: int = 1
    arena_nbytes: int | None = None
    stall_limit_s: float = 10.0
    executor: Executor = "process"
    copy_threads: int = 1
    niceness: int = 0
    io: IoPriority = "normal"
    exit_limit_s: float = 10.0

    def __post_init__(self) -> None:
        _require_int("arenas", self.arenas, 1, 16)
        _require_int("copy_threads", self.copy_threads, 1, 64)
        _require_int("niceness", self.niceness, 0, 19)
        if self.arena_nbytes is not None:
            _require_int("arena_nbytes", self.arena_nbytes, MIN_ARENA_NBYTES, 1 << 48)
        for name in ("stall_limit_s", "exit_limit_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and value >= 0):
                raise Refused(f"AsyncOptions: {name} {value!r}: expected seconds, a finite number from 0 on")
        for name, allowed in (("executor", get_args(Executor)), ("io", get_args(IoPriority))):
            if getattr(self, name) not in allowed:
                raise Refused(f"AsyncOptions: {name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"AsyncOptions: {name} {value!r}: expected an int in [{low}, {high}]")


DEFAULT = AsyncOptions()


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        path: Absolute, or a URL.
        step: As it was given.
        attempt: Identifies this try to write it.
        nbytes: Bytes of arrays of all ranks.
        arrays: How many arrays.
        plan_s: Seconds of this rank until it wrote; all times are this rank's.
        write_s: Seconds that it wrote. A large state is written while it is staged: this then begins within `stall_s`.
        commit_s: Seconds from then to the commit.
        stall_s: How long the call kept its caller: a blocking save for all of it, one beside training while it staged.
        notes: What else was found or done, such as drafts that were swept or left.

    Examples:
        >>> info = ek.save(state, "out/step-3000", step=3000)
        >>> info.step, info.arrays, info.nbytes
        (3000, 2, 80)
    """

    path: str
    step: int | None
    attempt: str
    nbytes: int
    arrays: int
    plan_s: float
    write_s: float
    commit_s: float
    stall_s: float
    notes: tuple[str, ...] = ()


MANY_PARTS = 5_000  # pairs of a writer and a file: from here on `auto` makes packs

PlacementRule = Literal["plain", "packed", "by number"]


@dataclass(frozen=True, slots=True)
class Placing:
    """By which rule the placement follows: "by number" of the pairs of a writer and a file. `why`: of packs that nobody asked
    for."""

    rule: PlacementRule
    why: str = ""

    def placement(self, file_parts: int) -> Placement:
        """Where plain placement would have so many pairs."""
        return self.rule if self.rule != "by number" else "packed" if file_parts >= MANY_PARTS else "plain"

    def note(self, file_parts: int) -> str:
        """What is to be said of it; "" for nothing."""
        if self.rule == "by number" and self.placement(file_parts) == "packed":
            return f"placement 'packed', as 'plain' would make {file_parts} pairs of a writer and a file"
        return f"placement 'packed', as {self.why}" if self.why else ""


PLAIN = Placing("plain")


def choose(asked: PlacementChoice, store: Store, *, ranks: int, hosts: int) -> Placing:
    """The rule for a save by so many ranks on so many hosts. Raises PlacementUnsupported where there is none."""
    able = store.capabilities
    if not able.no_replace_rename:
        raise PlacementUnsupported(
            f"{store.url} ({able.name}): expected a store with a rename that replaces nothing, by which a checkpoint comes to "
            "exist at once or not at all; other stores are not supported yet"
        )
    against = _against_plain(store, ranks=ranks, hosts=hosts)
    if asked == "packed":
        return Placing("packed")
    if asked == "auto":
        why = against or _against_auto(store)
        if why:
            return Placing("packed", f"{store.url}: {why}")
        return Placing("by number")
    if against:
        raise PlacementUnsupported(f"{store.url}: {against}; choose placement 'packed'")
    return Placing("plain")


def _against_auto(store: Store) -> str:
    """Why `auto` makes packs there, although plain placement is possible; "" if it does not."""
    able = store.capabilities
    if able.name in ONE_SIDED:
        return f"files on file system {able.name!r} must not be filled from several sides"
    if able.name.startswith("0x") and not able.directory_sync:
        return f"file system {able.name} is not known, and cannot sync a folder"
    return ""


def _against_plain(store: Store, *, ranks: int, hosts: int) -> str:
    """Why several writers cannot fill one file there; "" if they can."""
    able = store.capabilities
    if not able.ranged_writes:
        return f"{ranks} rank{'s' if ranks > 1 else ''} cannot fill ranges of one file on {able.name!r}"
    if hosts > 1 and not able.shared_by_hosts:
        return (
            f"ranks on {hosts} hosts write over file system {able.name!r}, which is not on the list of those where hosts may "
            "fill one file together (lustre, gpfs)"
        )
    return ""
