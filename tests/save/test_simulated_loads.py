"""From one 3-D mesh to another, both simulated: every rank of the second loads what the plans of the first wrote.

Written once for each source, in memory, through the library's own plans, writes and commit; read through its load planner by
each coordinate of each target, which cuts what it must find out of the whole array by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import pytest
from imagined import held, identity, job_of, live, part_of

from elastickpt.format.arrays import Mesh
from elastickpt.layout.placement import physical_box
from elastickpt.loading.fetch import carry_out
from elastickpt.loading.opened import Opened, open_in
from elastickpt.loading.plan import plan_fetch
from elastickpt.loading.targets import Wanted
from elastickpt.storage.memory import MemoryStore

SHAPES = {
    "even": (96, 64),
    "ten": (10, 6),
    "101": (101, 37),
    "few rows": (3, 40),
    "one row": (1, 100),
    "cube": (5, 27, 9),
    "none": (0, 5),
}


@dataclass(frozen=True)
class Layout:
    """Axes and their sizes, slowest first; a first axis `pp` deals the arrays out to stages with meshes of their own."""

    sizes: Mapping[str, int]
    placements: tuple[str, ...]

    @property
    def world(self) -> int:
        return prod(self.sizes.values())

    def mesh(self, name: str) -> Mesh:
        """The mesh that array `name` is spread over."""
        axes = {axis: size for axis, size in self.sizes.items() if axis != "pp"}
        stage, count = list(SHAPES).index(name) % self.sizes.get("pp", 1), prod(axes.values())
        ranks = tuple(range(stage * count, (stage + 1) * count))
        return Mesh(f"{'.'.join(axes)}@{stage}", tuple(axes), tuple(axes.values()), ranks)


CUBE, PIPE, OTHER, SMALL = (
    {"dp": 2, "fsdp": 3, "tp": 4},
    {"pp": 2, "fsdp": 16, "tp": 8},
    {"tp": 3, "fsdp": 5, "dp": 2},
    {"dp": 1, "fsdp": 2, "tp": 2},
)
SOURCES = {
    "2×3×4, rows of rows": Layout(CUBE, ("R", "_S(0)", "S(0)")),
    "2×3×4, rows and columns": Layout(CUBE, ("R", "S(0)", "S(1)")),
    "2×3×4, columns of columns": Layout(CUBE, ("R", "_S(1)", "S(1)")),
    "2×3×4, rows three times": Layout(CUBE, ("S(0)", "S(0)", "S(0)")),
    "pp2×16×8, rows of rows": Layout(PIPE, ("_S(0)", "S(0)")),
    "pp2×16×8, columns and rows": Layout(PIPE, ("S(0)", "S(1)")),
}
TARGETS = SOURCES | {
    "3×5×2, columns and rows": Layout(OTHER, ("S(1)", "S(0)", "R")),
    "3×5×2, rows and strided rows": Layout(OTHER, ("S(0)", "_S(0)", "R")),
    "1×2×2, whole": Layout(SMALL, ("R", "R", "R")),
}
FAST = (("2×3×4, rows of rows", "pp2×16×8, columns and rows"), ("pp2×16×8, rows of rows", "2×3×4, columns of columns"))


def whole(name: str) -> np.ndarray:
    """No two elements of it are equal, and none is zero."""
    count = prod(SHAPES[name])
    return (np.arange(count, dtype=np.uint32) + 1 + 100_000 * list(SHAPES).index(name)).reshape(SHAPES[name])


@lru_cache(maxsize=len(SOURCES))
def written(source: str) -> Opened:
    """The checkpoint of this source, with all arrays."""
    layout = SOURCES[source]
    meshes = {name: layout.mesh(name) for name in SHAPES}
    states = [
        live(*(held(n, SHAPES[n], rank, mesh, layout.placements) for n, mesh in meshes.items() if rank in mesh.ranks))
        for rank in range(layout.world)
    ]
    store, job, wholes = MemoryStore(f"simulated-{source}"), job_of(states), {name: whole(name) for name in SHAPES}
    draft = job.draft(store, "c")
    job.commit(store, draft, [job.write(store, draft, rank, wholes) for rank in range(layout.world)])
    return open_in(store, "c")


def wanted_by(rank: int, layout: Layout, opened: Opened) -> Iterator[tuple[Wanted, np.ndarray]]:
    """What a rank asks for, and what it must find."""
    for name, shape in SHAPES.items():
        mesh = layout.mesh(name)
        if rank in mesh.ranks:
            place = mesh.coordinate(rank)
            box = physical_box(shape, sizes=mesh.sizes, coordinate=place, placements=layout.placements)
            expected = part_of(whole(name), box)
            yield Wanted(opened.records[identity(name)], box, np.zeros(expected.shape, dtype=np.uint32)), expected


def require_loads(source: str, target: str) -> None:
    opened, layout = written(source), TARGETS[target]
    delivered: dict[str, list[np.ndarray]] = {}
    for rank in range(layout.world):
        pairs = list(wanted_by(rank, layout, opened))
        report = carry_out(opened, plan_fetch(opened, [wanted for wanted, _ in pairs]))
        assert report.wanted_nbytes == sum(expected.nbytes for _, expected in pairs)
        for wanted, expected in pairs:
            name = wanted.record.spec.id.name
            assert np.array_equal(wanted.into, expected), (source, target, rank, name)
            delivered.setdefault(name, []).append(wanted.into.ravel())
    for name in SHAPES:  # together the ranks got all of it
        assert np.array_equal(np.unique(np.concatenate(delivered[name])), whole(name).ravel())


@pytest.mark.parametrize(("source", "target"), FAST)
def test_every_rank_of_a_3d_mesh_loads_its_part_of_what_another_mesh_wrote(source: str, target: str) -> None:
    require_loads(source, target)


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), [pair for pair in product(SOURCES, TARGETS) if pair not in FAST])
def test_every_rank_of_every_3d_mesh_loads_its_part_of_what_every_other_wrote(source: str, target: str) -> None:
    require_loads(source, target)
