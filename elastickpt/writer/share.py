"""One rank's share of an attempt: bytes from a source into files, made durable, and attested. Blocking, in any process.

Saves differ in their source alone (`write_files.Source`): live tensors, an arena, files of another library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.attest import attest, completing, encode_values
from elastickpt.errors import CapabilityMissing, LimitExceeded
from elastickpt.format.encode_fragments import decode_beside, encode_beside
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import FileDigest, OptimizerTable, StoredFile
from elastickpt.format.typed_values import TypedValue
from elastickpt.format.values import Value
from elastickpt.storage.store import Store
from elastickpt.writer.arena_plan import ArenaPlan, WriterStructure
from elastickpt.writer.plans import WritePlan
from elastickpt.writer.write_files import (
    Checksums,
    Source,
    WatchBytes,
    WrittenFolder,
    make_durable,
    sync_for,
    unwatched,
    write_portion,
)
from elastickpt.writer.write_packs import span_nbytes, write_pack


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank brings to an attempt beside its bytes: what it writes and where, its rows of the optimizer tables, and its
    per-rank values, by JSON pointer. `replicated` are the values of the manifest, which the committer's alone has; None for a
    writer that takes no part in the decision."""

    attempt: Attempt
    member: int
    structure: WriterStructure
    tables: tuple[OptimizerTable, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    replicated: Mapping[str, TypedValue] | None = None

    @cached_property
    def beside(self) -> bytes:
        """Tables and values, for `share_of`. Raises ValueNotCarried."""
        return encode_beside(self.tables, dict(self.values) or None)

    @cached_property
    def encoded_values(self) -> bytes:
        """The replicated ones. Raises ValueNotCarried."""
        return encode_values(self.replicated or {})

    @property
    def prepared(self) -> ArenaPlan:
        return self.structure.prepared

    @cached_property
    def plan(self) -> WritePlan:
        """With the names that files have in the attempt."""
        return self.prepared.plan.of_attempt(self.attempt.id, self.member)


def share_of(attempt: Attempt, member: int, structure: WriterStructure, beside: bytes) -> Share:
    """The share that another process told of so."""
    tables, values = decode_beside(beside, path="what this process was told")
    return Share(attempt, member, structure, tables, values if isinstance(values, dict) else {})


@dataclass(frozen=True, slots=True)
class Written:
    """A portion that was written: its bytes, and the checksums of its blocks as little-endian 64-bit integers; after the last
    one `file`, the attestation."""

    nbytes: int
    checksums: bytes
    file: FileDigest | None


def write_share(
    store: Store,
    share: Share,
    number: int,
    source: Source,
    *,
    earlier: bytes = b"",
    repeated: bool = False,
    watch: WatchBytes = unwatched,
) -> Written:
    """Writes a portion of the share; the last one also makes documents and names, and attests. On return what was written is as
    durable as was asked.

    `earlier` are the checksums of all portions before. `repeated`: another writer may have begun the same, which is completed.
    Raises StorageFailed kinds, and whatever source and `watch` raise.
    """
    attempt, prepared = share.attempt, share.prepared
    plan, now, block = share.plan, prepared.portions[number], prepared.block_nbytes
    sync = sync_for(store, len(plan.files) + len(plan.documents), durability=attempt.durability)
    target = WrittenFolder(store, attempt.draft.folder, sync, watch)
    create = completing(store) if repeated else store.create
    last = number == len(prepared.portions) - 1
    if store.capabilities.sequential_only and len(prepared.portions) > 1:
        raise CapabilityMissing(
            f"ranged_writes: {store.url} takes the bytes of a file in their order alone: expected an arena of "
            f"{sum(file.nbytes for file in plan.files)} bytes, for all that this rank saves, found a smaller one"
        )
    if plan.pack is not None:
        spans = prepared.spans(number, span_nbytes(store))
        checksums = write_pack(target, plan.pack, spans, source, block_nbytes=block)
    else:
        documents = prepared.documents if last else ()
        checksums = write_portion(target, plan, documents, now.slices, source, block_nbytes=block, create=create)
    nbytes = sum(at.stop - at.start for at in now.slices)
    if not last:
        if sync == "tree":
            store.sync_tree()
        return Written(nbytes, _encode(checksums), None)
    make_durable(target, plan, prepared.documents)
    every = np.concatenate([np.frombuffer(earlier, dtype="<u8").astype(np.uint64), checksums])
    fragments = fragments_of(share, every)
    return Written(nbytes, b"", attest(store, attempt.draft, fragments, durability=attempt.durability, create=create))


def write_whole_share(store: Store, share: Share, source: Source) -> FileDigest:
    """The same of a share that goes in one portion; returns the attestation."""
    file = write_share(store, share, 0, source).file
    if file is None:
        raise LimitExceeded(f"a share in {len(share.prepared.portions)} portions, where one was expected")
    return file


def _encode(checksums: Checksums) -> bytes:
    return checksums.astype("<u8", copy=False).tobytes()


def fragments_of(share: Share, checksums: Checksums) -> FragmentColumns:
    """The fragment map of this writer, with the checksums of all its pieces in order."""
    plan = share.plan
    files = tuple(StoredFile(0, file.path, file.nbytes) for file in plan.files)
    columns = share.prepared.columns
    pieces = replace(columns, checksums=checksums[columns.checksums])
    return FragmentColumns(
        share.member, share.attempt.id, share.prepared.block_nbytes, files, pieces, share.tables, dict(share.values) or None
    )
