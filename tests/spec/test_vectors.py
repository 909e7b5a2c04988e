"""Every vector of the specification, against the library and against the mini reader."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import elastickpt as ek
from elastickpt.errors import CheckpointError, Malformed
from elastickpt.format.agreement import check_fragments, check_index, check_keys, check_writers
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_index import decode_index
from elastickpt.format.decode_values import decode_value
from elastickpt.format.documents import array_document, documents, group_document
from elastickpt.format.encode_fragments import decode_columns, decode_fragments, encode_fragments
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.encode_values import encode_value
from elastickpt.format.keys import array_keys, child_keys, chunk_file, fragments_file, index_file
from elastickpt.format.records import ArrayRecord
from elastickpt.layout.algebra import intersect
from elastickpt.layout.grid import chunk_shape
from elastickpt.layout.packs import Cutting, Shared, place_slots, share_out, slots_of
from elastickpt.layout.placement import balanced, even, explicit, flat_boxes, physical_box, torch_chunk
from elastickpt.loading.fetch import fetch
from elastickpt.loading.opened import open_records
from elastickpt.loading.targets import Wanted
from tools import mini_reader

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "spec" / "vectors"

Json = Any


def vectors(suite: str) -> list[Any]:
    paths = sorted((FOLDER / suite).glob("*.json"))
    assert paths, f"no vectors in {suite}"
    return [pytest.param(json.loads(path.read_text()), id=path.stem) for path in paths]


def suite(name: str) -> Callable[..., Any]:
    return pytest.mark.parametrize("vector", vectors(name))


def holds(vector: Json, outcome: Callable[[Json], Json]) -> None:
    """The outcome is the expected one, or an error of the expected kind."""
    if "error" in vector:
        with pytest.raises((CheckpointError, mini_reader.Refusal)) as caught:
            outcome(vector["input"])
        assert caught.value.kind == vector["error"], str(caught.value)
    else:
        assert outcome(vector["input"]) == vector["expect"]


def _bytes(inputs: Json) -> bytes:
    return inputs["text"].encode() if "text" in inputs else base64.b64decode(inputs["base64"])


def library_manifest(inputs: Json) -> Json:
    manifest = decode_manifest(_bytes(inputs), path="checkpoint.json")
    assert encode_manifest(manifest) == _bytes(inputs)
    kept = ("attempt", "step", "time", "world_size", "placement", "values")
    return {
        **{name: getattr(manifest, name) for name in kept},
        "requires": list(manifest.requires),
        "items": [item.name for item in manifest.items],
        "ranks": [list(mesh.ranks) for mesh in manifest.meshes],
        "fragments": [file.path for file in manifest.fragments],
    }


def mini_manifest(inputs: Json) -> Json:
    manifest = mini_reader.read_manifest(_bytes(inputs))
    kept = ("attempt", "step", "time", "world_size", "placement", "requires", "values")
    return {
        **{name: manifest[name] for name in kept},
        "items": [item["name"] for item in manifest["items"]],
        "ranks": [mesh["ranks"] for mesh in manifest["meshes"]],
        "fragments": [file["path"] for file in manifest["fragments"]],
    }


@pytest.mark.parametrize("reader", [library_manifest, mini_manifest])
@pytest.mark.parametrize("vector", [*vectors("manifests/valid"), *vectors("manifests/invalid")])
def test_manifests(vector: Json, reader: Callable[[Json], Json]) -> None:
    holds(vector, reader)


def library_fragments(inputs: Json) -> Json:
    data = _bytes(inputs)
    fragments = decode_fragments(data, path="fragments/00000.msgpack")
    assert encode_fragments(fragments) == data
    assert encode_fragments(decode_columns(data, path="fragments/00000.msgpack")) == data
    return {
        "writer": fragments.writer,
        "pieces": [
            {
                "array": piece.array,
                "start": list(piece.box.start),
                "shape": list(piece.box.shape),
                "file": fragments.files[piece.file].path,
                "offset": piece.offset,
                "nbytes": piece.nbytes,
                "row_nbytes": piece.row_nbytes,
                "row_stride": piece.row_stride,
            }
            for piece in fragments.pieces
        ],
        "checksums": [one.to_bytes(8, "little").hex() for piece in fragments.pieces for one in piece.checksums],
    }


def mini_fragments(inputs: Json) -> Json:
    fragments = mini_reader.read_fragments(_bytes(inputs))
    sums = [one.to_bytes(8, "little").hex() for piece in fragments["pieces"] for one in piece.pop("checksums")]
    pieces = [{**piece, "file": piece["file"][1]} for piece in fragments["pieces"]]
    return {"writer": fragments["writer"], "pieces": pieces, "checksums": sums}


@pytest.mark.parametrize("reader", [library_fragments, mini_fragments])
@pytest.mark.parametrize("vector", [*vectors("fragment-maps/valid"), *vectors("fragment-maps/invalid")])
def test_fragment_maps(vector: Json, reader: Callable[[Json], Json]) -> None:
    holds(vector, reader)


def library_index(inputs: Json) -> Json:
    part = decode_index(_bytes(inputs), path="index.msgpack")
    assert decode_index(encode_index(part), path="index.msgpack") == part
    return {
        "arrays": [
            {
                "key": record.key,
                "name": record.spec.id.name,
                "state": record.spec.id.state,
                "dtype": record.spec.dtype,
                "shape": list(record.spec.shape),
                "chunk_shape": list(record.chunk_shape),
                "writers": list(record.writers),
            }
            for record in part.arrays
        ]
    }


def mini_index(inputs: Json) -> Json:
    kept = ("key", "name", "state", "dtype", "shape", "chunk_shape", "writers")
    arrays = mini_reader.read_index(_bytes(inputs))
    return {"arrays": [{name: array[name] for name in kept} for array in arrays]}


@pytest.mark.parametrize("reader", [library_index, mini_index])
@pytest.mark.parametrize("vector", [*vectors("indexes/valid"), *vectors("indexes/invalid")])
def test_indexes(vector: Json, reader: Callable[[Json], Json]) -> None:
    holds(vector, reader)


def library_value(inputs: Json) -> Json:
    value = decode_value(parse(inputs["text"], where="value"), where="value")
    assert dump(encode_value(value, where="")) == inputs["text"]
    return {"type": type(value).__name__}


MINI_TYPES = {
    "tensor": "ArrayReference",
    "numpy": "ArrayReference",
    "state": "StateReference",
    "dtype": "DtypeValue",
    "device": "DeviceValue",
    "enum": "EnumValue",
    "namedtuple": "NamedTupleValue",
}


def mini_value(inputs: Json) -> Json:
    value = mini_reader.read_value(inputs["text"])
    if isinstance(value, np.ndarray):
        return {"type": "ArrayValue"}
    if isinstance(value, tuple) and value and value[0] in MINI_TYPES:
        return {"type": MINI_TYPES[value[0]]}
    return {"type": type(value).__name__}


@pytest.mark.parametrize("reader", [library_value, mini_value])
@pytest.mark.parametrize("vector", [*vectors("values/valid"), *vectors("values/invalid")])
def test_values(vector: Json, reader: Callable[[Json], Json]) -> None:
    holds(vector, reader)


@suite("boxes")
def test_boxes(vector: Json) -> None:
    def outcome(inputs: Json) -> Json:
        boxes = [Box(tuple(start), tuple(stop)) for start, stop in inputs["boxes"]]
        if inputs["operation"] == "make":
            return {}
        both = intersect(*boxes)
        return {"box": both and [list(both.start), list(both.stop)]}

    holds(vector, outcome)


def _partition(inputs: Json) -> Json:
    if inputs["rule"] == "placement":
        return {"boxes": {",".join(map(str, place)): _placed(inputs, place) for place in _coordinates(inputs)}}
    if inputs["rule"] == "flat":
        shape = inputs["shape"]
        boxes = flat_boxes(Box.whole(shape), inputs["start"], inputs["stop"])
        assert len(boxes) <= 2 * len(shape) - 1
        return {"elements": [list(index) for box in boxes for index in _indices(box)]}
    if inputs["rule"] == "explicit":
        return {"intervals": [list(one) for one in explicit(inputs["extent"], inputs["sizes"])]}
    rules = {"torch_chunk": torch_chunk, "balanced": balanced, "even": even}
    return {"intervals": [list(one) for one in rules[inputs["rule"]](inputs["extent"], inputs["ways"])]}


def _coordinates(inputs: Json) -> Any:
    return product(*map(range, inputs["sizes"]))


def _indices(box: Box) -> Any:
    return product(*(range(low, high) for low, high in zip(box.start, box.stop, strict=True)))


def _placed(inputs: Json, place: tuple[int, ...]) -> Json:
    box = physical_box(inputs["shape"], sizes=inputs["sizes"], coordinate=place, placements=inputs["placements"])
    return [list(box.start), list(box.stop)] if box.count else None


@suite("partitions")
def test_partitions(vector: Json) -> None:
    holds(vector, _partition)


@suite("grids")
def test_grids(vector: Json) -> None:
    def outcome(inputs: Json) -> Json:
        return {"chunk_shape": list(chunk_shape(inputs["shape"], itemsize=inputs["itemsize"], cuts=inputs["cuts"]))}

    holds(vector, outcome)


@suite("packs")
def test_packs(vector: Json) -> None:
    holds(vector, lambda inputs: _PACKS[inputs["rule"]](inputs))


def _packed_grid(inputs: Json) -> Json:
    shape, sizes = inputs["shape"], inputs["sizes"]
    cutting = Cutting.of(shape, inputs["itemsize"], sizes or None, tuple(inputs["placements"]), Box.whole(shape))
    return {"chunk_shape": list(cutting.chunk_shape(replicas=inputs["replicas"]))}


def _slots(inputs: Json) -> Json:
    box, itemsize = Box(*map(tuple, inputs["box"])), inputs["itemsize"]
    found = []
    for slot in slots_of(box, shape=inputs["shape"], chunk_shape=inputs["chunk_shape"], itemsize=itemsize):
        cells = {}
        for run in slot.runs:
            rows = range(run.offset, run.offset + run.nbytes // run.row_nbytes * run.row_stride, run.row_stride)
            places = (place for row in rows for place in range(row, row + run.row_nbytes, itemsize))
            cells |= {",".join(map(str, cell)): place for cell, place in zip(_indices(run.box), places, strict=True)}
        found.append({"chunk": list(slot.runs[0].chunk), "nbytes": slot.nbytes, "cells": cells})
    return {"slots": found}


def _placed_slots(inputs: Json) -> Json:
    offsets, nbytes = place_slots(inputs["sizes"])
    return {"offsets": list(offsets), "nbytes": nbytes}


def _replicas(inputs: Json) -> Json:
    count, shared = inputs["replicas"], []
    for key, rows, nbytes, *whose in inputs["boxes"]:
        box = Box.whole((rows, nbytes))
        division = Cutting(box.shape, 1, box.shape, (0, 0), True).division(count)
        shared.append(Shared(key, box, 1, division, by_first=bool(whose)))
    shares = [share_out(shared, count, index) for index in range(count)]
    return {"rows": [[[box.start[0], box.stop[0]] if box else [0, 0] for box in share] for share in shares]}


_PACKS = {"grid": _packed_grid, "slots": _slots, "place": _placed_slots, "replicas": _replicas}


@suite("keys")
def test_keys(vector: Json) -> None:
    def outcome(inputs: Json) -> Json:
        if "names" in inputs:
            return {"keys": child_keys(inputs["names"])}
        if "arrays" in inputs:
            ids = [ArrayId(*array) for array in inputs["arrays"]]
            keys = array_keys(ids)
            return {"paths": [keys[array] for array in ids]}
        if "chunks" in inputs:
            return {"files": [chunk_file(key, tuple(chunk)) for key, chunk in inputs["chunks"]]}
        rules = {"fragments": fragments_file, "index": index_file}
        return {"files": [rules[kind](number) for kind, number in inputs["records"]]}

    holds(vector, outcome)


@pytest.mark.parametrize("vector", [one for one in vectors("keys") if "names" in one.values[0]["input"]])
def test_keys_of_the_mini_reader(vector: Json) -> None:
    holds(vector, lambda inputs: {"keys": mini_reader.child_keys(inputs["names"])})


@suite("documents")
def test_documents(vector: Json) -> None:
    def outcome(inputs: Json) -> Json:
        if "group" in inputs:
            return {"text": group_document(tuple(inputs["group"])).decode()}
        array = ArrayId(*inputs["array"])
        spec = ArraySpec(array, tuple(inputs["shape"]), inputs["dtype"])
        own = tuple(inputs["attributes"].items())
        record = ArrayRecord(spec, array_keys([array])[array], tuple(inputs["chunk_shape"]), None, (), own)
        return {"text": array_document(record).decode()}

    holds(vector, outcome)


@pytest.mark.parametrize("vector", [*vectors("checkpoints/valid"), *vectors("checkpoints/invalid")])
def test_checkpoints_by_the_mini_reader(vector: Json) -> None:
    def outcome(inputs: Json) -> Json:
        beside = {name: _decoded(files) for name, files in inputs.get("beside", {}).items()}
        arrays = mini_reader.read_files(_decoded(inputs["files"]), beside)
        found = {
            key: {"dtype": str(array.dtype), "shape": list(array.shape), "hex": array.tobytes().hex()}
            for key, array in arrays.items()
        }
        return {"arrays": found}

    holds(vector, outcome)


def _records_agree(files: dict[str, bytes]) -> None:
    """What the library checks of the records of a checkpoint before it looks at any chunk."""
    manifest = decode_manifest(files["checkpoint.json"], path="checkpoint.json")
    parts = [decode_index(files[entry.file.path], path=entry.file.path) for entry in manifest.index]
    records = check_index(parts, manifest)
    check_keys(records)
    maps = [decode_columns(files[file.path], path=file.path) for file in manifest.fragments]
    for writer, columns in enumerate(maps):
        check_fragments(columns, records, manifest=manifest, writer=writer)
    check_writers(records, [columns.pieces.arrays for columns in maps])


def _decoded(files: Json) -> dict[str, bytes]:
    return {path: base64.b64decode(data) for path, data in files.items()}


def _files(vector: Json) -> dict[str, bytes]:
    return _decoded(vector["input"]["files"])


@suite("checkpoints/valid")
def test_records_of_valid_checkpoints_agree(vector: Json) -> None:
    _records_agree(_files(vector))


_MALFORMED = [one for one in vectors("checkpoints/invalid") if one.values[0].get("error") == "malformed"]


@pytest.mark.parametrize("vector", _MALFORMED)
def test_records_that_disagree_are_refused(vector: Json) -> None:
    with pytest.raises(Malformed):
        _records_agree(_files(vector))


@suite("checkpoints/valid")
def test_documents_of_valid_checkpoints_are_those_of_the_index(vector: Json) -> None:
    """[UCF-10]"""
    files = _files(vector)
    manifest = decode_manifest(files["checkpoint.json"], path="checkpoint.json")
    parts = [decode_index(files[entry.file.path], path=entry.file.path) for entry in manifest.index]
    found = {path: data for path, data in files.items() if path.endswith("zarr.json")}
    assert found == (dict(documents(parts)) if manifest.placement == "plain" else {})


def _laid_out(folder: Path, vector: Json) -> Path:
    """The checkpoint of a vector, with what stands beside it, below `folder`."""
    trees = {"checkpoint": _files(vector)}
    trees |= {name: _decoded(files) for name, files in vector["input"].get("beside", {}).items()}
    for name, files in trees.items():
        for path, data in files.items():
            place = folder / name / path
            if path.endswith("/"):
                place.mkdir(parents=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    return folder / "checkpoint"


def _unpacked(folder: Path, name: str) -> tuple[Path, Json]:
    vector = json.loads((FOLDER / "checkpoints/valid" / f"{name}.json").read_text())
    return _laid_out(folder, vector), vector["expect"]["arrays"]


@pytest.mark.parametrize("name", ["four-arrays", "case", "zero-size"])
def test_zarr_python_reads_the_checkpoints(tmp_path: Path, name: str) -> None:
    folder, wanted = _unpacked(tmp_path, name)
    group = zarr.open_group(str(folder), mode="r", zarr_format=3)
    assert {key: np.asarray(group[key][...]).tobytes().hex() for key in wanted} == {
        key: array["hex"] for key, array in wanted.items()
    }


def _parts(shape: tuple[int, ...]) -> list[Box]:
    """The whole, and every cut of it across its first axis; of a long one some."""
    whole = Box.whole(shape)
    if not shape:
        return [whole]
    step = max(shape[0] // 7, 1)
    cuts = [(low, high) for high in range(1, shape[0] + 1, step) for low in range(0, high, step)]
    return [whole, *(Box((low, *whole.start[1:]), (high, *whole.stop[1:])) for low, high in cuts)]


@pytest.mark.parametrize("vector", vectors("checkpoints/valid"))
def test_valid_checkpoints_are_sound_and_hold_what_they_say(tmp_path: Path, vector: Json) -> None:
    path = _laid_out(tmp_path, vector)
    checkpoint = ek.open(path)
    assert checkpoint.verify().problems == ()
    wanted = vector["expect"]["arrays"]
    assert [record.key for record in checkpoint.records.values()] == sorted(wanted)
    opened = open_records(path)
    for identity, record in checkpoint.records.items():
        data = bytes.fromhex(wanted[record.key]["hex"])
        array = checkpoint.read(identity)
        assert (str(array.dtype), list(array.shape)) == (wanted[record.key]["dtype"], wanted[record.key]["shape"])
        assert array.tobytes() == data
        words = array.view(f"u{array.dtype.itemsize}")
        for box in _parts(array.shape):
            into = np.zeros(box.shape, words.dtype)
            fetch(opened, [Wanted(record, box, into)])
            part = words[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))]
            assert into.tobytes() == part.tobytes()
            assert checkpoint.read(identity, box=box).tobytes() == part.tobytes()


# Strays, documents, pads and keys: nobody needs them to read an array. FRAG-34: the bytes have their checksums.
DOCUMENTS = {f"UCF-{k}" for k in range(10, 20)} - {"UCF-14"}  # which says where chunks lie
BY_VERIFY_ONLY = {"UCF-2", "UCF-6", "UCF-8", *DOCUMENTS, "UCF-21", "UCF-35", "UCF-36", "FRAG-34", "UCF-161", "UCF-163"}


@pytest.mark.parametrize("vector", vectors("checkpoints/invalid"))
def test_invalid_checkpoints_are_refused_with_their_kind(tmp_path: Path, vector: Json) -> None:
    """One fault, one kind: by `open` or by `verify`; and no way to read ends in anything but an error of ours."""
    path = _laid_out(tmp_path, vector)
    checkpoint, kinds = _found_by_verify(path)
    assert kinds == {vector["error"]}
    if checkpoint is None:
        return
    assert _all_can_be_read(checkpoint) == (vector["requires"][0] in BY_VERIFY_ONLY)


def _found_by_verify(path: Path) -> tuple[ek.Checkpoint | None, set[str]]:
    """The checkpoint, if it can be opened, and the kinds of what is wrong with it."""
    checkpoint = None
    try:
        checkpoint = ek.open(path)
        return checkpoint, {problem.kind for problem in checkpoint.verify().problems}
    except CheckpointError as error:
        return checkpoint, {error.kind}


def _all_can_be_read(checkpoint: ek.Checkpoint) -> bool:
    try:
        records = checkpoint.records
    except CheckpointError:
        return False
    whole = True
    for identity in records:
        try:
            checkpoint.read(identity)
        except CheckpointError:
            whole = False
    return whole


def test_the_mini_reader_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, wanted = _unpacked(tmp_path, "four-arrays")
    assert set(mini_reader.read(folder)) == set(wanted)
    assert mini_reader.main([str(folder)]) == 0
    assert "params/model/v/value  int64  [4, 4]" in capsys.readouterr().out
    (folder / "stray").touch()
    assert mini_reader.main([str(folder)]) == 3
    (folder / "stray").unlink()
    (folder / "stray").symlink_to("zarr.json")
    assert mini_reader.main([str(folder)]) == 5


def test_every_folder_of_vectors_is_run() -> None:
    """A new suite without a runner fails here; `checkfree` runs in tests/elastic."""
    known = {"boxes", "partitions", "grids", "packs", "keys", "documents"}
    known |= {
        f"{s}/{k}"
        for s in ("manifests", "fragment-maps", "indexes", "values", "checkpoints", "checkfree")
        for k in ("valid", "invalid")
    }
    assert {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json")} - {"."} == known
