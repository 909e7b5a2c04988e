"""One round of a staged save: from the arena to files, and after the last round the attestation. Blocking, in any process."""

from __future__ import annotations

import numpy as np

from elastickpt.commit.attest import attest
from elastickpt.commit.completing import completing
from elastickpt.commit.draft import Draft
from elastickpt.format.encode_fragments import decode_fragments
from elastickpt.storage.store import Store
from elastickpt.writer.arena import Arena
from elastickpt.writer.carry import Checksums, Target, Watch, make_durable, sync_way, write_round
from elastickpt.writer.fragments import fragments_of
from elastickpt.writer.messages import Done, Write
from elastickpt.writer.prepared import Prepared
from elastickpt.writer.staged import Staged


def perform(store: Store, job: Write, prepared: Prepared, arena: Arena, *, watch: Watch) -> Done:
    """Writes the round that is, or is being, staged in the arena; the last one also makes documents and names, and attests.

    Raises StorageFailed kinds, what `Staged.take` raises, and whatever `watch` raises.
    """
    plan = prepared.plan
    way = sync_way(store, len(plan.files) + len(plan.documents), durability=job.durability)
    target = Target(store, job.draft[1], way, watch)
    create = completing(store) if job.repeated else store.create
    staged = prepared.rounds[job.round]
    nbytes = sum(at.stop - at.start for at in staged.slices)
    last = job.round == len(prepared.rounds) - 1
    documents = prepared.documents if last else ()
    checksums = write_round(target, plan, documents, staged.slices, Staged(arena, watch), create=create)
    if not last:
        if way == "tree":
            store.sync_tree()
        return Done(job.job, nbytes, encode_checksums(checksums), ())
    make_durable(target, plan, prepared.documents)
    told = decode_fragments(job.template, path="what this process was told")
    fragments = fragments_of(
        plan,
        np.concatenate([np.frombuffer(job.known, dtype="<u8").astype(np.uint64), checksums]),
        writer=told.writer,
        attempt=told.attempt,
        tables=told.tables,
        values=told.values or {},  # type: ignore[arg-type]  # a mapping or None [FRAG-20]
    )
    file = attest(store, Draft(*job.draft), fragments, durability=job.durability, create=create)
    return Done(job.job, nbytes, b"", (file.path, file.nbytes, file.digest))


def encode_checksums(checksums: Checksums) -> bytes:
    """As `Write.known` and `Done.checksums` have them."""
    return checksums.astype("<u8", copy=False).tobytes()
