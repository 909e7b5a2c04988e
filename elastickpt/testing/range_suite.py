"""What every store passes about ranges of files. Part of `store_suite`."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from elastickpt.errors import WrongLength
from elastickpt.format.digest import block_checksum
from elastickpt.ranks.threads import Pool
from elastickpt.storage.kernel import aligned_buffer
from elastickpt.storage.store import Caching, Store, lending_of
from elastickpt.testing.lacking import lacks

MIB = 1 << 20


def write(store: Store, path: str, *ranges: tuple[int, bytes], nbytes: int) -> None:
    with closing(store.open_writer(path, nbytes)) as writer:
        for offset, data in ranges:
            writer.write(offset, memoryview(data))
        writer.sync()


class RangeSuite:
    def test_a_new_file_has_its_size_and_reads_as_zero(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (3, b"abc"), nbytes=10)
        assert store.read("file", 10) == b"\0\0\0abc\0\0\0\0"

    def test_opening_a_writer_again_keeps_what_was_written(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (0, b"abc"), nbytes=6)
        write(store, "file", (3, b"def"), nbytes=6)
        assert store.read("file", 6) == b"abcdef"

    def test_opening_a_writer_sets_the_size(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        write(store, "file", (0, b"abcdef"), nbytes=6)
        write(store, "file", nbytes=3)
        assert store.read("file", 6) == b"abc"

    @pytest.mark.parametrize("shift", [0, 1, 513])
    def test_large_ranges_arrive_whole_however_memory_and_file_are_aligned(self, store: Store, shift: int) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        memory = aligned_buffer(5 * MIB)
        memory[:] = np.random.default_rng(0).integers(0, 256, len(memory))
        whole, seam = memory.data, 2 * MIB + 77
        one, two = (store.open_writer("file", len(whole)) for _ in range(2))
        with closing(one), closing(two):
            one.write(0, whole[:seam])
            two.write(seam, memory.copy().data[seam:])
            one.write(MIB, whole[MIB + shift : 2 * MIB + shift])
            one.write(MIB, whole[MIB : 2 * MIB])
            one.sync()
            two.sync()
        assert store.read("file", len(whole)) == whole.tobytes()
        into = aligned_buffer(3 * MIB)
        with closing(store.open_reader("file")) as reader:
            reader.read_into(shift, into.data)
        assert into.tobytes() == whole[shift : shift + 3 * MIB].tobytes()

    def test_views_of_any_element_type_and_shape_are_bytes(self, store: Store) -> None:
        values = np.arange(6, dtype="<f4").reshape(2, 3)
        store.create("created", values.tobytes())
        into = np.zeros((2, 3), dtype="<f4")
        with closing(store.open_reader("created")) as reader:
            reader.read_into(0, into.data)
        assert into.tolist() == values.tolist()
        if not store.capabilities.ranged_writes:
            return
        with closing(store.open_writer("written", 24)) as writer:
            writer.write(0, values.data)
        assert store.read("written", 24) == values.tobytes()

    def test_threads_write_disjoint_ranges_through_one_writer(self, store: Store) -> None:
        if lacks(store, capability="ranged_writes", operation=lambda: store.open_writer("file", 10)):
            return
        whole = np.random.default_rng(1).integers(0, 256, 100_003, dtype=np.uint8).tobytes()
        with closing(store.open_writer("file", len(whole))) as writer, Pool("elastickpt-suite", 8) as pool:
            starts = range(0, len(whole), 997)
            pool.share_out(starts, lambda start: writer.write(start, memoryview(whole)[start : start + 997]))
        assert store.read("file", len(whole)) == whole

    def test_a_reader_fills_any_range(self, store: Store) -> None:
        store.create("file", bytes(range(100)))
        with closing(store.open_reader("file")) as reader:
            assert reader.nbytes == 100
            for start, stop in ((0, 100), (10, 20), (99, 100), (100, 100), (0, 0)):
                into = bytearray(stop - start)
                reader.read_into(start, memoryview(into))
                assert into == bytes(range(start, stop))

    @pytest.mark.parametrize("cache", ["fill", "spare"])
    def test_every_way_of_lending_gives_what_the_file_holds(self, store: Store, cache: Caching) -> None:
        whole = np.random.default_rng(2).integers(0, 256, 3 * MIB + 17, dtype=np.uint8).tobytes()
        store.create("file", whole)
        ends = (5, 5000, 5000 + 300_000, 2 * MIB, 2 * MIB + 1, len(whole))
        with closing(store.open_reader("file", cache=cache)) as reader:
            lending = lending_of(reader)
            own = [memoryview(bytearray(stop - start)) for start, stop in pairwise(ends)]
            found = [bytes(lending.lend(start, own[k])) for k, (start, _) in enumerate(pairwise(ends))]
            assert found == [whole[start:stop] for start, stop in pairwise(ends)]
            groups = [[memoryview(bytearray(len(one))) for one in found[low:high]] for low, high in ((0, 2), (2, 3), (3, 9))]
            sums = lending.fill_each(ends[0], groups, block_checksum)
            assert [bytes(view) for group in groups for view in group] == found
            assert sums == list(map(block_checksum, found))
            filled = [memoryview(bytearray(len(one))) for one in found]
            if lending.fill(ends[0], filled):
                assert list(map(bytes, filled)) == found
            several = lending.lend_several([(start, 3) for start, _ in pairwise(ends)])
            if several is not None:
                assert list(map(bytes, several)) == [one[:3] for one in found]

    def test_each_way_of_lending_beyond_the_end_says_what_it_expected_and_found(self, store: Store) -> None:
        store.create("file", b"0123456789")
        with closing(store.open_reader("file")) as reader:
            lending, into = lending_of(reader), memoryview(bytearray(6))
            for ask in (
                lambda: lending.lend(5, into),
                lambda: lending.fill_each(2, [[into[:3]], [into]], len),
                lambda: lending.fill_each(2, [[into[:3], into]], len),
                lambda: lending.fill(2, [into[:3], into]) or lending.lend(5, into),
                lambda: lending.lend_several([(2, 3), (5, 6)]) or lending.lend(5, into),
            ):
                with pytest.raises(WrongLength, match="file: expected at least 11 bytes, found 10"):
                    ask()

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (5, 6), (10, 1), (1000, 1)])
    def test_a_range_beyond_the_end_says_what_it_expected_and_found(self, store: Store, offset: int, nbytes: int) -> None:
        store.create("file", b"0123456789")
        said = pytest.raises(WrongLength, match=rf"file: expected at least {offset + nbytes} bytes, found 10")
        with closing(store.open_reader("file")) as reader, said:
            reader.read_into(offset, memoryview(bytearray(nbytes)))

    def test_writers_and_readers_may_be_closed_twice(self, store: Store) -> None:
        store.create("file", b"")
        reader = store.open_reader("file")
        reader.close()
        reader.close()
        if not store.capabilities.ranged_writes:
            return
        writer = store.open_writer("file", 0)
        writer.close()
        writer.close()

    def test_a_writer_keeps_its_file_when_the_folder_is_renamed(self, store: Store) -> None:
        if not (store.capabilities.ranged_writes and store.capabilities.no_replace_rename):
            return
        store.make_directories("draft")
        with closing(store.open_writer("draft/file", 3)) as writer:
            store.rename("draft", "final")
            writer.write(0, memoryview(b"abc"))
            writer.sync()
        assert store.read("final/file", 3) == b"abc"
        assert not store.exists("draft")
