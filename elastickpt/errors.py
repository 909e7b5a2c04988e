"""What can go wrong, as one tree. Each class has a stable `kind`; kinds are only ever added.

CheckpointError
├── Refused                 the caller's input cannot be accepted; nothing was changed
│   ├── ValueNotCarried         a value of `state` that no checkpoint can hold
│   ├── ReplicaConflict         ranks hold different contents under one name
│   ├── StructureConflict       ranks, or items of `state`, contradict each other
│   ├── PathOccupied            something stands where the checkpoint should go
│   ├── PlacementUnsupported    this placement is not possible here
│   ├── LayoutUnsupported       local tensors whose place in the whole is not known
│   └── ProgramFault            a program of the conversion language that is wrong, or does not fit
├── InternalError           a fault of this library itself, nobody's input: please report it
├── StateMismatch           `state` and checkpoint differ in names, shapes, dtypes or values
├── EntryFailed             code of an entry of `state` raised: its state_dict, load_state_dict or a hook
├── NotACheckpoint          the path holds no checkpoint
│   └── Uncommitted             a draft or an aborted attempt, never committed
├── Unsupported             a format version, feature or codec that this release cannot read
├── Unsafe                  content that only a malicious or broken writer makes
│   └── LimitExceeded           a size, depth or count beyond the stated limits
├── Damaged                 bytes of a committed checkpoint are not those that were written
│   ├── Malformed               a record that does not follow the spec
│   ├── MissingFile             a file named by a record is not there
│   ├── WrongLength             a file shorter or longer than recorded
│   ├── ChecksumMismatch        bytes do not have the recorded checksum
│   ├── CoverageGap             elements of an array that nobody wrote
│   ├── CoverageOverlap         elements of an array that were written twice
│   ├── DocumentMismatch        a zarr document differs from what the index says
│   └── StrayFile               a file that no record names
├── StorageFailed           the store said no
│   ├── NoSpace                 the device or quota is full
│   ├── ReadOnly                the directory or file system cannot be written
│   ├── CapabilityMissing       the store lacks an operation that was asked for
│   └── NotDurable              a checkpoint that is committed and whole, and may not survive a power cut
├── SaveSkipped             no staging arena was free within the stall limit: this save is left out, training goes on
├── WriterLost              this rank's writer process ended, or was given up, before it had written
├── Cancelled               the caller took it back before it was done
├── NotAcknowledged         a commit of which it is not known whether it counts
├── RunBusy                 the job that claimed the run last lives; it was not claimed anew
├── Superseded              a newer claim of the run exists; this job writes nothing more into it
├── RecoveryFailed          a job under `elastickpt-run` cannot go on; `reason` says why in a word
└── RanksFailed             other ranks of the job failed while this one worked
    ├── RankLost                a rank's process is gone
    └── DeadlineExceeded        a rank did not answer within the stated limit

`report` names every rank that failed, with kind and message, as plain data; it is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, order=True)
class RankFailure:
    """What one rank of a job reports: plain data, so that it crosses processes unchanged."""

    rank: int
    kind: str
    message: str


class CheckpointError(Exception):
    """Base of all errors of this library. `kind` is stable; `report` is empty when only this process is concerned."""

    kind: ClassVar[str] = "checkpoint-error"

    def __init__(self, message: str, *, report: Sequence[RankFailure] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.report = tuple(report)


class Refused(CheckpointError):
    kind = "refused"


class ValueNotCarried(Refused):
    kind = "value-not-carried"


class ReplicaConflict(Refused):
    kind = "replica-conflict"


class StructureConflict(Refused):
    kind = "structure-conflict"


class PathOccupied(Refused):
    kind = "path-occupied"


class PlacementUnsupported(Refused):
    kind = "placement-unsupported"


class LayoutUnsupported(Refused):
    kind = "layout-unsupported"


class ProgramFault(Refused):
    kind = "program"


class InternalError(CheckpointError):
    kind = "internal"


class StateMismatch(CheckpointError):
    kind = "state-mismatch"


class EntryFailed(CheckpointError):
    kind = "entry-failed"


class NotACheckpoint(CheckpointError):
    kind = "not-a-checkpoint"


class Uncommitted(NotACheckpoint):
    kind = "uncommitted"


class Unsupported(CheckpointError):
    kind = "unsupported"


class Unsafe(CheckpointError):
    kind = "unsafe"


class LimitExceeded(Unsafe):
    kind = "limit-exceeded"


class Damaged(CheckpointError):
    kind = "damaged"


class Malformed(Damaged):
    kind = "malformed"


class MissingFile(Damaged):
    kind = "missing-file"


class WrongLength(Damaged):
    kind = "wrong-length"


class ChecksumMismatch(Damaged):
    kind = "checksum-mismatch"


class CoverageGap(Damaged):
    kind = "coverage-gap"


class CoverageOverlap(Damaged):
    kind = "coverage-overlap"


class DocumentMismatch(Damaged):
    kind = "document-mismatch"


class StrayFile(Damaged):
    kind = "stray-file"


class StorageFailed(CheckpointError):
    kind = "storage-failed"


class NoSpace(StorageFailed):
    kind = "no-space"


class ReadOnly(StorageFailed):
    kind = "read-only"


class CapabilityMissing(StorageFailed):
    kind = "capability-missing"


class NotDurable(StorageFailed):
    kind = "not-durable"


class SaveSkipped(CheckpointError):
    kind = "save-skipped"


class WriterLost(CheckpointError):
    kind = "writer-lost"


class Cancelled(CheckpointError):
    kind = "cancelled"


class NotAcknowledged(CheckpointError):
    kind = "not-acknowledged"


class RunBusy(CheckpointError):
    kind = "run-busy"


class Superseded(CheckpointError):
    kind = "superseded"


class RecoveryFailed(CheckpointError):
    """`reason`: `no-spare`, `no-source`, `coordinator-lost`, `evicted` or `step-failed`; it stands in the message, too.
    `code` is what the process exits with."""

    kind = "recovery-failed"

    def __init__(self, message: str, *, report: Sequence[RankFailure] = (), reason: str = "", code: int = 1) -> None:
        super().__init__(message, report=report)
        self.reason = reason
        self.code = code


class RanksFailed(CheckpointError):
    kind = "ranks-failed"


class RankLost(RanksFailed):
    kind = "rank-lost"


class DeadlineExceeded(RanksFailed):
    kind = "deadline-exceeded"


def fault(message: str) -> InternalError:
    """The error for what cannot be, and is: nothing that a caller did explains it."""
    return InternalError(f"{message}; this is a fault of elastickpt itself: please report it")


def _tree(root: type[CheckpointError]) -> Iterator[type[CheckpointError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def kinds() -> dict[str, type[CheckpointError]]:
    """kind → class, for every class of the tree."""
    return {cls.kind: cls for cls in _tree(CheckpointError)}


def from_report(report: Sequence[RankFailure]) -> CheckpointError:
    """The error that every rank raises for one joint failure: the class of the lowest rank that failed by itself.

    Ranks that only noticed somebody else's end (kinds below `ranks-failed`) are listed, but do not choose the class.
    """
    ordered = tuple(sorted(report))
    noticed = {cls.kind for cls in _tree(RanksFailed)}
    first = next((f for f in ordered if f.kind not in noticed), ordered[0])
    cls = kinds().get(first.kind, RanksFailed)
    if len(ordered) == 1:
        message = f"rank {first.rank}: {first.message}"
    else:
        lines = "".join(f"\n  rank {f.rank} ({f.kind}): {f.message}" for f in ordered)
        message = f"{len(ordered)} ranks failed:{lines}"
    return cls(message, report=ordered)
