"""Plans of ranks that do not exist: larger and 3-D meshes, proven to cover every array exactly once. No process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from imagined import held, job, live, plain, records

from elastickpt.commit.prove import ProofMemory, prove, require_distinct_ranges
from elastickpt.errors import CoverageGap, CoverageOverlap, StructureConflict
from elastickpt.format.arrays import Mesh
from elastickpt.layout.references import references_of
from elastickpt.saving.merge import merge
from elastickpt.saving.plan import plan_writes
from elastickpt.saving.request import PLAIN, Placing
from elastickpt.saving.structure import table_of

SHAPES = {
    "even": (64, 32),
    "ten over four": (10, 6),
    "101 over two": (101, 3),
    "vocabulary": (50_257, 8),
    "few rows": (3, 40),
    "one row": (1, 1000),
    "scalar": (),
    "empty": (0, 5),
    "vector": (13,),
    "cube": (5, 7, 9),
}


def layouts() -> Iterator[tuple[str, Mesh, tuple[str, ...]]]:
    fsdp_tp = Mesh("fsdp.tp", ("fsdp", "tp"), (4, 2), tuple(range(8)))
    yield "TP2 × FSDP4, rows twice", fsdp_tp, ("_S(0)", "S(0)")
    yield "TP2 columns × FSDP4 rows", fsdp_tp, ("S(0)", "S(1)")
    cube = Mesh("dp.fsdp.tp", ("dp", "fsdp", "tp"), (2, 3, 4), tuple(range(24)))
    yield "replicas × FSDP3 × TP4", cube, ("R", "_S(0)", "S(0)")
    yield "replicas × FSDP3 × TP4 columns", cube, ("R", "S(0)", "S(1)")
    yield "all replicas", cube, ("R", "R", "R")
    yield "16 × 8", Mesh("fsdp.tp", ("fsdp", "tp"), (16, 8), tuple(range(128))), ("_S(0)", "S(0)")
    yield "128 replicas", Mesh("dp", ("dp",), (128,), tuple(range(128))), ("R",)


@pytest.mark.parametrize("choice", [PLAIN, Placing("packed")], ids=["plain", "packed"])
@pytest.mark.parametrize(("name", "mesh", "placements"), list(layouts()), ids=[name for name, *_ in layouts()])
def test_every_element_is_stored_exactly_once(name: str, mesh: Mesh, placements: tuple[str, ...], choice: Placing) -> None:
    """Uneven, empty, replicated and 3-D: the proof that a committer runs holds for the plans of all simulated ranks.

    [SAVE-33, SAVE-42]
    """
    axes = [int(p[-2]) for p in placements if p != "R"]
    shapes = {n: s for n, s in SHAPES.items() if not axes or len(s) > max(axes)}
    states = [live(*(held(n, s, rank, mesh, placements) for n, s in shapes.items())) for rank in mesh.ranks]
    merged, maps = job(states, choice)
    proven = prove(records(merged), maps)
    require_distinct_ranges(maps)
    assert len(proven) == len(shapes)
    if choice.rule == "packed":
        assert all(len(columns.files) <= 1 for columns in maps)
    stored = sum(int(columns.pieces.nbytes.sum()) for columns in maps)
    assert stored == sum(record.spec.nbytes for record in proven)


@pytest.mark.parametrize(("name", "mesh", "placements"), list(layouts()), ids=[name for name, *_ in layouts()])
def test_files_that_writers_open_are_counted_before_they_plan(name: str, mesh: Mesh, placements: tuple[str, ...]) -> None:
    """No fewer than there are, and not many more."""
    shapes = {"large": (3001, 1024), "small": (40, 30), "scalar": (), "vector": (700_000,)}
    axes = [int(p[-2]) for p in placements if p != "R"]
    shapes = {n: s for n, s in shapes.items() if not axes or len(s) > max(axes)}
    states = [live(*(held(n, s, rank, mesh, placements) for n, s in shapes.items())) for rank in mesh.ranks]
    merged = merge([table_of(states[0])], [mesh.ranks])
    plans = [plan_writes(state.arrays, merged.shared[0], rank=rank) for rank, state in enumerate(states)]
    opened = sum(len(plan.files) for plan in plans)
    assert opened <= merged.file_parts <= 1.3 * opened + 8


def test_pipeline_stages_with_their_own_meshes_are_one_checkpoint() -> None:
    """Four stages of FSDP2(2): eight ranks, four tables, every array written by its own stage only."""
    states = []
    for rank in range(8):
        stage = rank // 2
        mesh = Mesh(f"dp@{2 * stage}-{2 * stage + 1}", ("dp",), (2,), (2 * stage, 2 * stage + 1))
        states.append(live(held(f"layers.{stage}.w", (1001, 64), rank, mesh, ("S(0)",))))
    merged, maps = job(states)
    writers = {record.key: record.writers for record in prove(records(merged), maps)}
    assert writers == {f"params/model/layers.{s}.w/value": (2 * s, 2 * s + 1) for s in range(4)}


def test_replicas_share_the_bytes_evenly() -> None:
    """64 MiB held by 8 ranks: each writes an eighth."""
    mesh = Mesh("dp", ("dp",), (8,), tuple(range(8)))
    _, maps = job([live(held("w", (4096, 4096), rank, mesh, ("R",))) for rank in range(8)])
    assert [int(columns.pieces.nbytes.sum()) for columns in maps] == [8 << 20] * 8


def test_replicas_store_whole_boxes_in_packs_of_one_size() -> None:
    """64 MiB go whole to one of 8; 65 MiB to each an eighth; many small ones spread by their bytes. [SAVE-116, SAVE-117]"""
    mesh = Mesh("dp", ("dp",), (8,), tuple(range(8)))
    packed = Placing("packed")
    for rows, sizes in ((4096, [64 << 20]), (4160, [8 * 520 * 16384 // 8] * 8)):
        _, maps = job([live(held("w", (rows, 4096), rank, mesh, ("R",))) for rank in range(8)], packed)
        assert sorted(int(columns.pieces.nbytes.sum()) for columns in maps if len(columns.pieces)) == sizes
    many = {f"layers.{n}": (1 + n % 17, 64) for n in range(100)}
    _, maps = job([live(*(held(n, s, rank, mesh, ("R",)) for n, s in many.items())) for rank in range(8)], packed)
    sums = [int(columns.pieces.nbytes.sum()) for columns in maps]
    assert max(sums) - min(sums) <= 17 * 64 * 4


@pytest.mark.parametrize(("name", "mesh", "placements"), list(layouts()), ids=[name for name, *_ in layouts()])
def test_what_references_will_leave_out_is_known_before(name: str, mesh: Mesh, placements: tuple[str, ...]) -> None:
    """[UCF-161]"""
    shapes = {n: s for n, s in SHAPES.items() if not any(p != "R" and int(p[-2]) >= len(s) for p in placements)}
    for n, shape in shapes.items():
        merged, maps = job([live(held(n, shape, rank, mesh, placements)) for rank in mesh.ranks], Placing("packed"))
        left_out = references_of(merged.outline.arrays, maps).left_out
        assert [key in note for note in merged.notes for key in left_out] == [True] * len(left_out)
        assert bool(merged.notes) == bool(left_out)


def test_small_replicated_arrays_spread_over_the_replicas() -> None:
    """Whole to one replica each, not all to the first."""
    ranks = tuple(range(4))
    _, maps = job([live(*(plain(f"layers.{n}.norm", (64,), "declared", ranks) for n in range(200))) for _ in ranks])
    counts = [len(columns.pieces) for columns in maps]
    assert sum(counts) == 200
    assert min(counts) > 25


def test_the_plan_of_a_rank_among_ten_thousand_does_not_grow_with_them() -> None:
    """Distinct tables are what is merged: one here. A rank's plan has as many pieces as it holds arrays."""
    mesh = Mesh("fsdp", ("fsdp",), (10_000,), tuple(range(10_000)))
    arrays = {f"layers.{n}.w": (20_000, 128) for n in range(50)}
    states = {rank: live(*(held(n, s, rank, mesh, ("S(0)",)) for n, s in arrays.items())) for rank in (0, 1, 9_999)}
    assert len({table_of(state) for state in states.values()}) == 1
    merged = merge([table_of(states[0])], [mesh.ranks])
    for rank, state in states.items():
        plan = plan_writes(state.arrays, merged.shared[0], rank=rank)
        assert [len(file.pieces) for file in plan.files] == [1] * 50
        assert plan.nbytes == 50 * 2 * 128 * 4


def test_a_missing_rank_is_a_gap_and_a_doubled_one_an_overlap() -> None:
    """The proof can fail: leave a writer out, or count one twice."""
    mesh = Mesh("fsdp", ("fsdp",), (4,), tuple(range(4)))
    merged, maps = job([live(held("w", (10, 6), rank, mesh, ("S(0)",))) for rank in range(4)])
    with pytest.raises(CoverageGap, match="params/model/w/value"):
        prove(records(merged), maps[:1] + maps[2:])
    with pytest.raises(CoverageOverlap, match="writer 1"):
        prove(records(merged), [*maps, maps[1]])


def test_what_was_proven_is_not_proven_again_and_nothing_else_is_taken_for_it() -> None:
    """The next save's maps have other checksums and the same boxes; a box too few, or one at another place, is seen."""
    mesh = Mesh("fsdp", ("fsdp",), (4,), tuple(range(4)))
    merged, maps = job([live(held("w", (10, 6), rank, mesh, ("S(0)",))) for rank in range(4)])
    expected, memory = tuple(records(merged)), ProofMemory()
    proven = prove(expected, maps, memory)
    again = [replace(m, pieces=replace(m.pieces, checksums=m.pieces.checksums + np.uint64(1))) for m in maps]
    assert prove(expected, again, memory) is proven
    assert prove(tuple(records(merged)), maps) == proven
    with pytest.raises(CoverageGap):
        prove(expected, maps[:3], memory)
    moved = replace(maps[0], pieces=replace(maps[0].pieces, start=maps[0].pieces.start + np.array([1, 0])))
    with pytest.raises(CoverageOverlap):
        prove(expected, [moved, *maps[1:]], memory)
    with pytest.raises(CoverageOverlap):
        prove(expected, [*maps, maps[0]], memory)
    other = replace(maps[0], pieces=replace(maps[0].pieces, arrays=("params/model/v/value",)))
    with pytest.raises(StructureConflict, match="which no rank announced"):
        prove(expected, [other, *maps[1:]], memory)


# -- contradictions between ranks --------------------------------------------------------------------------------------


def test_one_name_with_two_shapes_is_refused() -> None:
    """[SAVE-30]"""
    states = [live(plain("w", (4,), "undeclared")), live(plain("w", (5,), "undeclared"))]
    with pytest.raises(StructureConflict, match=r"array params/model/w/value: shape is \(4,\) on rank 0 and \(5,\) on rank 1"):
        job(states)


def test_a_declared_replica_that_a_rank_lacks_is_refused() -> None:
    states = [live(plain("w", (4,), "declared", (0, 1, 2))), live(plain("w", (4,), "declared", (0, 1, 2))), live()]
    with pytest.raises(StructureConflict, match=r"missing on \[2\]"):
        job(states)


def test_a_mesh_rank_that_lacks_the_array_is_refused() -> None:
    mesh = Mesh("dp", ("dp",), (2,), (0, 1))
    with pytest.raises(StructureConflict, match=r"missing on \[1\]"):
        job([live(held("w", (4, 4), 0, mesh, ("S(0)",))), live()])


def test_one_name_held_in_two_ways_is_refused() -> None:
    mesh = Mesh("dp", ("dp",), (2,), (0, 1))
    sharded = [live(held("w", (4, 4), rank, mesh, ("S(0)",))) for rank in (0, 1)]
    with pytest.raises(StructureConflict, match="held in different ways on rank 0"):
        job([*sharded, live(plain("w", (4, 4), "undeclared"))])


def test_equal_names_on_several_meshes_are_compared() -> None:
    """Two stages that both call a tensor `w`, or two replicas with meshes of their own: only contents can tell."""
    meshes = [Mesh("dp@0-1", ("dp",), (2,), (0, 1)), Mesh("dp@2-3", ("dp",), (2,), (2, 3))]
    merged, _ = job([live(held("w", (4, 4), rank, meshes[rank // 2], ("S(0)",))) for rank in range(4)])
    assert merged.compares
    assert [(table[0].writes, table[0].peers) for table in merged.shared] == [(True, (0, 1, 2, 3)), (False, (0, 1, 2, 3))]


@pytest.mark.parametrize(("replicas", "shards"), list(product((1, 2, 3), (1, 2, 5))))
def test_documents_are_written_by_exactly_one_rank(replicas: int, shards: int) -> None:
    """Each array's, and each parameter's group's."""
    mesh = Mesh("hsdp", ("replicate", "shard"), (replicas, shards), tuple(range(replicas * shards)))
    states = [live(*(held(f"w{n}", (12, 4), rank, mesh, ("R", "S(0)")) for n in range(20))) for rank in mesh.ranks]
    merged = merge([table_of(states[0])], [mesh.ranks])
    plans = [plan_writes(state.arrays, merged.shared[0], rank=rank) for rank, state in enumerate(states)]
    found = sorted((document.array, document.heads_group) for plan in plans for document in plan.documents)
    assert found == [(n, True) for n in range(20)]
