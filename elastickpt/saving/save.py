"""`save`: the pipeline from live tensors, and the commit in one more round; whole or absent, on all ranks together. [SAVE-3,
SAVE-54]

Nothing is staged. A unit that goes past the page cache is gathered into a cache-sized, page-congruent buffer, unless the memory
is fit as it is; what is contiguous and goes through the cache is taken in place. Memory beside the state: threads times
UNIT_NBYTES.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from elastickpt.commit.attempt import Committed, PathDestination, require_idle
from elastickpt.commit.draft import require_token
from elastickpt.commit.outcome import commit
from elastickpt.errors import RanksFailed
from elastickpt.format.memory_views import address_of, bytes_at
from elastickpt.ranks.process_group import Group, job_group, team_of
from elastickpt.ranks.team import Call, Question, Team
from elastickpt.saving.agree import Offer
from elastickpt.saving.messages import Attested
from elastickpt.saving.pipeline import Pipeline
from elastickpt.saving.request import CheckpointInfo, PlacementChoice, Replicas, Request, step_of
from elastickpt.saving.staging import AnyArray, Bytes, PiecePlace, flat_bytes, gather, part_of
from elastickpt.saving.structures import KnownStructure, propose
from elastickpt.storage.kernel import MIN_DIRECT_NBYTES, huge_buffer
from elastickpt.storage.opening import path_in
from elastickpt.storage.store import Durability, Store
from elastickpt.training.collection import collection_paused
from elastickpt.training.elements import host_address, host_elements
from elastickpt.training.held import HeldArray
from elastickpt.writer.plans import PAGE, Slice, WritePlan
from elastickpt.writer.share import Share, write_whole_share
from elastickpt.writer.write_files import Source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class LiveTensors(Source):
    """For a store. `elements(i)` are those of held array i, in host memory."""

    def __init__(self, plan: WritePlan, elements: Callable[[int], AnyArray], store: Store) -> None:
        self._plan = plan
        self._elements = elements
        # from so many bytes on a range goes past the page cache of this store, and memory has to lie like the file
        # (`write_packs` lays a pack's bytes itself)
        lies = store.capabilities.past_cache and plan.pack is None
        self._congruent_nbytes = MIN_DIRECT_NBYTES if lies else math.inf
        self._buffers = threading.local()

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        """The bytes, in place where the memory is contiguous and congruent to the file, else gathered."""
        piece = self._plan.files[at.file].pieces[at.piece]
        part = part_of(self._elements(piece.array), piece.local)
        flat = flat_bytes(part)
        offset = piece.run.offset + start
        if flat is not None:
            data = flat[start:stop]
            if stop - start < self._congruent_nbytes or (address_of(data.data) - offset) % PAGE == 0:
                return data
        shift = offset % PAGE
        into = self._buffer(shift + stop - start)[shift:]
        if flat is not None:
            np.copyto(into, flat[start:stop])
        else:
            gather(part, start, into)
        return into

    def _buffer(self, nbytes: int) -> Bytes:
        """This thread's memory, so many bytes of it from a page's beginning on, on huge pages where the system has them."""
        found: Bytes | None = getattr(self._buffers, "unit", None)
        if found is None or found.size < nbytes:
            found = huge_buffer(nbytes)
            self._buffers.unit = found
        return found[:nbytes]


class LivePack(LiveTensors):
    """The same for a pack, whose pieces are found by address: a view of a tensor costs more than to copy 1 KiB. `places` are
    those of its pieces, as `places_of` has them."""

    def __init__(self, plan: WritePlan, held: Sequence[HeldArray], store: Store, places: Sequence[PiecePlace]) -> None:
        self._held = held
        self._hosts: list[AnyArray | None] = [None if one.tensor.is_cpu else host_elements(one.tensor) for one in held]
        super().__init__(plan, self._host, store)
        self._places = places
        self._addresses = [host_address(one.tensor) for one in held]

    def _host(self, array: int) -> AnyArray:
        found = self._hosts[array]
        if found is None:
            found = self._hosts[array] = host_elements(self._held[array].tensor)
        return found

    def take(self, at: Slice, start: int, stop: int) -> Bytes:
        array, offset = self._places[at.piece]
        base = self._addresses[array]
        if base is None or offset is None:
            return super().take(at, start, stop)
        return bytes_at(base + offset + start, stop - start, self._held[array])

    def gather(self, slices: Sequence[Slice], places: Sequence[int], into: Bytes) -> None:
        target, memmove, addresses, sources = address_of(into.data), ctypes.memmove, self._addresses, self._places
        for at, place in zip(slices, places, strict=True):
            array, offset = sources[at.piece]
            base = addresses[array]
            if base is None or offset is None:
                super().gather((at,), (place,), into)
            else:
                memmove(target + place, base + offset + at.start, at.stop - at.start)


log = logging.getLogger(__name__)

WRITE = Question("write", Attested, Committed)


def save(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: PlacementChoice = "auto",
    durability: Durability = "power",
    replicas: Replicas = "owner",
    wait_limit_s: float | None = None,
) -> CheckpointInfo:
    """Saves `state`; on return the checkpoint exists at `path`, whole and as durable as asked. Blocking.

    Every rank of the process group must call it with the same path, step and options. `state` is not changed, and no
    training code runs. Of what ranks are declared to hold alike (a placement, DDP, `mesh`) each byte is written by one of
    them. Tensors of one name that nothing declares to be replicas are compared in every save, for a pass over their memory,
    and refused if they differ. Buffers of DDP and `fully_shard` may differ: the first rank's are saved, and a note names
    those that nothing keeps equal.

    Args:
        state: Names to modules, optimizers, schedulers, tensors, nested containers and plain values; see the README's
            table.
        path: The folder or URL of the checkpoint; nothing may be there. Missing parents are made.
        step: The number of completed optimizer steps, for people and for `load`.
        process_group: Whose ranks save; by default all.
        mesh: Ranks over which plain tensors are declared to be replicas.
        placement: "plain" gives each array's chunks files of their own, which any zarr reader opens; "packed" puts all that
            a rank writes into one file, which is faster for many arrays, and safe where a file must not be filled from
            several sides. "auto" is "plain" where that is safe and makes fewer than 5,000 pairs of a rank and a file, else
            "packed", and a note says why.
        durability: "power" survives a power cut, "process" only the end of processes. A store that cannot promise "power"
            gives "process", and a note says so.
        replicas: "owner" trusts what is declared; "verify" compares all of it first and refuses the save if some differs;
            "sample" compares another sixteenth in each save, and a note names what differs.
        wait_limit_s: For how many seconds ranks that come later are waited for while their processes live; by default as
            long as a collective of the process group waits. After 10 s, and again, a warning names them.

    Returns:
        The checkpoint. Unless an error says that it is committed, nothing stands at `path` after one.

    Raises:
        Refused: `state` or an argument cannot be accepted; nothing was written. Its kinds say which.
        StorageFailed: The store said no.
        RanksFailed: Ranks failed, or are gone. All of these are the same on every rank, with a `report` of those that
            failed.
        DeadlineExceeded: Ranks did not come in time.

    Examples:
        >>> info = ek.save(state, "out/step-2000", step=2000)
        >>> info.step, info.arrays
        (2000, 2)
    """
    with collection_paused():
        group = job_group(process_group)
        team = team_of(group)
        team.enter(Call(f"save to {os.fspath(path)}", *group.limit(wait_limit_s)))
        request = Request(os.fspath(path), step_of(step), placement, durability, replicas, wait_limit_s)
        return save_with(team, group, request, state, mesh)


def save_with(
    team: Team, group: Group, request: Request, state: Mapping[str, object], mesh: DeviceMesh | None
) -> CheckpointInfo:
    """The same with a team that has entered the call."""
    begun = time.perf_counter()
    pipeline = Pipeline(team, request, ready=lambda _: True)  # nothing is staged

    def capture() -> Offer:
        proposal = propose(state, mesh, rank=group.rank, world_size=group.world_size)
        located = PathDestination(request.path, request.step).locate()  # last, as it makes missing parents
        require_idle(path_in(located.store, located.name))
        return Offer(proposal, located)

    try:
        pipeline.agree(capture)
        pipeline.open()
        planned = time.perf_counter()
        committed, written = _write_and_commit(pipeline)
    except BaseException as error:
        pipeline.give_up(error)
        raise
    ended = time.perf_counter()
    info = CheckpointInfo(
        path=pipeline.path,
        step=request.step,
        attempt=pipeline.opened.attempt.id,
        nbytes=committed.nbytes,
        arrays=committed.arrays,
        plan_s=planned - begun,
        write_s=written - planned,
        commit_s=ended - written,
        stall_s=ended - begun,
        notes=pipeline.notes,
    )
    rate = info.nbytes / 1e9 / max(info.stall_s, 1e-9)
    words = (info.path, info.arrays, info.nbytes / 1e9, info.stall_s, rate)
    level = logging.INFO if team.member == 0 else logging.DEBUG
    log.log(level, "saved %s: %d arrays, %.3f GB in %.2f s (%.2f GB/s)", *words)
    return info


def _source_of(share: Share, structure: KnownStructure, arrays: Sequence[HeldArray], store: Store) -> LiveTensors:
    plan = share.prepared.plan
    if plan.pack is not None:
        return LivePack(plan, arrays, store, structure.places(arrays))
    return LiveTensors(plan, [host_elements(held.tensor) for held in arrays].__getitem__, store)


def _write_and_commit(pipeline: Pipeline) -> tuple[Committed, float]:
    """One round: every rank writes and attests its share, member 0 commits. And when this rank had written."""
    store, attempt, arrays = pipeline.agreed.located.store, pipeline.opened.attempt, pipeline.agreed.live.arrays
    written_at: list[float] = []

    def write() -> Attested:
        require_token(store, attempt.draft)
        share = pipeline.share()
        source = _source_of(share, pipeline.agreed.structure, arrays, store)
        file = write_whole_share(store, share, source)
        written_at.append(time.perf_counter())
        return Attested(file, pipeline.own_values())

    def end(attested: Sequence[Attested]) -> Committed:
        contents = pipeline.contents(one.values for one in attested)
        return commit(store, attempt, contents, [one.file for one in attested])

    try:
        committed = WRITE.ask(pipeline.team, write, end)
    except RanksFailed as error:
        if any(failure.rank == pipeline.team.ranks[0] for failure in error.report):
            raise type(error)(
                f"{error.message}; it was the one to commit, so whether {attempt.draft.name} was committed is not known: "
                "open it to find out",
                report=error.report,
            ) from error
        raise
    return committed, written_at[0]
