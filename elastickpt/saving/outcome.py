"""What is said of a save beside training that was committed."""

from __future__ import annotations

import logging

from elastickpt.commit.orders import Committed
from elastickpt.saving.info import CheckpointInfo
from elastickpt.saving.task import Ordered, Task

log = logging.getLogger(__name__)


def info_of(task: Task, ordered: Ordered, outcome: Committed, at: float) -> CheckpointInfo:
    """Its one line in the log, and what its handle returns; `at` is when it was known to be committed."""
    times = task.times
    submitted, written = times.submitted or times.staged, times.written or at
    stall = times.staged - times.begun
    for note in ordered.notes:
        log.warning("%s: %s", ordered.path, note)
    log.log(
        logging.INFO if ordered.known.encoded_outline else logging.DEBUG,  # member 0 says it for all
        "saved %s: %d arrays, %.3f GB; staged in %.3f s, written at %.2f s, committed at %.2f s (%.2f GB/s), stall %.3f s",
        *(ordered.path, outcome.arrays, outcome.nbytes / 1e9),
        *(stall, written - times.begun, at - times.begun, outcome.nbytes / 1e9 / max(at - times.begun, 1e-9), stall),
    )
    return CheckpointInfo(
        path=ordered.path,
        step=task.request.step,
        attempt=ordered.draft.attempt,
        nbytes=outcome.nbytes,
        arrays=outcome.arrays,
        plan_s=max(0.0, submitted - times.staged),
        write_s=max(0.0, written - submitted),
        commit_s=max(0.0, at - written),
        stall_s=stall,
        notes=ordered.notes,
    )
