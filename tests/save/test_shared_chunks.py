"""V14: DP4 × TP2 ranks that write their pieces of one chunk file at once, as the library plans it, lose not one element.

Each rank is a writer of its own over the same store: its plan from `plan_writes`, its bytes by `write_plan`, its fragment map;
then the proof, the commit, and every element against the whole array.
"""

from __future__ import annotations

import multiprocessing
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from imagined import Job, held, identity, job_of, live

from elastickpt.commit.draft import Draft
from elastickpt.format.arrays import Box, Mesh
from elastickpt.format.records import FileDigest
from elastickpt.loading.fetch import fetch
from elastickpt.loading.opened import open_in
from elastickpt.loading.targets import Wanted
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.opening import open_store
from elastickpt.storage.store import Store

MESH = Mesh("dp.tp", ("dp", "tp"), (4, 2), tuple(range(8)))
REPEATS = 100
# name: (shape, placements, writers of a chunk file). Where a cut of columns is no regular grid, all eight share one file.
CASES: dict[str, tuple[tuple[int, ...], tuple[str, str], int]] = {
    "columns of columns": ((37, 101), ("_S(1)", "S(1)"), 8),
    "rows of columns": ((37, 101), ("S(0)", "S(1)"), 4),
    "columns, replicated": ((600, 1001), ("R", "S(1)"), 4),
    "columns of a cube": ((5, 101, 9), ("_S(1)", "S(1)"), 8),
    "rows of rows": ((1013, 3), ("_S(0)", "S(0)"), 8),
    "beyond the page cache": ((1024, 2 * 4099), ("_S(1)", "S(1)"), 8),
}
SMALL = [name for name in CASES if name != "beyond the page cache"]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path) if request.param == "local" else MemoryStore(f"test-{uuid.uuid4().hex}")


def simulated(case: str) -> Job:
    shape, placements, writers = CASES[case]
    job = job_of([live(held("w", shape, rank, MESH, placements)) for rank in MESH.ranks])
    files: dict[str, list[bool]] = {}
    for rank in MESH.ranks:
        for file in job.plan(rank).files:
            files.setdefault(file.path, []).append(any(p.run.row_nbytes < p.run.nbytes for p in file.pieces))
    assert {len(by) for by in files.values()} == {writers}
    assert all(map(all, files.values())) == (placements == ("_S(1)", "S(1)"))  # then every piece is strided
    return job


def content(case: str, seed: int) -> np.ndarray:
    """Random bits without a zero byte: a lost element reads as zero."""
    shape = CASES[case][0]
    count = 4 * int(np.prod(shape))
    return np.random.default_rng(seed).integers(1, 256, count, dtype=np.uint8).view(np.uint32).reshape(shape)


def require_every_element(store: Store, name: str, whole: np.ndarray) -> None:
    opened = open_in(store, name)
    into = np.zeros(whole.shape, dtype=np.uint32)
    fetch(opened, [Wanted(opened.records[identity("w")], Box.whole(whole.shape), into)])
    assert np.array_equal(into, whole)


def at_once(write: Callable[[int], FileDigest]) -> list[FileDigest]:
    """What each of eight writers returns; they begin together."""
    barrier = threading.Barrier(len(MESH.ranks), timeout=60)

    def begin(rank: int) -> FileDigest:
        barrier.wait()
        return write(rank)

    with ThreadPoolExecutor(len(MESH.ranks)) as pool:
        return list(pool.map(begin, MESH.ranks))


def repeat_in_threads(store: Store, case: str, repeats: int) -> None:
    job = simulated(case)
    for repeat in range(repeats):
        draft, whole = job.draft(store, f"c{repeat}"), content(case, repeat)
        attested = at_once(lambda rank, draft=draft, whole=whole: job.write(store, draft, rank, {"w": whole}))
        job.commit(store, draft, attested)
        require_every_element(store, draft.name, whole)
        store.remove_tree(draft.name)


@pytest.mark.parametrize("case", CASES)
def test_threads_that_share_a_chunk_lose_no_element(store: Store, case: str) -> None:
    repeat_in_threads(store, case, 8 if case in SMALL else 1)


@pytest.mark.long
@pytest.mark.parametrize("case", SMALL)
def test_threads_that_share_a_chunk_lose_no_element_a_hundred_times(store: Store, case: str) -> None:
    repeat_in_threads(store, case, REPEATS)


def write_in_process(url: str, case: str, rank: int, drafts: list[Draft], barrier: threading.Barrier, answers: str) -> None:
    store, job = open_store(url), simulated(case)
    for repeat, draft in enumerate(drafts):
        whole = content(case, repeat)
        barrier.wait()
        file = job.write(store, draft, rank, {"w": whole})
        Path(answers, f"{repeat}-{rank}").write_text(f"{file.path} {file.nbytes} {file.digest}")


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_a_chunk_lose_no_element_a_hundred_times(tmp_path: Path, case: str) -> None:
    repeats = REPEATS if case in SMALL else 5
    answers, url = tmp_path / "answers", (tmp_path / "store").as_uri()
    answers.mkdir()
    (tmp_path / "store").mkdir()
    store, job = open_store(url), simulated(case)
    drafts = [job.draft(store, f"c{repeat}") for repeat in range(repeats)]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(MESH.ranks), timeout=60)
    arguments = [(url, case, rank, drafts, barrier, str(answers)) for rank in MESH.ranks]
    processes = [context.Process(target=write_in_process, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    for repeat, draft in enumerate(drafts):
        said = [(answers / f"{repeat}-{rank}").read_text().split() for rank in MESH.ranks]
        job.commit(store, draft, [FileDigest(path, int(nbytes), digest) for path, nbytes, digest in said])
        require_every_element(store, draft.name, content(case, repeat))
