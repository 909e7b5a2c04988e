"""Which faults a job of `make chaos-recovery` has: phases and victims, at random, without spares; all drawn from a seed."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Phase = Literal["forward", "backward", "decided", "optimizer", "save", "mend", "form", "evaluate"]
Swap = Literal["microbatch", "step"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "decided", "optimizer", "save", "mend", "form", "evaluate")
IN_WORDS: Mapping[Phase, str] = {
    "decided": "between ready and commit",
    "optimizer": "inside the optimizer's step",
    "save": "during a save",
    "mend": "during a recovery",
    "form": "during the next formation",
    "evaluate": "evaluation",
}
STAGES, MICROBATCHES, EVERY = 6, 12, 3
VICTIMS: Mapping[str, tuple[int, ...]] = {
    "first": (0,),
    "second": (1,),
    "middle": (3,),
    "last": (5,),
    "embedding holder": (0,),
    "two adjacent": (2, 3),
    "two apart": (1, 4),
}
LADDERS = (
    ("partner", "checkfree", "stale", "rollback"),
    ("stale", "partner", "checkfree", "rollback"),
    ("rollback",),
)
SWAPS: tuple[Swap | None, ...] = (None, "microbatch", "microbatch", "step")
STOPPED_S = 4.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`step`: completed steps when it strikes; `nth`: how often the moment passes before; `after`: the number of the fault
    whose recovery it strikes in, None for one that needs none."""

    phase: Phase
    step: int
    stages: tuple[int, ...]
    nth: int = 0
    after: int | None = None
    signal: int = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Plan:
    """One job; `name` is what it is counted under. `spares` wait, and as many as are lost are started anew; with none, the
    job ends, and is started again."""

    name: str
    faults: tuple[Fault, ...]
    until: int
    swap: Swap | None
    rungs: tuple[str, ...]
    spares: int = 3
    evaluates: bool = False
    heartbeat_s: float = 60.0
    max_losses_of_step: int = 8
    max_stale_steps: int = 50

    @property
    def cases(self) -> int:
        """Faults that no other one stands for."""
        return len(self.faults) - sum(fault.after is not None for fault in self.faults)

    def to_json(self, folder: Path) -> str:
        policy = {name: getattr(self, name) for name in ("rungs", "max_losses_of_step", "max_stale_steps")}
        told = {"folder": str(folder), "microbatches": MICROBATCHES, "every": EVERY, "policy": policy}
        return json.dumps(asdict(self) | told)


def matrix(seed: int) -> list[Plan]:
    """Every phase with every victim, a job for each phase; those of the one holder of the embedding are a job of their own."""
    found = []
    for phase in PHASES:
        drawn = random.Random(f"{seed}/{phase}")
        cases = [(phase, stages) for name, stages in VICTIMS.items() if name != "embedding holder"]
        found.append(_plan(IN_WORDS.get(phase, phase), cases, drawn, swap="microbatch", rungs=LADDERS[0]))
    drawn = random.Random(f"{seed}/embedding holder")
    cases = [(phase, VICTIMS["embedding holder"]) for phase in PHASES]
    return [*found, _plan("the only holder of the embedding", cases, drawn, swap=None, rungs=LADDERS[1])]


def short(seed: int) -> list[Plan]:
    """One job with every phase, whose victims take turns; but none in a save, behind which writers wait for a minute."""
    drawn = random.Random(f"{seed}/short")
    phases = [phase for phase in PHASES if phase not in ("save", "evaluate")]
    cases = list(zip(phases, VICTIMS.values(), strict=False))
    plan = _plan("every phase once", cases, drawn, swap="microbatch", rungs=LADDERS[0])
    rolled_back = Fault("evaluate", plan.until - 1, VICTIMS["two adjacent"])  # the newest checkpoint is too old for `stale`
    before = (replace(fault, nth=0) if fault.phase == "form" else fault for fault in plan.faults)  # where nobody waits for it
    faults = (*before, rolled_back)
    return [replace(plan, faults=faults, until=plan.until + 1, evaluates=True, max_stale_steps=0)]


def at_random(seed: int, count: int, *, stops: bool) -> list[Plan]:
    """`count` faults, ten to a job; `stops`: by SIGSTOP."""
    found = []
    for number in range(0, count, 10):
        drawn = random.Random(f"{seed}/{number}/{stops}")
        cases = [(drawn.choice(PHASES), _victims(drawn)) for _ in range(min(10, count - number))]
        swap: Swap | None = drawn.choice(SWAPS)
        plan = _plan("SIGSTOP" if stops else "at random", cases, drawn, swap=swap, rungs=drawn.choice(LADDERS))
        if stops:
            plan = replace(
                plan, heartbeat_s=STOPPED_S, faults=tuple(replace(one, signal=signal.SIGSTOP) for one in plan.faults)
            )
        found.append(plan)
    return found


def without_spares(seed: int) -> list[Plan]:
    """Every victim, twice, and nobody to take its place."""
    found = []
    for name, stages in VICTIMS.items():
        drawn = random.Random(f"{seed}/{name}/none")
        for phase in drawn.sample([phase for phase in PHASES if phase not in ("mend", "form")], 2):
            swap: Swap | None = None if name == "embedding holder" else "microbatch"
            plan = _plan("without a spare", [(phase, stages)], drawn, swap=swap, rungs=LADDERS[0])
            found.append(replace(plan, spares=0))
    return found


def _victims(drawn: random.Random) -> tuple[int, ...]:
    return tuple(sorted(drawn.sample(range(STAGES), drawn.choices((1, 2, 3), (7, 2, 1))[0])))


def _plan(
    name: str,
    cases: Sequence[tuple[Phase, tuple[int, ...]]],
    drawn: random.Random,
    *,
    swap: Swap | None,
    rungs: tuple[str, ...],
) -> Plan:
    """Cases some steps apart, each behind a step that is saved; one that is struck in a save has another save before it. Who is
    to be lost in a recovery needs another one to be lost first."""
    faults: list[Fault] = []
    step = 0
    for phase, stages in cases:
        step += 2 * EVERY if phase == "save" else EVERY
        if phase in ("mend", "form"):
            other = drawn.choice([stage for stage in range(STAGES) if stage not in stages])
            faults.append(Fault("forward", step, (other,), drawn.randrange(6)))
            faults.append(Fault(phase, step, stages, drawn.randrange(12 if phase == "form" else 2), len(faults) - 1))
        else:
            times = {"forward": 12, "backward": 12, "evaluate": 12, "optimizer": 2, "save": 12}.get(phase, 1)
            faults.append(Fault(phase, step, stages, drawn.randrange(times)))
    evaluates = any(phase == "evaluate" for phase, _ in cases)
    return Plan(name, tuple(faults), step + EVERY + 2, swap, rungs, evaluates=evaluates)
