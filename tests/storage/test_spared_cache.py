"""Reads that spare the page cache: the same bytes, from where they are, whatever part of them the cache holds."""

from __future__ import annotations

import ctypes
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastickpt.errors import StorageFailed, WrongLength
from elastickpt.format.arrays import ArrayId, ArraySpec, Box, Mesh
from elastickpt.storage import kernel, ranges, several_reads
from elastickpt.storage.local import LocalStore
from elastickpt.storage.store import lending_of
from elastickpt.training.held import HeldArray

MIB = 1 << 20
NBYTES = 3 * MIB + 1000
DATA = np.random.default_rng(7).integers(0, 256, NBYTES, dtype=np.uint8).tobytes()


class Calls:
    """`os.preadv` that records which descriptors were direct, may take fewer bytes, or fail on the direct ones."""

    def __init__(self, *, error: int = 0, at_most: int = NBYTES) -> None:
        self.error, self.at_most = error, at_most
        self.directs: list[bool] = []

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with open(f"/proc/self/fdinfo/{descriptor}") as said:
            direct = bool(int(said.read().split("flags:")[1].split()[0], 8) & os.O_DIRECT)
        self.directs.append(direct)
        if direct and self.error:
            raise OSError(self.error, os.strerror(self.error))
        return REAL_PREADV(descriptor, [buffers[0][: self.at_most]], offset)


REAL_PREADV = os.preadv


@pytest.fixture
def store(tmp_path):
    """Holds `file`, of which nothing is in the page cache."""
    (tmp_path / "file").write_bytes(DATA)
    with open(tmp_path / "file", "rb") as file:
        if kernel.file_system(str(tmp_path)) in kernel.IN_MEMORY or not kernel.direct_alignment(file.fileno()):
            pytest.skip("needs O_DIRECT at the temporary folder")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if kernel.cached_pages(file.fileno(), 0, NBYTES) != 0:
            pytest.skip("needs a kernel that says what its page cache holds, and lets go of it")
    return LocalStore(tmp_path)


def read(store, monkeypatch, calls, *reads):
    monkeypatch.setattr(ranges.os, "preadv", calls)
    with closing(store.open_reader("file", cache="spare")) as reader:
        for start, stop in reads:
            into = bytearray(stop - start)
            reader.read_into(start, memoryview(into))
            assert into == DATA[start:stop]
    return calls.directs


@pytest.mark.parametrize("start", [0, 1, 511, 4096, 5000, MIB - 1])
@pytest.mark.parametrize("stop", [MIB + 64 * 1024, 2 * MIB, 2 * MIB + 4097, NBYTES - 1, NBYTES])
def test_any_range_arrives_whole_and_stays_out_of_the_cache(store, tmp_path, monkeypatch, start, stop):
    assert set(read(store, monkeypatch, Calls(), (start, stop))) == {True}
    with open(tmp_path / "file", "rb") as file:
        assert kernel.cached_pages(file.fileno(), 0, NBYTES) == 0


def test_what_the_cache_holds_is_taken_from_there(store, tmp_path, monkeypatch):
    with open(tmp_path / "file", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        os.pread(file.fileno(), 4096, 2 * MIB)
    assert set(read(store, monkeypatch, Calls(), (MIB, 3 * MIB))) == {False}


def test_bytes_not_yet_on_the_device_are_read(store, tmp_path, monkeypatch):
    with open(tmp_path / "file", "r+b") as file:
        file.seek(MIB)
        file.write(DATA[MIB : 2 * MIB][::-1])
    monkeypatch.setattr(ranges.os, "preadv", Calls())
    with closing(store.open_reader("file", cache="spare")) as reader:
        into = bytearray(NBYTES)
        reader.read_into(0, memoryview(into))
    assert into == DATA[:MIB] + DATA[MIB : 2 * MIB][::-1] + DATA[2 * MIB :]


def test_small_ranges_go_through_the_cache(store, monkeypatch):
    assert set(read(store, monkeypatch, Calls(), (0, ranges.MIN_DIRECT_READ_NBYTES - 1))) == {False}


def test_a_reader_that_is_asked_for_nothing_special_fills_the_cache(store, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(ranges.os, "preadv", calls)
    assert store.read("file", NBYTES) == DATA
    assert set(calls.directs) == {False}


@pytest.mark.parametrize("at_most", [700, 4096 * 3, MIB // 2 + 512, 700_001])
def test_short_reads_are_continued(store, monkeypatch, at_most):
    assert True in read(store, monkeypatch, Calls(at_most=at_most), (1, NBYTES - 1))


def test_a_refused_direct_read_is_done_through_the_cache_and_not_tried_again(store, monkeypatch):
    assert read(store, monkeypatch, Calls(error=errno.EINVAL), (0, MIB), (MIB, 2 * MIB)) == [True, False, False]


def test_a_direct_read_that_fails_otherwise_is_an_error(store, monkeypatch):
    monkeypatch.setattr(ranges.os, "preadv", Calls(error=errno.EIO))
    with closing(store.open_reader("file", cache="spare")) as reader, pytest.raises(StorageFailed, match=r"read .*file"):
        reader.read_into(0, memoryview(bytearray(2 * MIB)))


def test_a_range_beyond_the_end_says_what_it_expected_and_found(store):
    said = pytest.raises(WrongLength, match=rf"file: expected at least {NBYTES + 1} bytes, found {NBYTES}")
    with closing(store.open_reader("file", cache="spare")) as reader, said:
        reader.read_into(MIB, memoryview(bytearray(NBYTES + 1 - MIB)))


# Who wants bytes once


MESH = Mesh("mesh", ("replica", "shard"), (2, 2), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("alone", "held"),
    [
        (False, {"sharing": "placed", "mesh": MESH, "placements": ("R", "S(0)")}),
        (True, {"sharing": "placed", "mesh": MESH, "placements": ("S(0)", "_S(0)")}),
        (True, {"sharing": "placed", "mesh": Mesh("m", ("a", "b"), (1, 4), (0, 1, 2, 3)), "placements": ("R", "S(0)")}),
        (True, {"sharing": "declared", "replicas": (3,)}),
        (False, {"sharing": "declared", "replicas": (0, 3)}),
        (False, {"sharing": "undeclared"}),
    ],
)
def test_an_array_is_held_alone_where_no_replica_of_it_is_known(alone, held):
    spec = ArraySpec(ArrayId("params", "model", "w", "value"), (4,), "float32")
    assert HeldArray(spec, Box((0,), (2,)), torch.zeros(2), "parameter", **held).held_alone is alone


# Bytes that are lent


def lent(store, monkeypatch, calls, start, stop):
    monkeypatch.setattr(ranges.os, "preadv", calls)
    with closing(store.open_reader("file", cache="spare")) as reader:
        into = bytearray(stop - start)
        found = lending_of(reader).lend(start, memoryview(into))
        assert found == DATA[start:stop]
        return found.obj is into


@pytest.mark.parametrize("start", [0, 1, 511, 4096, MIB - 1, 2 * MIB + 1000])
@pytest.mark.parametrize("nbytes", [64 * 1024, MIB - 1, MIB])
def test_what_comes_past_the_cache_is_lent(store, monkeypatch, start, nbytes):
    calls = Calls()
    assert not lent(store, monkeypatch, calls, start, start + nbytes)
    assert calls.directs == [True]


@pytest.mark.parametrize("calls", [Calls(error=errno.EINVAL), Calls(at_most=70_000)])
def test_what_is_refused_or_cut_short_is_filled_in(store, monkeypatch, calls):
    assert lent(store, monkeypatch, calls, 5, MIB)


@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (0, 2 * MIB)])
def test_small_and_very_large_ranges_are_filled_in(store, monkeypatch, start, stop):
    assert lent(store, monkeypatch, Calls(), start, stop)


def test_lending_beyond_the_end_says_what_it_expected_and_found(store):
    said = pytest.raises(WrongLength, match=rf"file: expected at least {NBYTES + 1} bytes, found {NBYTES}")
    with closing(store.open_reader("file", cache="spare")) as reader, said:
        lending_of(reader).lend(3 * MIB, memoryview(bytearray(NBYTES + 1 - 3 * MIB)))


# Several reads at once


def several(store, *places):
    """What is lent of these ranges, (offset, number of bytes), or None."""
    with closing(store.open_reader("file", cache="spare")) as reader:
        lent = lending_of(reader).lend_several(places)
        return None if lent is None else list(map(bytes, lent))


RANGES = [(700 + 97_000 * k, 40_000 + 11 * k) for k in range(20)]
HELD = [DATA[start : start + nbytes] for start, nbytes in RANGES]


@pytest.fixture
def contexts(store):
    """That the system has them."""
    if several(store, (0, MIB)) is None:
        pytest.skip("needs io_submit(2)")


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_ranges_are_what_the_file_holds(store, contexts, data):
    ends = sorted(data.draw(st.lists(st.integers(0, NBYTES), min_size=2, max_size=2 * several_reads.MOST, unique=True)))
    places = [(start, min(stop - start, 50_000)) for start, stop in zip(ends[::2], ends[1::2], strict=False)]
    found = several(store, *places)
    if sum(places[-1]) - places[0][0] < ranges.MIN_DIRECT_READ_NBYTES:
        assert found is None
    else:
        assert found == [DATA[start : start + nbytes] for start, nbytes in places]


def test_several_ranges_leave_the_cache_as_it_is(store, contexts, tmp_path):
    assert several(store, *RANGES) == HELD
    with open(tmp_path / "file", "rb") as file:
        assert kernel.cached_pages(file.fileno(), 0, NBYTES) == 0


@pytest.mark.parametrize(
    "places",
    [
        [(start, 64) for start in range(0, 4096 * (several_reads.MOST + 1), 4096)],
        [(0, MIB), (MIB + 5, MIB)],
        [(0, MIB), (NBYTES - 5, 6)],
    ],
    ids=["too many", "too large", "beyond the end"],
)
def test_what_cannot_be_read_at_once_is_left_to_who_reads_each(store, places):
    assert several(store, *places) is None


def test_what_the_cache_holds_some_of_is_left_to_who_reads_each(store, tmp_path):
    (tmp_path / "file").read_bytes()
    assert several(store, *RANGES) is None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EAGAIN, errno.EPERM])
def test_a_system_without_contexts_is_asked_for_each(store, monkeypatch, number):
    def refused(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(several_reads._Context, "__init__", refused)
    monkeypatch.setattr(several_reads._Context, "usable", False)
    monkeypatch.setattr(several_reads, "_FREE", [])
    assert several(store, *RANGES) is None
    assert several(store, *RANGES) is None


def test_a_failed_read_among_several_is_left_to_who_reads_each(store, contexts, monkeypatch):
    read = several_reads._Context.read
    monkeypatch.setattr(several_reads._Context, "read", lambda *own: [*read(*own)[:-1], -errno.EIO])
    assert several(store, *RANGES) is None


def test_a_kernel_that_takes_some_of_the_reads_leaves_all_to_who_reads_each(store, contexts, monkeypatch):
    call, taken = several_reads._Context._call, []

    def takes_three(self, which, *rest):
        if which != several_reads._SUBMIT:
            return call(self, which, *rest)
        taken.append(which)
        if len(taken) > 1:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return call(self, which, rest[0], ctypes.c_long(3), rest[2])

    monkeypatch.setattr(several_reads._Context, "_call", takes_three)
    assert (several(store, *RANGES), len(taken)) == (None, 2)
    monkeypatch.undo()
    assert several(store, *RANGES) == HELD


def test_reads_that_an_interrupt_left_under_way_reach_nobody_else(store, contexts, monkeypatch):
    call = several_reads._Context._call

    def interrupted(self, which, *rest):
        if which == several_reads._GET_EVENTS:
            raise KeyboardInterrupt
        return call(self, which, *rest)

    monkeypatch.setattr(several_reads._Context, "_call", interrupted)
    memory, context = ranges._bounce(), several_reads._own_context()
    with pytest.raises(KeyboardInterrupt):
        several(store, *RANGES)
    monkeypatch.undo()
    assert several(store, *RANGES) == HELD
    assert several_reads._own_context() is not context
    assert ranges._bounce() is not memory


def test_memory_that_reads_may_still_fill_is_given_up_where_the_kernel_does_not_say_what_came(store, contexts, monkeypatch):
    call = several_reads._Context._call

    def silent(self, which, *rest):
        if which == several_reads._GET_EVENTS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(self, which, *rest)

    monkeypatch.setattr(several_reads._Context, "_call", silent)
    memory = ranges._bounce()
    with pytest.raises(StorageFailed, match=r"read .*file"):
        several(store, *RANGES)
    monkeypatch.undo()
    assert ranges._bounce() is not memory
    assert several(store, *RANGES) == HELD


def test_a_thread_takes_the_context_of_one_that_ended(store, contexts):
    def used():
        assert several(store, *RANGES) == HELD
        return id(several_reads._own_context())

    first, second = (run_in_thread(used) for _ in range(2))
    assert first == second


def run_in_thread(work):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def test_a_process_that_was_forked_off_reads_with_a_context_of_its_own(store, contexts):
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = several(store, *RANGES) == HELD
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert several(store, *RANGES) == HELD
