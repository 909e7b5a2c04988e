"""Vectors of placement packed: chunk grids, who of several replicas stores a box, and where slots lie in a pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from tools.vector_kit.kit import Json, Vector

MIB = 2**20


def _grids() -> Iterator[Vector]:
    """(name, what it shows, shape, element size, mesh sizes, placements, replicas of a parameter, chunk shape)"""
    cases: tuple[tuple[str, str, list[int], int, list[int], list[str], int, list[int]], ...] = (
        ("whole", "A small array is one chunk.", [10, 6], 4, [], [], 1, [10, 6]),
        ("rows", "The first axis is cut where ranks cut it.", [10, 6], 4, [4], ["S(0)"], 1, [3, 6]),
        ("columns", "As is the second one.", [10, 8], 4, [2], ["S(1)"], 1, [10, 4]),
        ("both", "Rows and columns.", [10, 8], 4, [2, 2], ["S(0)", "S(1)"], 1, [5, 4]),
        ("nested-even", "TP and FSDP on one axis, evenly.", [16, 3], 4, [2, 2], ["_S(0)", "S(0)"], 1, [4, 3]),
        ("nested-uneven", "50,257 rows on TP2 and FSDP4: the plain grid.",
         [50257, 8], 4, [4, 2], ["_S(0)", "S(0)"], 1, [50257, 8]),
        ("uneven-columns", "Rows irregular, columns regular: the plain grid cuts those.",
         [9, 8], 4, [2, 4, 2], ["S(0)", "S(0)", "S(1)"], 1, [9, 4]),
        ("two-parts", "300 MB of one writer: two parts of 150, not 256 and 44.", [300, 250_000], 4, [], [], 1, [150, 250_000]),
        ("three-parts", "Rows that three parts do not divide: less than one row a part is pad.",
         [601, 250_000], 4, [], [], 1, [201, 250_000]),
        ("few-rows", "Three rows of 100 MB: three parts without a pad.", [3, 25_000_000], 4, [], [], 1, [1, 25_000_000]),
        ("pads", "75 rows: two parts would be padded by more than a hundredth.", [75, 1_000_000], 4, [], [],
         1, [25, 1_000_000]),
        ("cut-large", "A rank's 512 MiB: two equal parts.", [1024, MIB // 4], 4, [2], ["S(0)"], 1, [256, MIB // 4]),
        ("cut-in-three", "A rank's 771 rows of 1 MiB: not four parts, the next number that divides them is 257.",
         [1542, MIB // 4], 4, [2], ["S(0)"], 1, [193, MIB // 4]),
        ("cut-prime", "A rank's 521 rows, a prime: parts over the rank's end.", [1042, MIB // 4], 4, [2], ["S(0)"], 1,
         [174, MIB // 4]),
        ("step-large", "A row of 512 MiB: one row, half of it.", [3, 128 * MIB], 4, [], [], 1, [1, 64 * MIB]),
        ("replicas-small", "64 MiB of two replicas stay whole.", [64, MIB // 4], 4, [2], ["R"], 2, [64, MIB // 4]),
        ("replicas-large", "65 MiB of two replicas are cut at 33 rows.", [65, MIB // 4], 4, [2], ["R"], 2, [33, MIB // 4]),
        ("replicas-of-cuts", "Two replicas of two shards of 100 MiB.", [200, MIB // 4], 4, [2, 2], ["R", "S(0)"], 2,
         [50, MIB // 4]),
        ("replicas-uneven", "101 rows a shard, two replicas: the layout's cut, as 51 does not divide it.",
         [202, MIB // 4], 4, [2, 2], ["R", "S(0)"], 2, [101, MIB // 4]),
        ("replicas-one-row", "A shard of one row: replicas share its columns.", [2, 32 * MIB], 4, [2, 2], ["R", "S(0)"], 2,
         [1, 16 * MIB]),
        ("no-axes", "No axes.", [], 8, [], [], 1, []),
        ("zero", "An extent of zero has a chunk extent of 1.", [0, 6], 4, [2], ["S(0)"], 1, [1, 6]),
        ("chunks-too-many", "2^25 chunks with the cuts: the plain grid without.", [2**25, 4], 1, [2**25], ["S(0)"], 1,
         [2**25, 4]),
    )  # fmt: skip
    for name, about, shape, itemsize, sizes, placements, replicas, chunk in cases:
        rule = "FRAG-60 SAVE-117" if replicas > 1 else "FRAG-60"
        inputs: Json = {"rule": "grid", "shape": shape, "itemsize": itemsize, "sizes": sizes, "placements": placements,
                        "replicas": replicas}  # fmt: skip
        yield Vector("packs", f"grid-{name}", about, tuple(rule.split()), inputs, expect={"chunk_shape": chunk})


def _slots_by_definition(box: Json, shape: Sequence[int], chunk: Sequence[int], itemsize: int) -> Json:
    """Cell by cell: each slot with its bytes, and of each cell its byte in its slot."""
    start, stop = box
    cells: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for cell in product(*(range(low, high) for low, high in zip(start, stop, strict=True))):
        cells.setdefault(tuple(at // step for at, step in zip(cell, chunk, strict=True)), []).append(cell)
    found = []
    for place, mine in sorted(cells.items()):
        bounds = [range(k * step, min((k + 1) * step, extent)) for k, step, extent in zip(place, chunk, shape, strict=True)]
        whole = len(mine) == len(list(product(*bounds)))
        places = {}
        for number, cell in enumerate(mine):
            at = 0
            for low, k, step in zip(cell, place, chunk, strict=True):
                at = at * step + low - k * step
            places[",".join(map(str, cell))] = (at if whole else number) * itemsize
        nbytes = itemsize
        for step in chunk if whole else ():
            nbytes *= step
        found.append({"chunk": list(place), "nbytes": nbytes if whole else len(mine) * itemsize, "cells": places})
    return found


def _slots() -> Iterator[Vector]:
    cases: tuple[tuple[str, str, Json, list[int], list[int]], ...] = (
        ("whole", "A chunk.", [[0, 0], [3, 4]], [6, 4], [3, 4]),
        ("edge-rows", "The last rows of an array: a chunk with a pad behind.", [[3, 0], [5, 4]], [5, 4], [3, 4]),
        ("edge-columns", "The last columns: rows with pads between.", [[0, 4], [3, 6]], [3, 6], [3, 4]),
        ("edge-both", "A corner.", [[3, 4], [5, 6]], [5, 6], [3, 4]),
        ("edge-planes", "Two axes padded inside: one piece a plane.", [[0, 0, 0], [2, 3, 3]], [2, 3, 3], [2, 4, 4]),
        ("part", "Two of a chunk's three rows: by themselves.", [[0, 0], [2, 4]], [6, 4], [3, 4]),
        ("part-columns", "Columns of a chunk that another writer has, too: one row.", [[0, 0], [3, 2]], [3, 4], [3, 4]),
        ("several", "A part, a chunk, an edge that is whole.", [[1, 0], [7, 2]], [7, 2], [3, 2]),
        ("no-axes", "One element.", [[], []], [], []),
    )  # fmt: skip
    for name, about, box, shape, chunk in cases:
        inputs = {"rule": "slots", "box": box, "shape": shape, "chunk_shape": chunk, "itemsize": 2}
        expect = {"slots": _slots_by_definition(box, shape, chunk, 2)}
        yield Vector("packs", f"slots-{name}", about, ("FRAG-61", "FRAG-66"), inputs, expect=expect)


def _places() -> Iterator[Vector]:
    cases: tuple[tuple[str, str, list[int], list[int], int], ...] = (
        ("none", "No slot, no byte.", [], [], 0),
        ("small", "Small ones at multiples of 64.", [1, 64, 65, 2], [0, 64, 128, 256], 4096),
        ("large", "From 1 MiB on at multiples of 4,096.", [8, MIB, MIB - 1, 8, MIB + 1],
         [0, 4096, 4096 + MIB, 4096 + 2 * MIB, 8192 + 2 * MIB], 12288 + 3 * MIB),
        ("exact", "Nothing between.", [4096, MIB, 64], [0, 4096, 4096 + MIB], 8192 + MIB),
    )  # fmt: skip
    for name, about, sizes, offsets, nbytes in cases:
        inputs = {"rule": "place", "sizes": sizes}
        yield Vector("packs", f"place-{name}", about, ("FRAG-62",), inputs, expect={"offsets": offsets, "nbytes": nbytes})


def _replicas() -> Iterator[Vector]:
    """Boxes as [key, rows, bytes of a row, whose]: rows by replica, in the order of boxes."""
    small, large = ["b", 4, 5], ["w", 100, MIB]
    cases: tuple[tuple[str, str, int, list[list[Json]], Json], ...] = (
        ("equal", "Two equal boxes: one each.", 2, [[*small], ["a", 4, 5]], [[[0, 0], [0, 4]], [[0, 4], [0, 0]]]),
        ("by-bytes", "The largest first, each to who has least.", 2, [["a", 3, 1], ["b", 5, 1], ["c", 4, 1]],
         [[[0, 0], [0, 5], [0, 0]], [[0, 3], [0, 0], [0, 4]]]),
        ("first", "What is the first one's counts before.", 2, [["a", 3, 1], ["buffer", 5, 1, "first"]],
         [[[0, 0], [0, 5]], [[0, 3], [0, 0]]]),
        ("large", "100 MiB at multiples of 34 rows; the rest goes where least is.", 3, [[*large], ["a", 1, 1]],
         [[[0, 34], [0, 0]], [[34, 68], [0, 0]], [[68, 100], [0, 1]]]),
        ("few-rows", "Two rows of 40 MiB, four replicas.", 4, [["w", 2, 40 * MIB]], [[[0, 1]], [[1, 2]], [[0, 0]], [[0, 0]]]),
        ("alone", "One rank has all.", 1, [[*small], [*large]], [[[0, 4], [0, 100]]]),
    )  # fmt: skip
    for name, about, count, boxes, rows in cases:
        inputs: Json = {"rule": "replicas", "replicas": count, "boxes": boxes}
        yield Vector("packs", f"replicas-{name}", about, ("SAVE-116", "SAVE-117"), inputs, expect={"rows": rows})


def vectors() -> Iterator[Vector]:
    yield from _grids()
    yield from _slots()
    yield from _places()
    yield from _replicas()
