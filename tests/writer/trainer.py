"""A trainer that stages and submits one save, says its writer's process id, and waits for its end.

trainer.py FOLDER HOOK ARGUMENT LEASE_S [fork]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

BOUND_S = 60.0


def state_of(seed: int) -> dict[str, object]:
    from staged import big_state

    return big_state(2, seed=seed)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from staged import Rank, begun

    from elastickpt.saving.staging import Stager
    from elastickpt.testing.writer_hooks import hook
    from elastickpt.writer.child import WriterOptions
    from elastickpt.writer.supervisor import Supervisor

    folder, name, argument, lease, fork = sys.argv[1:6]
    hooks = (hook(name, argument),) if name else ()
    supervisor = Supervisor(WriterOptions(beat_s=0.1, lease_s=float(lease), hooks=hooks))
    if name:
        rank = Rank.of(state_of(1))
        arena = rank.arena()
        store, draft = begun(Path(folder), "c")
        arena.empty()
        Stager(rank.prepared).stage(arena, 0, rank.live.arrays)
        before = set(Path(folder).rglob("*"))
        supervisor.submit(rank.staged(draft, store, 0, b"", "power"), arena)
        while set(Path(folder).rglob("*")) == before:  # what the writer has begun, it was told whole
            time.sleep(0.01)
    while supervisor.pid is None:
        time.sleep(0.01)
    if fork and os.fork() == 0:
        os.close(1)
        time.sleep(20)
        os._exit(0)
    print(supervisor.pid, flush=True)
    time.sleep(2 * BOUND_S)


if __name__ == "__main__":
    main()
