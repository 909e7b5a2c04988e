"""How an object under `commits/` comes to be, whole, once, by exactly one creator; and how a register and a folder go.
[RUN-20..24, RUN-71]

Protocols of a run are generators: they pause before every operation on the store, so that whoever drives them may let others
go first.

    view = complete(read_view(store))

Between two pauses a generator does at most one operation. What it yields is how long to wait: `NOW`, or seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

from elastickpt.errors import CapabilityMissing, CheckpointError, MissingFile, PathOccupied, StorageFailed
from elastickpt.ledger.names import COMMITS, SWEPT, AttemptId, commits_path, temporary_name
from elastickpt.ledger.records import MAX_OBJECT_NBYTES
from elastickpt.storage.store import Store

T = TypeVar("T")
Operations = Generator[float, None, T]
NOW = 0.0


def complete(steps: Operations[T], *, sleep: Callable[[float], object] = time.sleep) -> T:
    """What the steps return, all of them done one after the other; blocking. `sleep` takes seconds."""
    while True:
        try:
            pause_s = next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        if pause_s > NOW:
            sleep(pause_s)


def create_exclusively(store: Store, name: str, data: bytes) -> Operations[bytes]:
    """What stands under `commits/` at `name` for good: `data`, or what somebody else put there before; the caller obeys it.

    It is as durable as the store can make it. Raises StorageFailed kinds: then nothing stands there, or `data` does and may be
    lost in a power cut; asking again tells which, and does not make it durable. CapabilityMissing for a store on which two
    creators could both win.
    """
    able = store.capabilities
    if able.conditional_put:
        failure = yield from _put(store, name, data)
    elif able.no_replace_rename:
        failure = yield from _link(store, name, data)
    else:
        raise CapabilityMissing(f"{store.url}: a run needs conditional_put or no_replace_rename; {able.name} has neither")
    found = data
    if failure is not None:  # another was first, or the answer was lost: what stands there decides [RUN-22]
        yield NOW
        try:
            found = store.read(commits_path(name), MAX_OBJECT_NBYTES)
        except MissingFile:
            if isinstance(failure, StorageFailed):
                raise failure from None
            # its temporary file was swept, or what stood there was removed: either way its time is over
            raise StorageFailed(f"{store.url}: {name} was not created, and nothing stands there: {failure}") from failure
    yield from _sync_commits(store)  # another's object too, before anybody relies on it [RUN-23]
    return found


def remove_register(store: Store, attempt: AttemptId) -> Operations[None]:
    """The register is gone, durably where the store can promise that. Raises StorageFailed kinds."""
    yield NOW
    store.remove(commits_path(attempt.register))
    yield from _sync_commits(store)


def _sync_commits(store: Store) -> Operations[None]:
    """The names under `commits/` are durable, where the store can promise that."""
    if store.capabilities.directory_sync:
        yield NOW
        store.sync_directory(COMMITS)


def _put(store: Store, name: str, data: bytes) -> Operations[CheckpointError | None]:
    yield NOW
    try:
        store.create(commits_path(name), data)
    except (PathOccupied, StorageFailed) as failure:
        return failure
    return None


def _link(store: Store, name: str, data: bytes) -> Operations[CheckpointError | None]:
    """By a temporary file in the same directory, whole and durable before it gets the name. [RUN-21]"""
    temporary = commits_path(temporary_name(name))
    try:
        yield NOW
        store.create(temporary, data)
        if store.capabilities.directory_sync:
            yield NOW
            store.sync_file(temporary)
        yield NOW
        store.rename(temporary, commits_path(name))
    except (PathOccupied, MissingFile, StorageFailed) as failure:
        yield NOW
        try:
            store.remove(temporary)
        except StorageFailed:
            return failure  # it is swept when its name is taken
        return failure
    return None


def remove_folder(store: Store, attempt: AttemptId) -> Operations[None]:
    """The folder of an attempt that does not count is gone. First its name, at once, so that no late writer adds to it."""
    swept = attempt.folder + SWEPT
    yield NOW
    store.remove_tree(swept)  # of a removal that was interrupted
    yield NOW
    try:
        store.rename(attempt.folder, swept)
    except MissingFile:
        return
    yield NOW
    store.remove_tree(swept)
