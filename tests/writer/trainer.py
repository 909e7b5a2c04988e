"""A trainer that stages and submits one save, tells the process id of its writer, and waits for its end; as a rank process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

BOUND_S = 60.0


def state_of(seed: int) -> dict[str, object]:
    from staged import big_state

    return big_state(2, seed=seed)


def trains(rank: int, world_size: int, folder: str, hook: str, lease_s: float, forks: bool) -> None:
    """`hook` of its writer; without one nothing is saved. What it tells is in `folder.writer`."""
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # its writer finds its faults there
    from staged import Rank, begun

    from elastickpt.saving.staging import Stager
    from elastickpt.writer.child import WriterOptions
    from elastickpt.writer.supervisor import Supervisor

    supervisor = Supervisor(WriterOptions(beat_s=0.1, lease_s=lease_s, hooks=(hook,) if hook else ()))
    if hook:
        rank_ = Rank.of(state_of(1))
        arena = rank_.arena()
        store, draft = begun(Path(folder), "c")
        arena.empty()
        Stager(rank_.prepared).stage(arena, 0, rank_.live.arrays)
        before = set(Path(folder).rglob("*"))
        supervisor.submit(rank_.staged(draft, store, 0, b"", "power"), arena)
        while set(Path(folder).rglob("*")) == before:  # what the writer has begun, it was told whole
            time.sleep(0.01)
    while supervisor.pid is None:
        time.sleep(0.01)
    if forks and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    told = Path(f"{folder}.writer")
    told.with_suffix(".part").write_text(str(supervisor.pid))
    told.with_suffix(".part").rename(told)
    time.sleep(2 * BOUND_S)
