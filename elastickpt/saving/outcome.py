"""What is said of a save beside training that was committed."""

from __future__ import annotations

import logging

from elastickpt.commit.attempt import Committed
from elastickpt.errors import Refused
from elastickpt.saving.info import CheckpointInfo
from elastickpt.saving.task import Task

log = logging.getLogger(__name__)


def info_of(task: Task, outcome: Committed, at: float) -> CheckpointInfo:
    """Its one line in the log, and what its handle returns; `at` is when it was known to be committed."""
    times, pipeline = task.times, task.pipeline
    if pipeline is None:
        raise Refused("a save was committed of which no rank was asked")
    submitted, written = times.submitted or times.staged, times.written or at
    stall = times.staged - times.begun
    log.log(
        logging.INFO if pipeline.team.member == 0 else logging.DEBUG,  # which says it for all
        "saved %s: %d arrays, %.3f GB; staged in %.3f s, written at %.2f s, committed at %.2f s (%.2f GB/s), stall %.3f s",
        *(pipeline.path, outcome.arrays, outcome.nbytes / 1e9),
        *(stall, written - times.begun, at - times.begun, outcome.nbytes / 1e9 / max(at - times.begun, 1e-9), stall),
    )
    return CheckpointInfo(
        path=pipeline.path,
        step=task.request.step,
        attempt=pipeline.opened.attempt.id,
        nbytes=outcome.nbytes,
        arrays=outcome.arrays,
        plan_s=max(0.0, submitted - times.staged),
        write_s=max(0.0, written - submitted),
        commit_s=max(0.0, at - written),
        stall_s=stall,
        notes=pipeline.notes,
    )
