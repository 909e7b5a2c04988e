"""`ek.load`: what people write for a checkpoint, a run's too, as `ek.open` takes it; then as `load.session` loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, SupportsIndex

from elastickpt.loading.fetch import Verify
from elastickpt.loading.session import LoadReport, Strict
from elastickpt.loading.session import load as load_folder
from elastickpt.loading.session import load_alone as load_folder_alone
from elastickpt.ranks.process_group import job_group
from elastickpt.ranks.questions import Question
from elastickpt.ranks.team import Call, require_limit
from elastickpt.ranks.teams import team_of
from elastickpt.runs.opening import folder_of, place_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


CHOOSE = Question("choose", NoneType, str)


def load(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    epoch: SupportsIndex | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    strict: Strict = "all",
    verify: Verify = "on",
    wait_limit_s: float | None = None,
) -> LoadReport:
    """Fills `state` in place with the checkpoint at `path`, at the layout that `state` has now, on all ranks. Blocking.

    `path` is the folder or URL of a checkpoint, or one of a run: `RUN`, `RUN@latest`, `RUN@900`, `RUN@900.3`, or `step=`,
    `epoch=`, as `ek.open` takes them. Rank 0 chooses which one that is, for all ranks; the run is not claimed, and a checkpoint
    of it that is damaged is an error: `Run.restore` is what falls back to an older one.

    Every rank of the process group must call it with the same path and options. Everything that can be checked is checked on
    all ranks before the first tensor changes. `strict`: "all" differences are errors; "missing": those of `state` that the
    checkpoint lacks, but not what it has beside; "unexpected": the other way round; "none": only shapes and element types.
    `verify="off"` skips block checksums, for measuring. `wait_limit_s`: for how long ranks that come later are waited for while
    their processes live; without it as long as a collective of the process group waits.

    Raises, the same on every rank with a `report`: StateMismatch naming every difference (nothing was changed),
    NotACheckpoint, naming the nearest steps of a run, Unsupported, Damaged kinds, StorageFailed kinds, RankLost. An error while
    tensors are being filled says that the content of `state` is now undefined.
    """
    require_limit("wait_limit_s", wait_limit_s)
    group = job_group(process_group)
    team = team_of(group)
    team.enter(Call(f"load of {os.fspath(path)}", *group.limit(wait_limit_s)))

    folder = CHOOSE.ask(team, lambda: None, lambda _: folder_of(path, step=step, epoch=epoch))
    chosen = place_of(path, folder, step=step) if folder else path
    return load_folder(
        state, chosen, process_group=process_group, mesh=mesh, strict=strict, verify=verify, wait_limit_s=wait_limit_s
    )


def load_alone(state: Mapping[str, object], path: str | os.PathLike[str], *, strict: Strict = "missing") -> LoadReport:
    """Fills `state` in place with the checkpoint at `path`, by this process alone: no other rank of the job is asked. Blocking.

    For one rank that is to have what it lost while the others go on. `path` is what `load` takes. `state` may be a part of what
    the checkpoint has; with `strict="missing"` only what `state` has and the checkpoint lacks is a difference. Of a DTensor
    this rank's local part is filled, wherever its mesh lies in the job. What is each rank's own comes back as it was where the
    job has as many ranks as the one that saved, and this one holds some of what the rank of its number held; else as for
    another layout.

    What is read is what this rank holds, found by fragment maps. Raises StateMismatch (nothing was changed), NotACheckpoint,
    Unsupported, Damaged kinds, StorageFailed kinds, here only. After an error while tensors are being filled the content of
    `state` is undefined, as the message says.
    """
    folder = folder_of(path)
    return load_folder_alone(state, place_of(path, folder) if folder else path, strict=strict)
