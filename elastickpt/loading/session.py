"""`load`: check everything, read straight into place, install; in place, at whatever layout `state` has now."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Literal, get_args

from elastickpt.errors import CheckpointError, Refused, StateMismatch
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.format.records import ArrayRecord
from elastickpt.format.values import Value
from elastickpt.loading.agreement import (
    BESIDE,
    MASTER,
    Differences,
    Meant,
    Opening,
    differences_of,
    differing_ties,
    joint_mismatches,
    joint_notes,
    lacking_of,
    lies_as_saved,
    mismatch_message,
    require_same_load,
)
from elastickpt.loading.fetch import FetchReport, Verify, carry_out, fetch
from elastickpt.loading.opened import Later, Opened, is_converted, open_records
from elastickpt.loading.plan import FetchPlan, plan_fetch, require_files
from elastickpt.loading.targets import AnyArray, Wanted, WantedColumns
from elastickpt.ranks.process_group import Group, job_group, team_of
from elastickpt.ranks.team import Alone, Call, Question, Team, all_do, require_limit
from elastickpt.training.collection import collection_paused
from elastickpt.training.elements import addresses_of, fill_device, host_elements, host_tensor
from elastickpt.training.held import HeldArray
from elastickpt.training.listing import Binding, Listing
from elastickpt.training.parallel import mesh_of
from elastickpt.training.restore import HeldModels, bind, hold_models
from elastickpt.training.rng import Continuation

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

UNDEFINED = "; the content of `state` is now undefined: load another checkpoint before going on"  # at the end of a message

Strict = Literal["all", "missing", "unexpected", "none"]

# What the ranks ask each other, in this order.
OPEN = Question("open", Meant, Opening)
ELSEWHERE = Question("elsewhere", bool, bool)
CHECK = Question("check", Differences, tuple[str, ...])
INSTALL = Question("install", tuple[str, ...], NoneType)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A finished load.

    Attributes:
        path: The checkpoint.
        step: Its number of completed steps, if the writer said one.
        nbytes: Bytes that this rank needed.
        read_nbytes: Bytes that it read from the store.
        plan_s: Seconds of this rank until it read.
        read_s: Seconds that it read.
        skipped: Differences that the strict mode let pass.
        notes: What could not be carried over exactly, and why; rank 0 logs those of all ranks.

    Examples:
        >>> report = ek.load({"model": model}, "out/step-1000", strict="missing")
        >>> report.skipped
        ('/optimizer: unexpected: expected nothing (in this process), found a value (in the checkpoint)',)
    """

    path: str
    step: int | None
    nbytes: int
    read_nbytes: int
    plan_s: float
    read_s: float
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    streams: tuple[Continuation, ...] = field(default=(), repr=False, compare=False)

    def restore_streams(self) -> None:
        """Sets the random streams once more as this load set them, after something drew numbers that did not in the run that
        saved: `iter(loader)` draws a seed, and some loaders fetch a batch ahead. Of this process only; not blocking.

        Raises:
            Refused: This load set none.

        Examples:
            >>> info = ek.save({"rng": ek.RNG()}, "out/streams")
            >>> report = ek.load({"rng": ek.RNG()}, "out/streams")
            >>> first = torch.rand(2)  # as a loader may do that reads ahead
            >>> report.restore_streams()
            >>> torch.equal(torch.rand(2), first)
            True
        """
        if not self.streams:
            raise Refused(
                f"{self.path}: no random streams were loaded from it: put an ek.RNG() into `state`, saving and loading"
            )
        for streams in self.streams:
            streams.install()


def load(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    strict: Strict = "all",
    verify: Verify = "on",
    wait_limit_s: float | None = None,
) -> LoadReport:
    """Fills `state` in place with the checkpoint at `path`, at the layout that `state` has now, on all ranks. Blocking.

    Every rank of the process group must call it with the same path and options. Everything that can be checked is checked on
    all ranks before the first tensor changes. `strict`: "all" differences are errors; "missing": those of `state` that the
    checkpoint lacks, but not what it has beside; "unexpected": the other way round; "none": only shapes and element types.
    `verify="off"` skips block checksums, for measuring. `wait_limit_s`: for how long ranks that come later are waited for while
    their processes live; without it as long as a collective of the process group waits.

    Raises, the same on every rank with a `report`: StateMismatch naming every difference (nothing was changed),
    NotACheckpoint, Unsupported, Damaged kinds, StorageFailed kinds, RankLost. An error while tensors are being filled says
    that the content of `state` is now undefined.
    """
    with collection_paused():
        group = job_group(process_group)
        team = team_of(group)
        team.enter(Call(f"load of {os.fspath(path)}", *group.limit(wait_limit_s)))
        return _Load(group, team, path, strict, verify, wait_limit_s).run(state, mesh)


def load_alone(state: Mapping[str, object], path: str | os.PathLike[str], *, strict: Strict = "missing") -> LoadReport:
    """What `runs.loading.load_alone` says, for the folder of a checkpoint: by this process alone. Blocking."""
    with collection_paused():
        group = job_group(None)
        return _Load(group, Alone(group.rank, ""), path, strict, "on").run(state, None)


class _Load:
    """One call of `load` on one rank: check together, read, install together."""

    def __init__(
        self,
        group: Group,
        team: Team,
        path: str | os.PathLike[str],
        strict: Strict,
        verify: Verify,
        wait_limit_s: float | None = None,
    ) -> None:
        self.group, self.team, self.path, self.strict, self.verify = group, team, path, strict, verify
        self.wait_limit_s = wait_limit_s
        self.told: list[str] = []  # on member 0: notes of all ranks

    def run(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> LoadReport:
        begun = time.perf_counter()
        opened, held, same = self._open(state, mesh)
        binding, skipped = self._check(held, opened, same)
        hosts, plan = self._plan(opened, binding)
        planned = time.perf_counter()
        report = self._fill(opened, binding, hosts, plan)
        ended = time.perf_counter()
        for note in self.told:
            log.warning("%s: %s", self.path, note)
        return LoadReport(
            path=os.fspath(self.path),
            step=opened.manifest.step,
            nbytes=report.wanted_nbytes,
            read_nbytes=report.read_nbytes,
            plan_s=planned - begun,
            read_s=ended - planned,
            skipped=skipped,
            notes=binding.notes,
            streams=binding.streams,
        )

    # -- before anything changes ---------------------------------------------------------------------------------------

    def _open(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> tuple[Opened, HeldModels, bool]:
        """The checkpoint, what models hold here, and whether every rank holds now what the writer of its number held."""
        opened: list[tuple[Opened, HeldModels]] = []
        ids: set[ArrayId] = set()

        def compare() -> Meant:
            require_limit("wait_limit_s", self.wait_limit_s)
            if self.strict not in get_args(Strict) or self.verify not in get_args(Verify):
                raise Refused(
                    f"strict {self.strict!r}, verify {self.verify!r}: expected one of {get_args(Strict)}, {get_args(Verify)}"
                )
            declared = None if mesh is None else mesh_of(mesh, world_size=self.group.world_size)
            found = open_records(self.path)
            held = hold_models(state, rank=self.group.rank, world_size=self.group.world_size, declared=declared)
            opened.append((found, held))
            ranks, arrays = len(self.group.ranks), held.arrays
            same = ranks == found.manifest.world_size == len(found.manifest.fragments) and lies_as_saved(found, arrays)
            ids.update(array.spec.id for array in arrays)
            lacking = tuple(str(one) for one in lacking_of(found, ids, self.group.member)) if same else ()
            return Meant(os.fspath(self.path), found.manifest.attempt, self.strict, same, lacking)

        told = OPEN.ask(self.team, compare, lambda meant: require_same_load(meant, self.team.ranks))
        return *opened[0], told.same and not (told.lacking and self._elsewhere(opened[0][0], ids, told.lacking))

    def _elsewhere(self, opened: Opened, ids: Collection[ArrayId], lacking: Sequence[str]) -> bool:
        """Whether some rank holds what a rank lacks whose writer had it; what nobody holds was left out of `state`. A round.

        Where nobody is asked: whether this rank holds nothing of what the writer of its number had.
        """
        if len(self.team.ranks) < len(self.group.ranks):
            items = {identity.item for identity in ids}
            return all(one not in ids for one in opened.stored_by(self.group.member, items))

        return ELSEWHERE.ask(self.team, lambda: not {str(one) for one in ids}.isdisjoint(lacking), any)

    def _check(self, held: HeldModels, opened: Opened, same: bool) -> tuple[Binding, tuple[str, ...]]:
        bound: list[tuple[Listing, Binding]] = []

        def compare() -> Differences:
            listing = listing_of(opened, self.group.ranks, same_layout=same)
            binding = bind(held, listing)
            bound.append((listing, binding))
            return differences_of(opened, binding)

        def judge(differences: Sequence[Differences]) -> tuple[str, ...]:
            listing, _ = bound[0]
            found = joint_mismatches(opened, listing, differences, self.team.ranks)
            refused = [(what, text) for what, text in found if self._counts(what)]
            if refused:
                raise StateMismatch(mismatch_message(os.fspath(self.path), refused, self.strict))
            return tuple(text for _, text in found)

        skipped = CHECK.ask(self.team, compare, judge)
        return bound[0][1], skipped

    def _counts(self, what: str) -> bool:
        """Whether a difference of this kind is an error in the strict mode asked for."""
        if what == BESIDE:
            return False
        passes = {"all": (), "missing": ("unexpected",), "unexpected": ("missing",), "none": ("missing", "unexpected")}
        return what not in passes[self.strict]

    def _plan(self, opened: Opened, binding: Binding) -> tuple[Sequence[AnyArray], FetchPlan]:
        """What this rank will read into what; on return every rank has found its records and files there and whole."""
        planned: list[tuple[Sequence[AnyArray], FetchPlan]] = []

        def plan() -> None:
            hosts = [host_elements(target.tensor) for target in binding.targets]
            wanted = [
                Wanted(opened.records[target.spec.id], target.box, host, "spare" if target.held_alone else "fill")
                for target, host in zip(binding.targets, hosts, strict=True)
            ]
            columns = [
                WantedColumns(
                    one.places,
                    one.boxes,
                    one.box,
                    addresses_of(one.tensors),
                    one.tensors,
                    "spare" if one.held_alone else "fill",
                )
                for one in binding.columns
            ]
            planned.append((hosts, plan_fetch(opened, wanted, columns)))
            require_files(opened, planned[0][1])
            if self._counts("unexpected"):
                self._require_equal_ties(opened, binding)

        all_do(self.team, "plan", plan)
        return planned[0]

    def _require_equal_ties(self, opened: Opened, binding: Binding) -> None:
        hosts = [host_elements(held.tensor) for held, _ in binding.ties]
        differing = list(differing_ties(opened, binding.ties, hosts, verify=self.verify))
        if differing:
            told = [("value", text) for text in differing]
            raise StateMismatch(mismatch_message(os.fspath(self.path), told, self.strict))

    # -- from here on the state changes --------------------------------------------------------------------------------

    def _fill(self, opened: Opened, binding: Binding, hosts: Sequence[AnyArray], plan: FetchPlan) -> FetchReport:
        reports: list[FetchReport] = []

        def read() -> None:
            hosts_of = self.team.hosts
            here = hosts_of.count(hosts_of[self.team.member])
            reports.append(carry_out(opened, plan, verify=self.verify, processes=here))
            _to_devices(binding.targets, hosts)

        def installed() -> tuple[str, ...]:
            binding.install()
            return binding.notes

        def note(notes: Sequence[tuple[str, ...]]) -> None:
            self.told += joint_notes(notes, self.team.ranks)

        try:
            all_do(self.team, "read", read)
            INSTALL.ask(self.team, installed, note)
        except CheckpointError as error:
            raise _undefined(error) from error  # on every rank: whoever failed or is lost, the others have changed
        return reports[0]


def listing_of(opened: Opened, ranks: Sequence[int], *, same_layout: bool) -> Listing:
    """What the checkpoint holds, as the training layer takes it; `ranks` are this job's by member, and their layout may be the
    writers'."""
    manifest = opened.manifest

    def per_rank(writer: int) -> Mapping[str, Value]:
        if same_layout:
            writer = ranks.index(writer)  # on the same layout a rank asks for its own; writers count members of the group
        return opened.per_rank(writer) if writer < len(manifest.fragments) else {}

    return Listing(
        arrays=Later(lambda: _specs(opened)),
        tables=opened.tables,
        values=manifest.values if isinstance(manifest.values, dict) else {},
        per_rank=per_rank,
        items=manifest.items,
        world_size=manifest.world_size,
        same_layout=same_layout,
        step=manifest.step,
        tied=manifest.tied,
        ranks=tuple(ranks),
        attributes=Later(lambda: _attributes(opened)),
        read=lambda identity: _read_whole(opened, opened.records[identity]),
        layouts=Later(lambda: _layouts(opened)),
        columns=_columns(opened),
    )


def _specs(opened: Opened) -> dict[ArrayId, ArraySpec]:
    converted = is_converted(opened)
    return {one: record.spec for one, record in opened.records.items() if one.state != MASTER or not converted}


def _columns(opened: Opened) -> ArrayColumns:
    """Those of all arrays, where all are listed."""
    return ArrayColumns.of(()) if is_converted(opened) and MASTER in opened.arrays.names.state else opened.arrays


def _attributes(opened: Opened) -> dict[ArrayId, Mapping[str, Value]]:
    arrays = opened.arrays
    said = {number: dict(one.attributes) for number, one in enumerate(arrays.templates) if one.attributes}
    numbers = arrays.template.tolist() if said else ()
    return {arrays.id(place): said[number] for place, number in enumerate(numbers) if number in said}


def _layouts(opened: Opened) -> dict[ArrayId, tuple[Mesh, tuple[str, ...]]]:
    manifest = opened.manifest
    return {
        identity: (manifest.meshes[manifest.layouts[record.layout].mesh], manifest.layouts[record.layout].placements)
        for identity, record in opened.records.items()
        if identity.section == "extra" and record.layout is not None
    }


def _read_whole(opened: Opened, record: ArrayRecord) -> torch.Tensor:
    """One array, verified; blocking. Raises as `fetch` does."""
    whole = Box.whole(record.spec.shape)
    target = host_tensor(record.spec.dtype, record.spec.shape)
    fetch(opened, [Wanted(record, whole, host_elements(target))])
    return target


def _undefined(error: CheckpointError) -> CheckpointError:
    """The same error, saying what it means now that tensors were being filled."""
    return type(error)(error.message + UNDEFINED, report=error.report)


def _to_devices(targets: Sequence[HeldArray], hosts: Sequence[AnyArray]) -> None:
    """Copies what was read to host memory to targets on other devices; host tensors were filled in place."""
    for target, host in zip(targets, hosts, strict=True):
        if not target.tensor.is_cpu:
            fill_device(target.tensor, host)
