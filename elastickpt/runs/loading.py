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
from elastickpt.ranks.process_group import job_group, team_of
from elastickpt.ranks.team import Call, Question, require_limit
from elastickpt.runs.opening import checkpoint_path, folder_of

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
    """Fills `state` in place with a checkpoint, at the layout that `state` has now. Blocking.

    Every rank of the process group must call it with the same path and options. All that can be checked is checked on all
    ranks before the first tensor changes.

    Args:
        state: What to fill: as `save` takes it, built as for training. Tensors keep their devices and shardings.
        path: The folder or URL of a checkpoint, or one of a run: `RUN`, `RUN@latest`, `RUN@900`, `RUN@900.3` (of epoch 3).
            Rank 0 chooses which one that is, for all ranks; the run is not claimed. A checkpoint of a run that is damaged
            is an error here: `Run.restore` is what falls back to an older one.
        step: Instead of a step in `path`.
        epoch: Instead of an epoch in `path`.
        process_group: Whose ranks load; by default all.
        mesh: Ranks over which plain tensors are declared to be replicas.
        strict: Which differences of names are errors. "all": any; "missing": what `state` has and the checkpoint lacks;
            "unexpected": the other way round; "none": only shapes and element types.
        verify: "off" skips the checksums of blocks, for measuring.
        wait_limit_s: For how many seconds ranks that come later are waited for while their processes live; by default as
            long as a collective of the process group waits.

    Returns:
        What was loaded, and what could not come back exactly. The same on all ranks but for byte counts and times.

    Raises:
        StateMismatch: `state` and checkpoint differ; every difference is named, and nothing was changed.
        NotACheckpoint: Nothing is at `path`; the nearest steps of a run are named.
        Unsupported: A later release wrote it.
        Damaged: It is not what was written; the kind, file and block are named.
        StorageFailed: The store does not answer.
        RanksFailed: Some ranks failed, or are gone. All of these are the same on every rank, with a `report`. An error
            while tensors are being filled says that the content of `state` is now undefined.

    Examples:
        >>> report = ek.load(state, "out/step-1000")
        >>> report.step
        1000
        >>> ek.load({"model": model}, "runs/llama@latest", strict="missing").step
        900
    """
    group = job_group(process_group)
    team = team_of(group)
    team.enter(Call(f"load of {os.fspath(path)}", *group.limit(wait_limit_s)))

    folder = CHOOSE.ask(
        team, lambda: require_limit("wait_limit_s", wait_limit_s), lambda _: folder_of(path, step=step, epoch=epoch)
    )
    chosen = checkpoint_path(path, folder, step=step) if folder else path
    return load_folder(
        state, chosen, process_group=process_group, mesh=mesh, strict=strict, verify=verify, wait_limit_s=wait_limit_s
    )


def load_alone(state: Mapping[str, object], path: str | os.PathLike[str], *, strict: Strict = "missing") -> LoadReport:
    """Fills `state` in place with a checkpoint, by this process alone: no other rank of the job is asked. Blocking.

    For one rank that is to have what it lost while the others go on. What is read is what this rank holds, found by
    fragment maps.

    Args:
        state: May be a part of what the checkpoint has. Of a DTensor this rank's local part is filled, wherever its mesh
            lies in the job. What is each rank's own comes back as it was where the job has as many ranks as the one that
            saved, and this one holds some of what the rank of its number held; else as for another layout.
        path: What `load` takes.
        strict: As for `load`; "missing" asks only that the checkpoint has all of `state`.

    Returns:
        What was loaded, as `load` returns it.

    Raises:
        StateMismatch: They differ; nothing was changed.
        NotACheckpoint: Nothing is at `path`.
        Unsupported: A later release wrote it.
        Damaged: It is not what was written.
        StorageFailed: The store does not answer. All of these on this rank only; after an error while tensors are being
            filled the content of `state` is undefined, as the message says.

    Examples:
        >>> ek.elastic.load_alone({"model": model}, "out/step-1000").step
        1000
    """
    folder = folder_of(path)
    return load_folder_alone(state, checkpoint_path(path, folder) if folder else path, strict=strict)
