"""`async_save`: stage now, write and commit beside training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, SupportsIndex

from elastickpt.commit.destination import PathDestination
from elastickpt.ranks.process_group import job_group
from elastickpt.saving.handle import SaveHandle
from elastickpt.saving.options import DEFAULT, AsyncOptions
from elastickpt.saving.request import PlacementChoice, Replicas, Request, step_of
from elastickpt.saving.savers import saver_of
from elastickpt.storage.store import Durability

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def async_save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: PlacementChoice = "auto",
    durability: Durability = "power",
    replicas: Replicas = "owner",
    options: AsyncOptions = DEFAULT,
) -> SaveHandle:
    """Takes a copy of `state` and returns; the checkpoint at `path` comes beside training.

    On return host tensors may change. Tensors of a GPU may be read but not changed before `SaveHandle.wait_staged`, for
    which a step of any `torch.optim.Optimizer` waits by itself. The call blocks for the copy, for at most `stall_limit_s`
    until there is memory for it, and for a pass over tensors that are to be compared with other ranks (a GPU does it by
    itself); the first save of a structure, and one that goes in portions, also until all ranks agreed on it, for at most
    `stall_limit_s` again.

    The writer has the save when the ranks agreed on it, some milliseconds after the call returned: what is staged is lost
    if the process is killed before (its own end waits for that), and finished whatever becomes of it from then on.

    Every rank of the process group must call it with the same arguments, and in the same order as other saves.

    Args:
        state: As for `save`.
        path: As for `save`.
        step: As for `save`.
        process_group: As for `save`.
        mesh: As for `save`.
        placement: As for `save`.
        durability: As for `save`.
        replicas: As for `save`.
        options: Memory, limits, and who writes; the same on all ranks.

    Returns:
        The save under way; what goes wrong in it the handle says, on all ranks alike.

    Raises:
        Refused: This process is not in the group, or its savers have ended.

    Examples:
        >>> handle = ek.async_save(state, "out/step-2000", step=2000)
        >>> handle.result().step
        2000
    """
    saver = saver_of(job_group(process_group), options)
    destination = PathDestination.of(path, step_of(step))
    request = Request(destination.place, destination.step, placement, durability, replicas)
    return saver.save(state, destination, request, mesh=mesh)
