"""How saves beside training go: memory, limits, who writes."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from elastickpt.errors import Refused
from elastickpt.ranks.threads import IoPriority
from elastickpt.writer.plans import MIN_ARENA_NBYTES

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
            is for stores that only this process reaches.
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
