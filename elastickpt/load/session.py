"""`load`: check everything, read straight into place, install; in place, at whatever layout `state` has now."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import msgpack

from elastickpt.commit.teams import team_of
from elastickpt.comms.team import Team
from elastickpt.errors import CheckpointError, Refused, StateMismatch
from elastickpt.format.arrays import Mesh
from elastickpt.format.values import Value
from elastickpt.load.agreement import encode_findings, joint_mismatches, mismatch_message, require_same_load
from elastickpt.load.fetch import FetchReport, Verify, carry_out
from elastickpt.load.opened import Opened, open_records
from elastickpt.load.plan import Elements, FetchPlan, Wanted, plan_fetch, require_files
from elastickpt.training.collection import collection_paused
from elastickpt.training.group import Group, job_group
from elastickpt.training.held import HeldArray
from elastickpt.training.layouts import held_by_models
from elastickpt.training.listing import Binding, Listing
from elastickpt.training.memory import fill_device, host_elements
from elastickpt.training.meshes import mesh_of
from elastickpt.training.restore import bind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

UNDEFINED = "; the content of `state` is now undefined: load another checkpoint before going on"  # at the end of a message

Strict = Literal["all", "missing", "unexpected", "none"]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A finished load. Byte counts and times are this rank's: needed by it, read from the store, seconds.

    `skipped` are differences that the strict mode let pass; `notes` what could not be carried over exactly, and why.
    """

    path: str
    step: int | None
    nbytes: int
    read_nbytes: int
    plan_s: float
    read_s: float
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    state: Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    strict: Strict = "all",
    verify: Verify = "on",
) -> LoadReport:
    """Fills `state` in place with the checkpoint at `path`, at the layout that `state` has now, on all ranks. Blocking.

    Every rank of the process group must call it with the same path and options. Everything that can be checked is checked on
    all ranks before the first tensor changes. `strict`: "all" differences are errors; "missing": those of `state` that the
    checkpoint lacks, but not what it has beside; "unexpected": the other way round; "none": only shapes and element types.
    `verify="off"` skips block checksums, for measuring.

    Raises, the same on every rank with a `report`: StateMismatch naming every difference (nothing was changed),
    NotACheckpoint, Unsupported, Damaged kinds, StorageFailed kinds, RankLost. An error while tensors are being filled says
    that the content of `state` is now undefined.
    """
    with collection_paused():
        group = job_group(process_group)
        loading = _Load(group, team_of(group), path, strict, verify)
        return loading.run(state, mesh)


class _Load:
    """One call of `load` on one rank: check together, read, install together."""

    def __init__(self, group: Group, team: Team, path: str | os.PathLike[str], strict: Strict, verify: Verify) -> None:
        self.group, self.team, self.path, self.strict, self.verify = group, team, path, strict, verify

    def run(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> LoadReport:
        begun = time.perf_counter()
        opened, declared, same = self._open(state, mesh)
        binding, skipped = self._check(state, declared, opened, same)
        hosts, plan = self._plan(opened, binding)
        planned = time.perf_counter()
        report = self._fill(opened, binding, hosts, plan)
        ended = time.perf_counter()
        for note in binding.notes:
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
        )

    # -- before anything changes ---------------------------------------------------------------------------------------

    def _open(self, state: Mapping[str, object], mesh: DeviceMesh | None) -> tuple[Opened, Mesh | None, bool]:
        """The checkpoint, the mesh declared, and whether every rank holds now what the writer of its number held."""
        opened: list[tuple[Opened, Mesh | None]] = []

        def compare() -> bytes:
            if self.strict not in get_args(Strict) or self.verify not in get_args(Verify):
                raise Refused(
                    f"strict {self.strict!r}, verify {self.verify!r}: expected one of {get_args(Strict)}, {get_args(Verify)}"
                )
            declared = None if mesh is None else mesh_of(mesh, world_size=self.group.world_size)
            found = open_records(self.path)
            opened.append((found, declared))
            held = held_by_models(state, rank=self.group.rank, world_size=self.group.world_size, declared=declared)
            ranks = len(self.team.ranks)
            same = ranks == found.manifest.world_size == len(found.manifest.fragments)
            same = same and same_layout(found, held, self.team.member)
            meant = (os.fspath(self.path), f"attempt {found.manifest.attempt}", self.strict)
            return bytes(msgpack.packb((same, meant)))

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            answers = [msgpack.unpackb(payload, use_list=False) for payload in payloads]
            require_same_load([meant for _, meant in answers], self.team.ranks)
            return [bytes([all(same for same, _ in answers)])] * len(payloads)

        same = self.team.round("open", compare, decide)
        return *opened[0], same == b"\1"

    def _check(
        self, state: Mapping[str, object], declared: Mesh | None, opened: Opened, same: bool
    ) -> tuple[Binding, tuple[str, ...]]:
        bound: list[tuple[Listing, Binding]] = []

        def compare() -> bytes:
            listing = listing_of(opened, self.team.ranks if same else ())
            binding = bind(state, rank=self.group.rank, world_size=self.group.world_size, declared=declared, listing=listing)
            bound.append((listing, binding))
            return encode_findings(opened, binding)

        def decide(payloads: Sequence[bytes]) -> Sequence[bytes]:
            listing, _ = bound[0]
            found = joint_mismatches(opened, listing, payloads, self.team.ranks)
            refused = [text for what, text in found if self._counts(what)]
            if refused:
                raise StateMismatch(mismatch_message(os.fspath(self.path), refused))
            return [bytes(msgpack.packb([text for _, text in found]))] * len(payloads)

        skipped = msgpack.unpackb(self.team.round("check", compare, decide), use_list=False)
        return bound[0][1], skipped

    def _counts(self, what: str) -> bool:
        """Whether a difference of this kind is an error in the strict mode asked for."""
        passes = {"all": (), "missing": ("unexpected",), "unexpected": ("missing",), "none": ("missing", "unexpected")}
        return what not in passes[self.strict]

    def _plan(self, opened: Opened, binding: Binding) -> tuple[Sequence[Elements], FetchPlan]:
        """What this rank will read into what; on return every rank has found its records and files there and whole."""
        planned: list[tuple[Sequence[Elements], FetchPlan]] = []

        def plan() -> bytes:
            hosts = [host_elements(target.tensor) for target in binding.targets]
            wanted = [
                Wanted(opened.records[target.spec.id], target.box, host, "spare" if target.held_alone else "fill")
                for target, host in zip(binding.targets, hosts, strict=True)
            ]
            planned.append((hosts, plan_fetch(opened, wanted)))
            require_files(opened, planned[0][1])
            return b""

        self.team.round("plan", plan, lambda payloads: [b""] * len(payloads))
        return planned[0]

    # -- from here on the state changes --------------------------------------------------------------------------------

    def _fill(self, opened: Opened, binding: Binding, hosts: Sequence[Elements], plan: FetchPlan) -> FetchReport:
        reports: list[FetchReport] = []

        def read() -> bytes:
            reports.append(carry_out(opened, plan, verify=self.verify))
            _to_devices(binding.targets, hosts)
            return b""

        def installed() -> bytes:
            binding.install()
            return b""

        try:
            self.team.round("read", read, lambda payloads: [b""] * len(payloads))
            self.team.round("install", installed, lambda payloads: [b""] * len(payloads))
        except CheckpointError as error:
            raise _undefined(error) from error  # on every rank: whoever failed or is lost, the others have changed
        return reports[0]


def listing_of(opened: Opened, same: Sequence[int]) -> Listing:
    """What the checkpoint holds, as the training layer takes it; `same` are this job's ranks by member if its layout is the
    writers', else ()."""
    manifest = opened.manifest

    def per_rank(writer: int) -> Mapping[str, Value]:
        if same:
            writer = same.index(writer)  # on the same layout a rank asks for its own; writers count members of the group
        return opened.per_rank(writer) if writer < len(manifest.fragments) else {}

    return Listing(
        arrays={identity: record.spec for identity, record in opened.records.items()},
        tables=tuple(table for part in opened.parts for table in part.tables),
        values=manifest.values if isinstance(manifest.values, dict) else {},
        per_rank=per_rank,
        items=manifest.items,
        world_size=manifest.world_size,
        same_layout=bool(same),
        step=manifest.step,
        tied=manifest.tied,
    )


def same_layout(opened: Opened, held: Sequence[HeldArray], writer: int) -> bool:
    """Whether a rank that holds `held` stands where `writer` stood: meshes and placements are equal, and it holds every
    array of these models that the writer stored something of."""
    manifest = opened.manifest
    ids = {array.spec.id for array in held}
    for array in held:
        record = opened.records.get(array.spec.id)
        if record is None:
            return False
        if record.layout is None:
            if array.mesh is not None:
                return False
            continue
        layout = manifest.layouts[record.layout]
        if (array.mesh, array.placements) != (manifest.meshes[layout.mesh], layout.placements):
            return False
    stored = (record.spec.id for record in opened.stored_by(writer))
    return all(identity in ids for identity in stored if identity.section == "params" and identity.state == "value")


def _undefined(error: CheckpointError) -> CheckpointError:
    """The same error, saying what it means now that tensors were being filled."""
    return type(error)(error.message + UNDEFINED, report=error.report)


def _to_devices(targets: Sequence[HeldArray], hosts: Sequence[Elements]) -> None:
    """Copies what was read to host memory to targets on other devices; host tensors were filled in place."""
    for target, host in zip(targets, hosts, strict=True):
        if target.tensor.device.type != "cpu":
            fill_device(target.tensor, host)
