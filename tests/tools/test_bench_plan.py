"""The plan is the options' product, and the measured state is what it claims to be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from rich.console import Console

from tools.bench import conduct
from tools.bench.contestants import LIBRARIES, is_known
from tools.bench.plan import LARGE, RESHARDS, SMALL, TOPICS, USUAL, Options, Part, Place, disk_nbytes, jobs, memory_nbytes
from tools.bench.state import ITEMS, clear, fill, local_nbytes, rows_of, shapes_for, small_state, wrong_pieces

DISK, TMPFS = Place("disk", "/a", "ext4"), Place("tmpfs", "/b", "tmpfs")
ALL = Options((Part(TOPICS, ranks=(1, 2, 4)),), 5, ("dcp", "tc"))


def test_every_place_and_rank_count_is_measured_once() -> None:
    found = [(job.place.name, job.ranks) for job in jobs(ALL, [DISK, TMPFS]) if job.kind == "same"]
    assert found == [(place, ranks) for place in ("disk", "tmpfs") for ranks in (1, 2, 4)]


def test_each_resharding_load_follows_the_save_it_needs() -> None:
    found = jobs(ALL, [DISK])
    pairs = [(before, after) for before, after in pairwise(found) if after.kind == "reshard"]
    assert [(before.ranks, after.ranks) for before, after in pairs] == list(RESHARDS)
    assert all(before.kind == "prepare" and after.from_ranks == before.ranks for before, after in pairs)


def test_memory_is_measured_with_one_contestant_per_process() -> None:
    found = [(job.ranks, job.contestants) for job in jobs(ALL, [DISK, TMPFS]) if job.kind == "memory"]
    assert found == [(ranks, (name,)) for ranks in (1, 2, 4) for name in ("dcp", "tc")]


def test_many_small_tensors_are_measured_at_all_ranks_in_all_places() -> None:
    found = [(job.place.name, job.ranks) for job in jobs(ALL, [DISK, TMPFS]) if job.kind == "small"]
    assert found == [(place, ranks) for place in ("disk", "tmpfs") for ranks in (1, 2, 4)]


def test_saves_beside_training_have_jobs_of_their_own_with_room_for_everyones_copy() -> None:
    beside = [job for job in jobs(ALL, [DISK]) if job.kind == "async"]
    assert [job.ranks for job in beside] == [1, 2, 4]
    assert memory_nbytes(beside[0]) >= (4 + len(ALL.contestants)) * beside[0].nbytes


def test_saves_alone_do_not_load() -> None:
    only = Options((Part(("save",), ranks=(2,)),), 5, ("dcp",))
    assert [(job.kind, job.loads) for job in jobs(only, [DISK])] == [("same", False)]


def test_the_usual_set_measures_both_sizes_on_disk_and_in_memory_and_each_job_once() -> None:
    found = jobs(Options(USUAL, 3, ("dcp",)), [DISK, TMPFS])
    assert len(set(found)) == len(found)
    kinds = {"same", "async", "prepare", "reshard", "small"}
    assert {job.kind for job in found} == kinds
    assert {(job.place.name, job.nbytes) for job in found if job.kind == "same"} == {
        (place, nbytes) for place in ("disk", "tmpfs") for nbytes in (SMALL, LARGE)
    }


def test_no_job_begins_when_the_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes a note; what was measured stands."""
    monkeypatch.setattr(conduct, "lacking_space", lambda job: None)
    found = jobs(ALL, [DISK])
    done: list[str] = []
    for minutes, count in ((0.0, 0), (60.0, len(found)), (None, len(found))):
        done.clear()
        conductor = conduct.Conductor(lambda job, tell: done.append(job.title), Console(quiet=True), minutes=minutes)
        conductor.carry_out(found)
        assert len(done) == count
        assert sum("minutes are over" in note for note in conductor.notes) == len(found) - count


def test_a_resharding_job_has_room_for_everyones_files_at_once() -> None:
    (reshard, *_) = (job for job in jobs(ALL, [DISK]) if job.kind == "reshard")
    assert disk_nbytes(reshard) > (len(reshard.contestants) + 2) * reshard.nbytes
    assert memory_nbytes(reshard) > 2 * reshard.nbytes


def test_only_tmpfs_has_no_device_below_it() -> None:
    assert DISK.has_device
    assert not TMPFS.has_device


@pytest.mark.parametrize("nbytes", [100_000_000, 1_800_000_000])
def test_the_state_has_the_size_asked_for(nbytes: int) -> None:
    found = sum(4 * len(ITEMS) * math.prod(shape) for shape in shapes_for(nbytes).values())
    assert abs(found - nbytes) < 0.05 * nbytes


@pytest.mark.parametrize(("extent", "ranks"), [(10, 4), (101, 2), (3, 4), (0, 2), (8, 4)])
def test_rows_are_those_of_torch_chunk(extent: int, ranks: int) -> None:
    import torch

    chunks = [chunk.tolist() for chunk in torch.arange(extent).chunk(ranks)] if extent else []
    chunks += [[]] * (ranks - len(chunks))
    assert [list(range(*rows_of(extent, rank=rank, ranks=ranks))) for rank in range(ranks)] == chunks


def test_small_tensors_are_dealt_out_without_overlap() -> None:
    names = [name for rank in range(4) for name in small_state(rank=rank, ranks=4)[f"stage_{rank}"]]
    assert len(names) == len(set(names)) == 10_000


def test_a_load_that_leaves_one_tensor_out_is_seen() -> None:
    state = small_state(rank=0, ranks=100)
    fill(state)
    assert wrong_pieces(state) == 0
    assert local_nbytes(state) == 100 * 1024
    state["stage_0"]["tensor_00007"].zero_()
    assert wrong_pieces(state) == 1
    clear(state)
    assert wrong_pieces(state) == 100


def test_contestants_are_known_by_library_and_threads() -> None:
    assert all(is_known(name) for name in (*LIBRARIES, "dcp:4", "tc+fsync:2"))
    assert not any(is_known(name) for name in ("dpc", "dcp:", "dcp:x", "dcp:0", "elastickpt:2"))
