"""V14: concurrent writers of disjoint byte ranges of one chunk file lose not one byte, at any alignment."""

from __future__ import annotations

import itertools
import multiprocessing
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from elastickpt.storage.kernel import aligned_buffer
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.opening import open_store

WRITERS, REPEATS = 8, 100
MIB = 1 << 20


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return LocalStore(tmp_path) if request.param == "local" else MemoryStore(f"test-{uuid.uuid4().hex}")


def content(nbytes, *, seed):
    """Random bytes, none of them zero: a lost range reads as zero."""
    memory = aligned_buffer(nbytes)
    memory[:] = np.random.default_rng(seed).integers(1, 256, nbytes, dtype=np.uint8)
    return memory.data


def cuts(nbytes, *, seed):
    """Where the writers' shares begin and end: anywhere, so that neighbours share pages."""
    inner = np.random.default_rng(seed).choice(np.arange(1, nbytes), WRITERS - 1, replace=False)
    return [0, *sorted(inner.tolist()), nbytes]


def write_share(store, path, whole, *, start, stop, step):
    with closing(store.open_writer(path, len(whole))) as writer:
        for low in range(start, stop, step):
            writer.write(low, whole[low : min(low + step, stop)])
        writer.sync()


def test_threads_that_fill_one_file_lose_no_byte(store):
    nbytes = 64 * 1025
    with ThreadPoolExecutor(WRITERS) as pool:
        for repeat in range(REPEATS):
            path, whole, at = f"chunk-{repeat}", content(nbytes, seed=repeat), cuts(nbytes, seed=repeat)
            shares = [
                pool.submit(write_share, store, path, whole, start=start, stop=stop, step=1000 + repeat)
                for start, stop in itertools.pairwise(at)
            ]
            for share in shares:
                share.result()
            assert store.read(path, nbytes) == whole
            store.remove(path)


def test_threads_whose_ranges_bypass_the_page_cache_lose_no_byte_at_their_edges(store):
    nbytes = 8 * 3 * MIB + 4097
    whole = content(nbytes, seed=0)
    at = [0, *(index * 3 * MIB + 1000 * index for index in range(1, WRITERS)), nbytes]
    for repeat in range(5):
        path = f"chunk-{repeat}"
        with ThreadPoolExecutor(WRITERS) as pool:
            shares = [
                pool.submit(write_share, store, path, whole, start=start, stop=stop, step=stop - start)
                for start, stop in itertools.pairwise(at)
            ]
            for share in shares:
                share.result()
        assert store.read(path, nbytes) == whole
        store.remove(path)


def write_in_process(url, whole, index, barrier):
    """Large files and whole shares on even repeats, so that most bytes bypass the page cache; small steps on odd ones."""
    store = open_store(url)
    for repeat in range(REPEATS):
        nbytes = (1 + repeat % 4 * 4) * MIB + repeat
        at = cuts(nbytes, seed=repeat)
        barrier.wait()
        step = 100_000 if repeat % 2 else nbytes
        write_share(store, f"chunk-{repeat}", whole[:nbytes], start=at[index], stop=at[index + 1], step=step)
        barrier.wait()
        if index == 0:
            assert store.read(f"chunk-{repeat}", nbytes) == whole[:nbytes]
            store.remove(f"chunk-{repeat}")


@pytest.mark.long
def test_processes_that_fill_one_file_lose_no_byte(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, whole = context.Barrier(WRITERS, timeout=60), content(14 * MIB, seed=0)
    processes = [
        context.Process(target=write_in_process, args=(tmp_path.as_uri(), whole, index, barrier)) for index in range(WRITERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS
