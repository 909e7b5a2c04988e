"""Rounds carried out in this process, with crashes at every operation; the process around them is tested beside this."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from staged import Rank, begun, commit, tree

import elastickpt as ek
from elastickpt.commit.draft import abort
from elastickpt.errors import NoSpace, PathOccupied, StorageFailed
from elastickpt.format.keys import fragments_file
from elastickpt.saving.staging import Stager
from elastickpt.storage.store import Store
from elastickpt.testing.faults import ALL, CHANGING, Crash, CrashAt, FailAt, FaultyStore, Lasting, Mode, RecordingStore
from elastickpt.writer.arena import ArenaSource
from elastickpt.writer.attempt_worker import perform
from elastickpt.writer.messages import Write
from elastickpt.writer.share import Written, write_share
from elastickpt.writer.write_files import unwatched


def small_state(seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    return {"t": {"a": torch.randn(300, 1000), "b": torch.randn(5, 9).t()}}


class Job:
    """A save of one rank in one draft, carried out a round at a time."""

    def __init__(self, folder: Path, *, arena_nbytes: int | None = None) -> None:
        self.rank = Rank.of(small_state(), arena_nbytes=arena_nbytes)
        self.store, self.draft = begun(folder, "c")
        self.arena = self.rank.arena()
        self.stager = Stager(self.rank.prepared)
        self.known = b""

    def stage(self, number: int) -> None:
        self.arena.empty()
        self.stager.stage(self.arena, number, self.rank.live.arrays)

    def perform(self, store: Store, number: int, *, repeated: bool) -> Written:
        share = self.rank.share(self.draft, self.store, "power")
        return write_share(store, share, number, ArenaSource(self.arena, unwatched), earlier=self.known, repeated=repeated)

    def finish(self, done: Written) -> dict[str, bytes]:
        """Commits and returns the tree but for the fragment file, which names the attempt."""
        assert done.file is not None
        commit(self.rank, self.store, self.draft, done.file, "power")
        assert ek.open(Path(self.store.url.removeprefix("file://")) / "c").verify().sound
        found = tree(Path(self.store.url.removeprefix("file://")) / "c")
        del found[fragments_file(0)]
        return found


@pytest.fixture(scope="module")
def blocking(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("blocking") / "c"
    ek.save(small_state(), path)
    found = tree(path)
    del found[fragments_file(0)]
    return found


def folders(memory_path: Path) -> Iterator[Path]:
    for number in itertools.count():
        folder = memory_path / str(number)
        folder.mkdir()
        yield folder


@pytest.mark.parametrize("mode", ["before", "torn", "after"])
def test_whoever_takes_over_after_a_crash_anywhere_makes_the_same_tree(
    memory_path: Path, mode: Mode, blocking: dict[str, bytes]
) -> None:
    crashes = 0
    for n, folder in enumerate(folders(memory_path), start=1):
        job = Job(folder)
        job.stage(0)
        store = FaultyStore(job.store, CrashAt(n, mode), counted=CHANGING)
        try:
            done = job.perform(store, 0, repeated=False)
        except Crash:
            crashes += 1
            done = job.perform(job.store, 0, repeated=True)
        assert job.finish(done) == blocking
        if not store.struck:
            break
    assert crashes > 20


def test_every_later_process_may_crash_too(memory_path: Path, blocking: dict[str, bytes]) -> None:
    """The nth one at its nth operation, all over one attempt."""
    job = Job(memory_path)
    job.stage(0)
    for n in itertools.count(1):
        store = FaultyStore(job.store, CrashAt(n), counted=CHANGING)
        try:
            done = job.perform(store, 0, repeated=n > 1)
            break
        except Crash:
            continue
    assert n > 20
    assert job.finish(done) == blocking


KINDS = {errno.EIO: StorageFailed, errno.ENOSPC: NoSpace}
FAST = {(errno.EIO, "before", "once"), (errno.EIO, "after", "from then on"), (errno.ENOSPC, "torn", "once")}
FAILURES = [
    pytest.param(*failure, marks=() if failure in FAST else pytest.mark.long)
    for failure in itertools.product(KINDS, ("before", "torn", "after"), ("once", "from then on"))
]


@pytest.mark.parametrize(("number", "mode", "lasting"), FAILURES)
def test_a_failure_of_any_operation_is_said_by_its_kind_and_the_next_attempt_works(
    memory_path: Path, number: int, mode: Mode, lasting: Lasting, blocking: dict[str, bytes]
) -> None:
    """No sync is asked for twice, nothing stands at the path, and what was saved before is as it was. [SAVE-2]"""
    (memory_path / "before").mkdir()
    ek.save(small_state(7), memory_path / "before" / "c")
    stands = tree(memory_path / "before" / "c")
    failures = 0
    for n, folder in enumerate(folders(memory_path), start=1):
        job = Job(folder)
        job.stage(0)
        faulty = FaultyStore(job.store, FailAt(n, number, mode, lasting=lasting), counted=ALL)
        recording = RecordingStore(faulty)
        try:
            done = job.perform(recording, 0, repeated=False)
        except KINDS[number]:
            failures += 1
            syncs = [(one.name, one.path) for one in recording.operations if "sync" in one.name]
            assert len(set(syncs)) == len(syncs)
            abort(job.store, job.draft)
            assert list(folder.iterdir()) == []
            job = Job(folder)
            job.stage(0)
            done = job.perform(job.store, 0, repeated=False)
        assert job.finish(done) == blocking
        assert tree(memory_path / "before" / "c") == stands
        shutil.rmtree(folder)
        if not faulty.struck:
            break
    assert failures > 20


def test_rounds_survive_a_crash_in_each_of_them(memory_path: Path, blocking: dict[str, bytes]) -> None:
    """The arena holds only the round of now: earlier ones are never needed again."""
    for at, folder in zip((1, 3, 5), folders(memory_path), strict=False):
        job = Job(folder, arena_nbytes=(1 << 20) + 4096)
        assert len(job.rank.prepared.portions) == 2
        for number in range(2):
            job.arena.memory[:] = 0xEE
            job.stage(number)
            with pytest.raises(Crash):
                job.perform(FaultyStore(job.store, CrashAt(at, "torn"), counted=CHANGING), number, repeated=False)
            done = job.perform(job.store, number, repeated=True)
            job.known += done.checksums
        assert job.finish(done) == blocking


def test_a_fragment_file_of_somebody_else_is_never_replaced(memory_path: Path) -> None:
    job = Job(memory_path)
    job.stage(0)
    other = b"another writer's"
    job.store.create(job.draft.path(fragments_file(0)), other)
    for repeated in (False, True):
        with pytest.raises(PathOccupied):
            job.perform(job.store, 0, repeated=repeated)
        assert job.store.read(job.draft.path(fragments_file(0)), 100) == other
        job.store.remove_tree(job.draft.path("extra"))


def test_an_attested_round_can_be_repeated_and_says_the_same(memory_path: Path) -> None:
    job = Job(memory_path)
    job.stage(0)
    first = job.perform(job.store, 0, repeated=False)
    assert job.perform(job.store, 0, repeated=True) == first


class InMemory(RecordingStore):
    """A store that says of itself that its files lie in memory."""

    in_memory = True


@pytest.mark.parametrize("kind", [RecordingStore, InMemory])
def test_only_into_memory_nothing_is_written_before_all_is_staged(kind: type[RecordingStore], memory_path: Path) -> None:
    """A device works while the trainer copies; a second copy would only take the processor from the trainer's."""
    job = Job(memory_path)
    store, share = kind(job.store), job.rank.share(job.draft, job.store, "power")
    write = Write(0, share.attempt, "", 0, job.arena.number, 0, share.beside, b"", repeated=False)
    changed: list[int] = []

    def watch(nbytes: int) -> None:
        if not job.arena.filled:
            changed.append(sum(one.name in CHANGING for one in store.operations))
            job.stage(0)

    done = perform(store, write, share.structure, job.arena, watch=watch)
    assert [count > 0 for count in changed] == [kind is RecordingStore]
    assert done.file is not None
