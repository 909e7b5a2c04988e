"""A writer's attestation: its fragment file, created last, when all that it names is durable. [SAVE-45]"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastickpt.commit.draft import Draft
from elastickpt.errors import ChecksumMismatch, Malformed
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_columns, encode_fragments
from elastickpt.format.keys import fragments_file
from elastickpt.format.limits import MAX_FRAGMENTS_NBYTES
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import FileDigest, FragmentMap
from elastickpt.storage.store import Durability, Store


def attest(
    store: Store,
    draft: Draft,
    fragments: FragmentMap | FragmentColumns,
    *,
    durability: Durability,
    create: Callable[[str, bytes], None] | None = None,
) -> FileDigest:
    """Creates the writer's fragment file; on return it is as durable as was asked. Blocking. Raises StorageFailed kinds.

    `create`: in place of `store.create`, for a writer that takes over from one that died meanwhile.
    """
    relative = fragments_file(fragments.writer)
    data = encode_fragments(fragments)
    (create or store.create)(draft.path(relative), data)
    if durability == "power":
        store.sync_file(draft.path(relative))
        store.sync_directory(draft.path("fragments"))
    return FileDigest(relative, len(data), file_digest(data))


def read_attested(store: Store, draft: Draft, attested: Sequence[FileDigest]) -> tuple[FragmentColumns, ...]:
    """The fragment maps of all writers, by writer, checked against what they said they wrote."""
    maps = []
    for writer, said in enumerate(attested):
        data = store.read(draft.path(said.path), MAX_FRAGMENTS_NBYTES)
        if file_digest(data) != said.digest:
            raise ChecksumMismatch(
                f"{said.path}: writer {writer} said digest {said.digest} of {said.nbytes} bytes, "
                f"found {file_digest(data)} of {len(data)} in the draft"
            )
        columns = decode_columns(data, path=said.path)
        if (columns.writer, columns.attempt) != (writer, draft.attempt):
            raise Malformed(
                f"{said.path}: expected writer {writer} of attempt {draft.attempt}, "
                f"found writer {columns.writer} of attempt {columns.attempt}"
            )
        maps.append(columns)
    return tuple(maps)
