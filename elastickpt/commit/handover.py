"""What stands in a draft for whoever takes the committer's part: attestations, and what the committer knew beside. [SAVE-85]"""

from __future__ import annotations

from elastickpt.commit.attempt import Attempt
from elastickpt.commit.completing import Create
from elastickpt.commit.contents import Contents, EncodedContents, decode_contents
from elastickpt.commit.draft import CONTENTS
from elastickpt.errors import CheckpointError, MissingFile, StorageFailed
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.format.keys import fragments_file
from elastickpt.format.limits import MAX_FRAGMENTS_NBYTES
from elastickpt.format.records import FileDigest
from elastickpt.storage.store import Store

_DIGEST_NBYTES = 32
_LENGTH_NBYTES = 8


def find_attestation(store: Store, attempt: Attempt, member: int) -> FileDigest | None:
    """A writer's attestation in the draft, made durable, if it is there and whole. Blocking. Raises StorageFailed kinds."""
    path = fragments_file(member)
    try:
        data = store.read(attempt.path(path), MAX_FRAGMENTS_NBYTES)
        columns = decode_columns(data, path=path)
    except MissingFile:
        return None
    except StorageFailed:
        raise
    except CheckpointError:
        return None  # begun, and never finished
    if (columns.writer, columns.attempt) != (member, attempt.id):
        return None
    if attempt.durability == "power":
        store.sync_file(attempt.path(path))
        store.sync_directory(attempt.path("fragments"))
    return FileDigest(path, len(data), file_digest(data))


def leave_contents(store: Store, attempt: Attempt, contents: EncodedContents, *, create: Create | None = None) -> None:
    """Puts into the draft what another committer would need. Not durable: after a crash of the host nobody commits it.

    `create`: in place of `store.create`, for a writer that takes over from one that died meanwhile.
    """
    body = len(contents.outline).to_bytes(_LENGTH_NBYTES, "big") + contents.outline + contents.values
    (create or store.create)(attempt.path(CONTENTS), body + file_digest(body).encode())


def left_contents(store: Store, attempt: Attempt) -> Contents | None:
    """What `leave_contents` left; None if it is not there, or was not finished."""
    try:
        data = store.read(attempt.path(CONTENTS), MAX_FRAGMENTS_NBYTES)
    except MissingFile:
        return None
    body, digest = data[:-_DIGEST_NBYTES], data[-_DIGEST_NBYTES:]
    if len(body) < _LENGTH_NBYTES or file_digest(body).encode() != digest:
        return None
    middle = _LENGTH_NBYTES + int.from_bytes(body[:_LENGTH_NBYTES], "big")
    return decode_contents(EncodedContents(body[_LENGTH_NBYTES:middle], body[middle:]))
