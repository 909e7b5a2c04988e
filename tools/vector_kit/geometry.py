"""Vectors of boxes, splits, grids, keys and documents: integers and names in, integers and names out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product

from tools.vector_kit.kit import Json, Vector, name_hash

Interval = tuple[int, int]


def _box(*axes: Interval) -> Json:
    return [[low for low, _ in axes], [high for _, high in axes]]


_INTERSECTIONS: tuple[tuple[str, str, Json, Json, Json], ...] = (
    (
        "corner",
        "Two boxes share a corner of one element.",
        _box((0, 3), (0, 3)),
        _box((2, 5), (2, 5)),
        _box((2, 3), (2, 3)),
    ),
    ("inside", "One box in the other.", _box((0, 9)), _box((3, 4)), _box((3, 4))),
    ("touching", "Half-open boxes that touch share nothing.", _box((0, 3)), _box((3, 5)), None),
    ("apart-on-one-axis", "Apart on one axis is apart.", _box((0, 3), (0, 3)), _box((0, 3), (4, 5)), None),
    ("empty", "An empty box shares nothing.", _box((0, 3)), _box((1, 1)), None),
    ("no-axes", "Boxes without axes are one element.", _box(), _box(), _box()),
)


def boxes() -> Iterator[Vector]:
    for name, about, one, other, both in _INTERSECTIONS:
        inputs = {"operation": "intersect", "boxes": [one, other]}
        yield Vector("boxes", name, about, ("FRAG-2", "FRAG-3"), inputs, expect={"box": both})
    for name, about, box in (
        ("stop-before-start", "A box that ends before it begins.", [[3], [2]]),
        ("start-negative", "A box before the array.", [[-1], [2]]),
        ("axes-differ", "One start, two stops.", [[0], [2, 2]]),
    ):
        yield Vector("boxes", name, about, ("FRAG-1",), {"operation": "make", "boxes": [box]}, error="malformed")


def _torch_chunk(extent: int, ways: int) -> list[Interval]:
    """By its definition, element by element."""
    size = (extent + ways - 1) // ways
    owners = [k // size for k in range(extent)]
    return [_where(owners, way, extent) for way in range(ways)]


def _where(owners: Sequence[int], way: int, extent: int) -> Interval:
    mine = [k for k, owner in enumerate(owners) if owner == way]
    return (mine[0], mine[-1] + 1) if mine else (extent, extent)


def _balanced(extent: int, ways: int) -> list[Interval]:
    found, low = [], 0
    for way in range(ways):
        high = low + extent // ways + (way < extent % ways)
        found.append((low, high))
        low = high
    return found


def _partitions() -> Iterator[tuple[str, str, str, Json, Json]]:
    for extent, ways in ((10, 4), (101, 2), (5, 4), (3, 4), (0, 2), (1, 3), (8, 4), (9, 8)):
        inputs = {"rule": "torch_chunk", "extent": extent, "ways": ways}
        yield (
            f"torch-chunk-{extent}-{ways}",
            f"torch.chunk of {extent} in {ways}.",
            "FRAG-51",
            inputs,
            _torch_chunk(extent, ways),
        )
    for extent, ways in ((10, 4), (3, 4), (50257, 8)):
        inputs = {"rule": "balanced", "extent": extent, "ways": ways}
        yield f"balanced-{extent}-{ways}", f"Balanced: {extent} in {ways}.", "FRAG-53", inputs, _balanced(extent, ways)
    yield "even-8-4", "Evenly.", "FRAG-50", {"rule": "even", "extent": 8, "ways": 4}, [(0, 2), (2, 4), (4, 6), (6, 8)]
    inputs = {"rule": "explicit", "extent": 10, "sizes": [7, 0, 3]}
    yield "explicit-7-0-3", "Given sizes, one of them 0.", "FRAG-52", inputs, [(0, 7), (7, 7), (7, 10)]


def _physical(shape: Sequence[int], sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[str]) -> Json:
    """What torch does: chunk lists of indices, plain splits first, and take what is left."""
    left = [list(range(extent)) for extent in shape]
    for prefix in ("S", "_S"):
        for size, index, placement in zip(sizes, coordinate, placements, strict=True):
            if placement.startswith(f"{prefix}("):
                dim = int(placement[len(prefix) + 1 : -1])
                low, high = _torch_chunk(len(left[dim]), size)[index]
                stop = left[dim][-1] + 1 if left[dim] else None
                left[dim] = left[dim][low:high]
                if not left[dim] and stop is not None:
                    return None
    return [[axis[0] for axis in left], [axis[-1] + 1 for axis in left]] if all(left) else None


_PLACED: tuple[tuple[str, str, Sequence[int], Sequence[int], Sequence[str]], ...] = (
    ("vocabulary-tp2-fsdp4", "GPT-2's vocabulary, FSDP2 over TP.", (50257, 8), (4, 2), ("_S(0)", "S(0)")),
    ("uneven-10-fsdp4", "10 rows on four.", (10, 3), (4,), ("S(0)",)),
    ("uneven-101-tp2", "101 columns on two.", (4, 101), (2,), ("S(1)",)),
    ("two-axes-one-dim", "Two plain splits of one dimension, left to right.", (11,), (2, 3), ("S(0)", "S(0)")),
    ("three-axes", "A 3-D mesh: replicas, rows, columns.", (7, 9), (2, 2, 3), ("R", "S(0)", "S(1)")),
)  # fmt: skip


def partitions() -> Iterator[Vector]:
    for name, about, rule, inputs, intervals in _partitions():
        yield Vector("partitions", name, about, tuple(rule.split()), inputs, expect={"intervals": intervals})
    inputs = {"rule": "even", "extent": 10, "ways": 4}
    yield Vector("partitions", "even-remainder", "10 in 4 leaves 2.", ("FRAG-50",), inputs, error="layout-unsupported")
    for name, sizes in (("explicit-sum", [7, 2]), ("explicit-negative", [11, -1])):
        inputs = {"rule": "explicit", "extent": 10, "sizes": sizes}
        yield Vector("partitions", name, "Sizes that are no split.", ("FRAG-52",), inputs, error="layout-unsupported")
    for name, about, shape, sizes_, placements in _PLACED:
        ranks = {
            ",".join(map(str, place)): _physical(shape, sizes_, place, placements) for place in product(*map(range, sizes_))
        }
        inputs = {"rule": "placement", "shape": shape, "sizes": sizes_, "placements": placements}
        yield Vector("partitions", name, about, ("FRAG-55",), inputs, expect={"boxes": ranks})
    for shape, start, stop in (((4, 6), 3, 20), ((4, 6), 7, 9), ((2, 3, 4), 1, 23), ((5,), 0, 5), ((3, 3), 4, 4)):
        inputs = {"rule": "flat", "shape": shape, "start": start, "stop": stop}
        name = f"flat-{'x'.join(map(str, shape))}-{start}-{stop}"
        elements = [list(index) for k, index in enumerate(product(*map(range, shape))) if start <= k < stop]
        about = f"Elements {start} to {stop} of {shape} in C order; at most {max(2 * len(shape) - 1, 1)} boxes."
        yield Vector("partitions", name, about, ("FRAG-54",), inputs, expect={"elements": elements})


def grids() -> Iterator[Vector]:
    mib = 2**20
    cases: tuple[tuple[str, str, list[int], int, list[int], list[int]], ...] = (
        ("whole", "A small array is one chunk.", [10, 6], 4, [0, 0], [10, 6]),
        ("rows", "300 MiB in rows of 1 MiB: 256 rows.", [300, 262144], 4, [0, 0], [256, 262144]),
        ("exactly", "Exactly 256 MiB is one chunk.", [256, 262144], 4, [0, 0], [256, 262144]),
        ("second-axis", "A row of 512 MiB: one row, half of it.", [3, 128 * mib], 4, [0, 0], [1, 64 * mib]),
        ("one-axis", "A vector of 1 GiB.", [256 * mib], 4, [0], [64 * mib]),
        ("cut-columns", "The layout cuts columns in two.", [10, 8], 4, [0, 4], [10, 4]),
        ("cut-rows", "A cut of the first axis is not used.", [10, 8], 4, [5, 0], [10, 8]),
        ("cut-both", "Rows by size, columns by layout.", [3000, 262144], 4, [5, 131072], [512, 131072]),
        ("cut-larger", "A cut beyond the extent.", [10, 8], 4, [0, 16], [10, 8]),
        ("no-axes", "No axes.", [], 8, [], []),
        ("zero", "An extent of zero has a chunk extent of 1.", [0, 6], 4, [0, 0], [1, 6]),
        ("cuts-too-many", "2^25 chunks with the cuts: without them.", [4, 2**25], 1, [0, 1], [4, 2**25]),
    )  # fmt: skip
    for name, about, shape, itemsize, cuts, chunk in cases:
        inputs = {"shape": shape, "itemsize": itemsize, "cuts": cuts}
        yield Vector("grids", name, about, ("FRAG-40",), inputs, expect={"chunk_shape": chunk})


def keys() -> Iterator[Vector]:
    long, wide = "x" * 300, "a" * 178 + "é" * 20
    cases: tuple[tuple[str, str, str, dict[str, str]], ...] = (
        ("plain", "Names of modules stay.", "UCF-31", {"layers.0.attn_q-proj.weight": "layers.0.attn_q-proj.weight"}),
        (
            "escaped",
            "Other bytes are escaped.",
            "UCF-31",
            {"a/b c%": "a%2Fb%20c%25", "é": "%C3%A9", "🐢": "%F0%9F%90%A2"},
        ),
        ("empty", "The empty name.", "UCF-31", {"": "%"}),
        ("dots", "Names of dots only.", "UCF-32", {".": "%2E", "..": "%2E.", "...": "%2E..", ".a": ".a"}),
        ("underscores", "Names that zarr reserves.", "UCF-32", {"__a": "%5F_a", "_a": "_a"}),
        ("document", "Names of documents.", "UCF-32", {"zarr.json": "%7Aarr.json", "Zarr.JSON ": "Zarr.JSON%20"}),
        ("document-case", "The same in other case.", "UCF-32", {"ZARR.json": "%5AARR.json"}),
        ("long", "300 characters.", "UCF-33", {long: f"{'x' * 180}%~{name_hash(long)}"}),
        ("long-200", "200 bytes are not too long.", "UCF-33", {"x" * 200: "x" * 200}),
        ("long-cut", "The cut never splits an escape.", "UCF-33", {wide: f"{'a' * 178}%~{name_hash(wide)}"}),
        ("case", "W beside w.", "UCF-34", {name: f"{name}%~{name_hash(name)}" for name in ("W", "w")} | {"v": "v"}),
        ("case-beyond-ascii", "É and é differ anyway.", "UCF-34", {"É": "%C3%89", "é": "%C3%A9"}),
    )
    for name, about, rule, found in cases:
        yield Vector("keys", name, about, tuple(rule.split()), {"names": sorted(found)}, expect={"keys": found})
    for name, about, rule, bad, kind in (
        ("control", "A line feed.", "UCF-30", "a\nb", "unsafe"),
        ("delete", "U+007F.", "UCF-30", "a\x7f", "unsafe"),
        ("long-1025", "1,025 bytes.", "UCF-97", "a" * 1025, "limit-exceeded"),
        ("long-utf8", "513 characters, 1,026 bytes.", "UCF-97", "é" * 513, "limit-exceeded"),
    ):
        yield Vector("keys", name, about, tuple(rule.split()), {"names": [bad]}, error=kind)
    arrays = [
        (["params", "model", "a/b", "value"], "params/model/a%2Fb/value"),
        (["params", "model", "a/b", "exp_avg"], "params/model/a%2Fb/exp_avg"),
        (["extra", "loader", "perm/0~1x", ""], "extra/loader/perm/0%2Fx"),
        (["extra", "t", "", ""], "extra/t"),
    ]
    inputs: Json = {"arrays": [array for array, _ in arrays]}
    expect = {"paths": [path for _, path in arrays]}
    yield Vector("keys", "tree", "Paths of arrays.", ("UCF-35",), inputs, expect=expect)
    inputs = {"arrays": [["extra", "t", "", ""], ["extra", "t", "x", ""]]}
    yield Vector("keys", "tree-above", "An array above an array.", ("UCF-36",), inputs, error="structure-conflict")
    inputs = {"chunks": [["params/m/w/value", [0, 1]], ["params/m/s/value", []], ["extra/v", [12]]]}
    files = {"files": ["params/m/w/value/c.0.1", "params/m/s/value/c", "extra/v/c.12"]}
    yield Vector("keys", "chunks", "Files of chunks.", ("UCF-14",), inputs, expect=files)
    inputs = {"records": [["fragments", 0], ["fragments", 123456], ["index", 0], ["index", 1]]}
    files = {"files": ["fragments/00000.msgpack", "fragments/123456.msgpack", "index.msgpack", "index-00001.msgpack"]}
    yield Vector("keys", "records", "Files of records.", ("UCF-37",), inputs, expect=files)


def array_document(array: Sequence[str], shape: Sequence[int], dtype: str, chunk: Sequence[int], fill: Json, own: Json) -> str:
    """A document of the specification, written out member by member."""
    section, item, name, state = array
    del section
    one_byte = dtype in ("bool", "int8", "uint8") or dtype.startswith("float8")
    codec: Json = {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}}
    seen: list[int] = []
    names = []
    for extent in shape:
        seen.append(extent)
        names.append(f"n{extent}" + (f"_{seen.count(extent)}" if seen.count(extent) > 1 else ""))
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": [codec],
        "attributes": {"elastickpt": {"item": item, "name": name, "state": state, **own}},
        "dimension_names": names,
    }
    return json.dumps(document, separators=(",", ":"))


def documents() -> Iterator[Vector]:
    cases: tuple[tuple[str, str, tuple[str, ...], list[int], str, Json, Json], ...] = (
        ("float32", "A parameter's value.", ("UCF-12", "UCF-21"), [10, 6], "float32", "NaN", {}),
        ("same-sizes", "Names of equal axes.", ("UCF-15",), [8, 4, 8, 8], "int64", -(2**63), {}),
        ("uint64", "The maximum.", ("UCF-21",), [2], "uint64", 2**64 - 1, {}),
        ("bool", "Without byte order.", ("UCF-13", "UCF-21"), [2], "bool", True, {}),
        ("complex64", "Two parts.", ("UCF-21",), [2], "complex64", ["NaN", "NaN"], {}),
        ("bfloat16", "An extension type.", ("UCF-20",), [2], "bfloat16", "NaN", {}),
        ("float8", "Ours.", ("UCF-22",), [2], "float8_e4m3fn", "NaN", {}),
        ("no-axes", "No axes.", ("UCF-12",), [], "float64", "NaN", {}),
        ("stored-as", "Four bits, as bytes.", ("UCF-23",), [3, 1], "uint8", 255, {"stored_as": "float4_e2m1fn_x2"}),
        ("unicode", "A name beyond ASCII.", ("UCF-11",), [1], "int8", -128, {}),
    )  # fmt: skip
    for name, about, rules, shape, dtype, fill, own in cases:
        array = ["params", "model", "é" if name == "unicode" else "w", "value"]
        chunk = [max(extent, 1) for extent in shape]
        inputs = {"array": array, "shape": shape, "dtype": dtype, "chunk_shape": chunk, "attributes": own}
        text = array_document(array, shape, dtype, chunk, fill, own)
        yield Vector("documents", name, about, rules, inputs, expect={"text": text})
    for name, names, own in (
        ("group-section", ["params"], {"section": "params"}),
        ("group-item", ["params", "model"], {"section": "params", "item": "model"}),
        ("group-name", ["params", "model", "a/b"], {"section": "params", "item": "model", "name": "a/b"}),
        ("group-extra", ["extra", "l", "a/b", "0"], {"section": "extra", "item": "l", "name": "a~1b/0"}),
    ):
        document = {"zarr_format": 3, "node_type": "group", "attributes": {"elastickpt": own}}
        text = json.dumps(document, separators=(",", ":"))
        yield Vector("documents", name, "A group's document.", ("UCF-16",), {"group": names}, expect={"text": text})
