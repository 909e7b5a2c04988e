"""The cases of whole checkpoints: what a reader takes, and one fault each that it refuses."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod

from tools.vector_kit.checkpoints import (
    Array,
    Edit,
    Later,
    Parts,
    Piece,
    V,
    W,
    base,
    build,
    documents,
    flip,
    only,
    piece,
    valid,
    vector,
)
from tools.vector_kit.kit import Change, Json, Record, Vector, canonical, changed, column, name_hash


def _add(array: Array, *pieces: tuple[int, Piece], **files: bytes) -> Edit:
    def edit(parts: Parts) -> None:
        parts.arrays.append(array)
        parts.arrays.sort(key=lambda one: one.key)
        for writer, new in pieces:
            parts.pieces[writer].append(new)
            parts.pieces[writer].sort(key=lambda one: one.key)
        parts.files.update(files)

    return edit


def _half(key: str, name: str, dtype: str, data: bytes) -> Edit:
    """An array of two elements in one piece of writer 0."""
    file, n = f"{key}/c.0", len(data)
    array = Array(key, ("params", "model", name, "value"), dtype, [2], [2], [0], data)
    return _add(array, (0, Piece(key, file, [0], [2], 0, n, n, n)), **{file: data})


def _upper(parts: Parts) -> None:
    """A parameter `W` beside `w`: both keys have suffixes."""
    for name in ("w", "W"):
        stem = f"params/model/{name}%~{name_hash(name)}"
        if name == "w":
            _rename(parts, W, f"{stem}/value")
        else:
            _half(f"{stem}/value", "W", "float32", bytes(8))(parts)


def _rename(parts: Parts, old: str, new: str) -> None:
    for array in parts.arrays:
        array.key = array.key.replace(old, new)
    for one in (one for pieces in parts.pieces for one in pieces):
        one.key, one.file = one.key.replace(old, new), one.file.replace(old, new)
    parts.files = {path.replace(old, new): data for path, data in parts.files.items()}
    parts.arrays.sort(key=lambda one: one.key)
    for pieces in parts.pieces:
        pieces.sort(key=lambda one: one.key)


def _pack(parts: Parts) -> None:
    """All pieces of a writer, one after the other, in one file."""
    parts.manifest["placement"] = "packed"
    parts.documents = False
    files = {}
    for writer, pieces in enumerate(parts.pieces):
        path, data = f"packs/{writer:05d}.bin", b""
        for one in pieces:
            stored = one.of(parts.files[one.file])
            one.file, one.offset, one.row_nbytes, one.row_stride = path, len(data), one.nbytes, one.nbytes
            data += stored
        files[path] = data
    parts.files = files


PACK = "packs/3f1c-00001.bin"


def _named(parts: Parts) -> None:
    """The same by the rules of writers: a grid of the ranks' cuts, slots with pads, names of attempt and writer."""
    parts.manifest["placement"], parts.manifest["requires"], parts.documents = "packed", ["packs"], False
    chunks = {V: [4, 2], W: [5, 6]}
    for array in parts.arrays:
        array.chunk = chunks.get(array.key, array.chunk)
    files = {}
    for writer, pieces in enumerate(parts.pieces):
        path, data = f"packs/3f1c-{writer:05d}.bin", b""
        for one in pieces:
            stored = one.of(parts.files[one.file])
            data += bytes(-len(data) % 64)
            one.file, one.offset, one.row_nbytes, one.row_stride = path, len(data), one.nbytes, one.nbytes
            data += stored + (b"\0" if one.key == "extra/t" and one.nbytes == 1 else b"")
        files[path] = data + bytes(-len(data) % 4096)
    parts.files = files


def _references(edit: Edit, *, left_out: str = "", change: Change = lambda record: None) -> Later:
    """The derived file of a checkpoint in which each chunk is one piece, but for the array `left_out`."""
    parts = base()
    edit(parts)
    arrays = [array for array in parts.arrays if array.key != left_out]
    refs: Record = {path: text.decode() for path, text in documents(arrays).items()}
    sizes = {"uint8": 1, "float32": 4, "float64": 8, "int64": 8}
    for array in arrays:
        nbytes = sizes[array.dtype] * prod(array.chunk)
        for one in sorted(
            (one for pieces in parts.pieces for one in pieces if one.key == array.key), key=lambda one: one.start
        ):
            place = (low // extent for low, extent in zip(one.start, array.chunk, strict=True))
            refs[".".join([f"{array.key}/c", *map(str, place)])] = ["{{root}}/" + one.file, one.offset, nbytes]
    record: Record = {"version": 1, "templates": {"root": "."}, "refs": refs}
    return _put("references.json", canonical(changed(record, change)).encode())


def _first_target(number: int, to: Json) -> Change:
    """The change of a member of the target of the first chunk of w."""
    return lambda record: record["refs"][f"{W}/c.0.0"].__setitem__(number, to)


def _vocabulary(parts: Parts) -> None:
    """50,257 rows on TP2 and FSDP4: one chunk, of which every writer has a part."""
    data = bytes(row % 251 for row in range(50257))
    cuts = [0, 6283, 12566, 18849, 25129, 31411, 37693, 43975, 50257]
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of the mesh (fsdp, tp), by writer
    parts.manifest.update(placement="packed", requires=["packs"], world_size=8)
    parts.manifest["meshes"] = [{"name": "world", "axes": ["fsdp", "tp"], "sizes": [4, 2], "ranks": [[0, 7]]}]
    parts.manifest["layouts"] = [{"mesh": 0, "placements": ["_S(0)", "S(0)"]}]
    parts.documents, parts.files, parts.pieces = False, {}, []
    parts.arrays = [Array(W, ("params", "model", "w", "value"), "uint8", [50257], [50257], list(range(8)), data, layout=0)]
    for writer, part in enumerate(order):
        low, high = cuts[part], cuts[part + 1]
        path, nbytes = f"packs/3f1c-{writer:05d}.bin", high - low
        parts.files[path] = data[low:high] + bytes(-nbytes % 4096)
        parts.pieces.append([Piece(W, path, [low], [nbytes], 0, nbytes, nbytes, nbytes)])


def _pack_called(name: str, edit: Edit = _named) -> Edit:
    """The second writer's pack under another name."""

    def change(parts: Parts) -> None:
        edit(parts)
        _renamed(next(path for path in parts.files if path.endswith("00001.bin")), name)(parts)

    return change


def _gap_of_pack(parts: Parts) -> None:
    """A byte between two slots that is not zero."""
    _named(parts)
    data = bytearray(parts.files[PACK])
    data[63] = 1
    parts.files[PACK] = bytes(data)


def _empty(parts: Parts) -> None:
    parts.arrays, parts.pieces, parts.files = [], [[]], {}


def _valid() -> Iterator[Vector]:
    yield valid("two-parts", "An index in two parts.", "UCF-63 UCF-65", lambda parts: setattr(parts, "second", 2))
    yield valid("four-arrays", "Rows, columns, a pad, and no axes.", "FRAG-30 FRAG-32 UCF-41 UCF-10 UCF-17 UCF-18")
    yield valid("packed", "The same, packed.", "FRAG-10", _pack)
    yield valid("packed-references", "The derived file is no stray.", "UCF-6", _pack, _put("references.json", b"{}"))
    yield valid("packed-named", "By the rules of writers.", "FRAG-10 FRAG-61 FRAG-62 FRAG-65 UCF-100", _named)
    yield valid("packed-vocabulary", "A chunk of eight writers.", "FRAG-60 FRAG-66 FRAG-65", _vocabulary)
    yield valid("references", "References to every chunk.", "UCF-161", _named, _references(_named))
    yield valid(
        "references-left-out",
        "A chunk of eight writers has no reference.",
        "UCF-161",
        _vocabulary,
        _references(_vocabulary, left_out=W),
    )
    yield valid("no-arrays", "Values only.", "UCF-17", _empty)
    bf16 = struct.pack("<2H", 0x7FC1, 0x8000)
    yield valid("bfloat16", "A NaN with payload and -0.", "UCF-7", _half("params/model/b/value", "b", "bfloat16", bf16))
    zero = Array("params/model/z/value", ("params", "model", "z", "value"), "float32", [0, 6], [1, 6], [], b"")
    yield valid("zero-size", "An array without elements has no file.", "FRAG-2", _add(zero))
    yield valid("case", "W beside w.", "UCF-34", _upper)


def _put(path: str, data: bytes) -> Later:
    return lambda files: files.update({path: data})


def _drop(path: str) -> Later:
    return lambda files: files.pop(path)


def _overlap(parts: Parts) -> None:
    """Writer 1 begins one row early, with that row's true bytes: only coverage is wrong."""
    one = parts.pieces[1][2]
    one.start, one.shape, one.offset = [4, 0], [6, 6], 96
    one.nbytes = one.row_nbytes = one.row_stride = 144


def _gap(parts: Parts) -> None:
    """Writer 1 leaves out the last element's row."""
    one = parts.pieces[1][2]
    one.shape = [4, 6]
    one.nbytes = one.row_nbytes = one.row_stride = 96


def _spanning(parts: Parts) -> None:
    """One piece over both chunks of extra/t."""
    _pack(parts)
    parts.pieces[0] = [one for one in parts.pieces[0] if one.key != "extra/t"]
    parts.pieces[0].insert(0, Piece("extra/t", "packs/00000.bin", [0], [3], 0, 3, 3, 3))


def _shared(parts: Parts) -> None:
    """In a pack, the piece of w at the bytes of v."""
    _pack(parts)
    one, other = parts.pieces[0][2], parts.pieces[0][3]
    other.offset = one.offset
    parts.files["packs/00000.bin"] = parts.files["packs/00000.bin"][: other.offset + other.nbytes]


def _pack_tail(tail: bytes) -> Edit:
    """Bytes behind the last piece of a pack."""

    def edit(parts: Parts) -> None:
        _pack(parts)
        parts.files["packs/00001.bin"] += tail

    return edit


def _shared_rows(parts: Parts) -> None:
    """In a pack, the columns of v by writer 0 at the bytes of those of writer 1."""
    only(V)(parts)
    parts.manifest["placement"], parts.documents = "packed", False
    path = "packs/00000.bin"
    data = parts.files[V + "/c.0.0"]
    parts.files = {path: b"".join(data[k : k + 16] + bytes(16) for k in range(0, len(data), 32))}
    for (one,) in parts.pieces:
        one.file, one.offset = path, 0


def _moved(old: str, new: str) -> Edit:
    """A file under another path, in all records that name it; it is not in the tree any more."""

    def edit(parts: Parts) -> None:
        parts.based[new] = parts.files.pop(old)
        for one in (one for pieces in parts.pieces for one in pieces if one.file == old):
            one.file = new

    return edit


def _renamed(old: str, new: str) -> Edit:
    """A file under another path, in the tree and in all records that name it."""

    def edit(parts: Parts) -> None:
        parts.files[new] = parts.files.pop(old)
        for one in (one for pieces in parts.pieces for one in pieces if one.file == old):
            one.file = new

    return edit


def _nested(parts: Parts) -> None:
    """An extra at t/u beside the extra at t."""
    data = bytes([1, 2])
    array = Array("extra/t/u", ("extra", "t", "u", ""), "uint8", [2], [2], [0], data)
    file = "extra/t/u/c.0"
    _add(array, (0, Piece("extra/t/u", file, [0], [2], 0, 2, 2, 2)), **{file: data})(parts)


_EDITS: tuple[tuple[str, str, str, str, Edit], ...] = (
    ("gap-one-row", "A row that nobody wrote.", "FRAG-30", "coverage-gap", _gap),
    ("overlap-one-row", "A row that two wrote.", "FRAG-31", "coverage-overlap", _overlap),
    ("gap-array", "An array that nobody wrote.", "FRAG-30", "coverage-gap",
     _add(Array("params/model/u/value", ("params", "model", "u", "value"), "float32", [1], [1], [], b""))),
    ("beyond-shape", "A piece past the array's last row.", "FRAG-18", "malformed", piece(1, 2, start=[6, 0])),
    ("nbytes", "120 bytes for 24 elements.", "FRAG-19", "malformed", piece(0, 3, shape=[4, 6])),
    ("spanning", "A piece over two chunks.", "FRAG-10", "malformed", _spanning),
    ("shared-bytes", "Two pieces on the same bytes.", "FRAG-34", "coverage-overlap", _shared),
    ("other-file", "The first rows of w in a file of their own.", "FRAG-43", "malformed",
     lambda parts: (parts.files.update({W + "/c.1.0": parts.files[W + "/c.0.0"]}),
                    piece(0, 3, file=W + "/c.1.0")(parts))),
    ("chunk-separator", "A chunk in folders, as other trees have it.", "UCF-14", "malformed",
     _renamed(W + "/c.0.0", W + "/c/0/0")),
    ("chunk-zeros", "A chunk's number with a zero before it.", "UCF-14", "malformed", _renamed("extra/t/c.1", "extra/t/c.01")),
    ("chunk-prefix", "A chunk's file without its c.", "UCF-14", "malformed", _renamed(V + "/c.0.0", V + "/0.0")),
    ("chunk-no-axes", "The chunk of an array without axes, numbered.", "UCF-14", "malformed",
     _renamed("params/model/s/value/c", "params/model/s/value/c.0")),
    ("chunk-case", "A capital C.", "UCF-14", "malformed", _renamed("extra/t/c.0", "extra/t/C.0")),
    ("other-offset", "The second rows at the first rows' place, and they at theirs.", "FRAG-44", "malformed",
     lambda parts: (piece(1, 2, offset=0)(parts), piece(0, 3, offset=120)(parts))),
    ("other-stride", "Columns stored one after the other.", "FRAG-44", "malformed",
     lambda parts: (piece(0, 2, row_nbytes=64, row_stride=64)(parts),
                    piece(1, 1, offset=64, row_nbytes=64, row_stride=64)(parts))),
    ("chunk-length", "A recorded length that is no whole chunk.", "FRAG-43", "malformed",
     lambda parts: (parts.files.update({"extra/t/c.1": bytes([9])}))),
    ("checksum", "A checksum that is none of the bytes.", "FRAG-32", "checksum-mismatch", piece(0, 3, checksums=[5])),
    ("pad", "A pad that is not zero.", "UCF-18", "checksum-mismatch",
     lambda parts: parts.files.update({"extra/t/c.1": bytes([9, 1])})),
    ("pack-pad", "A byte of a pack that belongs to no piece and is not zero.", "UCF-18", "checksum-mismatch",
     _pack_tail(b"\1")),
    ("shared-rows", "In a pack, two strided pieces on the same bytes.", "FRAG-34", "coverage-overlap", _shared_rows),
    ("pack-gap", "A byte between slots of a pack that is not zero.", "UCF-18", "checksum-mismatch", _gap_of_pack),
    ("pack-other-attempt", "A pack of another attempt.", "FRAG-64", "malformed", _pack_called("packs/3f1b-00001.bin")),
    ("pack-other-attempt-unnamed", "The same where no feature names packs.", "FRAG-64", "malformed",
     _pack_called("packs/3f1b-00001.bin", _pack)),
    ("pack-other-writer", "A pack that carries another writer's number.", "FRAG-65", "malformed",
     _pack_called("packs/3f1c-00002.bin")),
    ("pack-other-name", "A pack of no such name.", "FRAG-65", "malformed", _pack_called("packs/00001.bin")),
    ("piece-traversal", "A piece outside the tree.", "UCF-38", "unsafe", _moved(W + "/c.0.0", "../" + W + "/c.0.0")),
    ("piece-absolute", "A piece anywhere.", "UCF-38", "unsafe", _moved(W + "/c.0.0", "/" + W + "/c.0.0")),
    ("array-in-array", "An array where another one has a group.", "UCF-36", "structure-conflict", _nested),
)  # fmt: skip


def _map_member(writer: int, name: str, value: object) -> Edit:
    return lambda parts: parts.maps[writer].update({name: value})


_RECORDS: tuple[tuple[str, str, str, str, Edit], ...] = (
    ("writer-number", "Writer 1's map says 0.", "FRAG-21", "malformed", _map_member(1, "writer", 0)),
    ("maps-swapped", "Two maps in each other's place.", "FRAG-21", "malformed", lambda p: p.maps.reverse()),
    ("other-attempt", "A map of an older attempt.", "FRAG-21", "malformed", _map_member(1, "attempt", "3f1b")),
    ("array-unknown", "A map with an array that is not in the index.", "FRAG-25", "malformed",
     lambda p: p.maps[1]["arrays"].__setitem__(2, "params/model/x/value")),
    ("writers-missing", "The index leaves a writer out.", "FRAG-26", "malformed",
     lambda p: p.index["writer_sets"].__setitem__(3, [[0, 0]])),
    ("writers-extra", "The index lists a writer without pieces.", "FRAG-26", "malformed",
     lambda p: p.index["writer_sets"].__setitem__(0, [[0, 1]])),
    ("key-other", "A name that its key is not made of.", "UCF-35", "malformed",
     lambda p: p.index["entries"]["name"].__setitem__(2, "u")),
    ("key-plain", "A name that needs escapes, with its key unescaped.", "UCF-35 UCF-31", "malformed",
     lambda p: p.index["entries"]["name"].__setitem__(2, "v%")),
    ("index-first", "The manifest's first key is another.", "UCF-63", "malformed",
     lambda p: p.manifest["index"][0].update(first="extra/s")),
    ("index-last", "The manifest's last key is another.", "UCF-63", "malformed",
     lambda p: p.manifest["index"][0].update(last="params/model/x/value")),
    ("layout-beyond", "A layout that is not in the manifest.", "UCF-62", "malformed",
     lambda p: p.index["templates"][3].update(layout=1)),
    ("version-later", "A version of the future.", "UCF-72", "unsupported", lambda p: p.manifest.update(version=2)),
    ("requires-unknown", "A feature of the future.", "UCF-73", "unsupported",
     lambda p: p.manifest.update(requires=["holograms"])),
    ("fragments-version", "A fragment map of a later version.", "UCF-72", "unsupported", _map_member(0, "version", 2)),
    ("index-version", "An index of a later version.", "UCF-72", "unsupported", lambda p: p.index.update(version=2)),
    ("element-type", "An element type that nobody knows.", "UCF-20", "unsupported",
     lambda p: p.index["templates"][3].update(data_type="float128")),
    ("codec", "Compressed chunks.", "UCF-66", "unsupported",
     lambda p: p.index["templates"][3].update(codecs='[{"name":"zstd","configuration":{"level":1}}]')),
    ("fragments-traversal", "A fragment file outside the tree.", "UCF-38", "unsafe",
     lambda p: p.manifest["fragments"][1].update(path="../fragments/00001.msgpack")),
    ("key-traversal", "A key that leads out of the tree.", "UCF-38", "unsafe",
     lambda p: p.index["entries"]["key"].__setitem__(3, "params/model/..")),
    ("base-beyond", "A base that is not in the manifest.", "FRAG-23", "malformed",
     lambda p: p.maps[0]["files"].update(base=column([0, 0, 0, 1]))),
    ("ndim", "A map with one axis for an array with two.", "FRAG-25", "malformed",
     lambda p: (p.maps[1].update(ndims=column([0, 2, 1])),
                p.maps[1]["pieces"].update(start=column([0, 2, 30]), shape=column([4, 2, 30])))),
)  # fmt: skip


def _swap(one: str, other: str) -> Later:
    return lambda files: files.update({one: files[other], other: files[one]})


def _nothing_but(path: str, data: bytes) -> Later:
    def later(files: dict[str, bytes]) -> None:
        files.clear()
        files[path] = data

    return later


def _replace(path: str, old: bytes, new: bytes) -> Later:
    return lambda files: files.update({path: files[path].replace(old, new, 1)})


_FRAGMENTS = "fragments/00001.msgpack"
_TOKEN = canonical(
    {"format": "elastickpt-draft", "version": 1, "attempt": "3f1c", "host": "a.1", "pid": 7, "start": 9}
).encode()
_LATER: tuple[tuple[str, str, str, str, Later], ...] = (
    ("no-manifest", "A tree without its manifest.", "UCF-9", "uncommitted", _drop("checkpoint.json")),
    ("no-checkpoint", "A folder of something else.", "UCF-1", "not-a-checkpoint",
     _nothing_but("notes.txt", b"x")),
    ("empty-folder", "A folder with an empty one.", "UCF-1", "not-a-checkpoint",
     _nothing_but("notes/", b"")),
    ("token", "A draft's token.", "SAVE-23", "uncommitted", _put("draft.json", _TOKEN)),
    ("draft", "A draft before its manifest.", "SAVE-23", "uncommitted",
     lambda files: (files.pop("checkpoint.json"), files.update({"draft.json": _TOKEN}))),
    ("manifest-short", "The manifest's last byte is gone.", "UCF-71", "malformed",
     lambda files: files.update({"checkpoint.json": files["checkpoint.json"][:-1]})),
    ("manifest-empty", "An empty manifest.", "UCF-71", "malformed", _put("checkpoint.json", b"")),
    ("index-short", "The index's last byte is gone.", "UCF-4", "wrong-length",
     lambda files: files.update({"index.msgpack": files["index.msgpack"][:-1]})),
    ("fragments-swapped", "Two fragment files in each other's place.", "UCF-4", "wrong-length",
     _swap("fragments/00000.msgpack", _FRAGMENTS)),
    ("document-flip", "One bit of a document.", "UCF-10", "document-mismatch", flip(W + "/zarr.json", 60)),
    ("group-flip", "One bit of a group's document.", "UCF-10", "document-mismatch", flip("params/zarr.json", 60)),
    ("group-missing", "A group's document is gone.", "UCF-8", "missing-file", _drop("params/model/w/zarr.json")),
    ("root-missing", "The root's document is gone.", "UCF-8", "missing-file", _drop("zarr.json")),
    ("root-flip", "One bit of the root's document.", "UCF-10", "document-mismatch", flip("zarr.json", 200)),
    ("document-swapped", "Two documents in each other's place.", "UCF-12", "document-mismatch",
     _swap(W + "/zarr.json", V + "/zarr.json")),
    ("document-codecs", "Big-endian elements.", "UCF-13", "document-mismatch",
     _replace(W + "/zarr.json", b'"little"', b'"big"')),
    ("document-axes", "Another name for an axis.", "UCF-15", "document-mismatch",
     _replace(W + "/zarr.json", b'"n10"', b'"n6"')),
    ("chunk-empty", "A chunk without a byte.", "UCF-4", "wrong-length", _put(W + "/c.0.0", b"")),
    ("chunk-flip-no-axes", "One bit of an array without axes.", "FRAG-32", "checksum-mismatch",
     flip("params/model/s/value/c", 7)),
    ("pad-flip", "One bit of a pad.", "UCF-18", "checksum-mismatch", flip("extra/t/c.1", 1)),
    ("stray-folder", "An empty folder that nobody names.", "UCF-2", "stray-file", _put("params/model/u/", b"")),
    ("stray-place", "A reserved name that only recovery writes.", "UCF-6", "stray-file", _put("places/00000.bin", b"x")),
    ("stray-references", "Pack references where there is no pack.", "UCF-6", "stray-file", _put("references.json", b"{}")),
    ("manifest-flip", "One bit of the manifest.", "UCF-74", "checksum-mismatch", flip("checkpoint.json", 40)),
    ("index-flip", "One bit of the index.", "UCF-5", "checksum-mismatch", flip("index.msgpack", 30)),
    ("fragments-flip", "One bit of a fragment file.", "UCF-5", "checksum-mismatch", flip(_FRAGMENTS, 30)),
    ("chunk-flip", "One bit of a chunk.", "FRAG-32", "checksum-mismatch", flip(W + "/c.0.0", 239)),
    ("chunk-flip-strided", "One bit of a strided piece.", "FRAG-32", "checksum-mismatch", flip(V + "/c.0.0", 20)),
    ("fragments-missing", "A fragment file is gone.", "UCF-3", "missing-file", _drop(_FRAGMENTS)),
    ("index-missing", "The index is gone.", "UCF-3", "missing-file", _drop("index.msgpack")),
    ("chunk-missing", "A chunk is gone.", "UCF-3", "missing-file", _drop(W + "/c.0.0")),
    ("chunk-short", "A chunk's last byte is gone.", "UCF-4", "wrong-length",
     lambda files: files.update({W + "/c.0.0": files[W + "/c.0.0"][:-1]})),
    ("chunk-long", "A byte behind a chunk.", "UCF-4", "wrong-length",
     lambda files: files.update({W + "/c.0.0": files[W + "/c.0.0"] + b"\0"})),
    ("fragments-long", "A byte behind a fragment file.", "UCF-4", "wrong-length",
     lambda files: files.update({_FRAGMENTS: files[_FRAGMENTS] + b"\0"})),
    ("document-missing", "A document is gone.", "UCF-8", "missing-file", _drop(W + "/zarr.json")),
    ("document-other", "Another fill value.", "UCF-21", "document-mismatch",
     lambda files: files.update({W + "/zarr.json": files[W + "/zarr.json"].replace(b'"NaN"', b"0.0")})),
    ("document-space", "A space in a document.", "UCF-11", "document-mismatch",
     lambda files: files.update({W + "/zarr.json": files[W + "/zarr.json"].replace(b":3,", b": 3,")})),
    ("document-newline", "A line feed behind one.", "UCF-11", "document-mismatch",
     lambda files: files.update({W + "/zarr.json": files[W + "/zarr.json"] + b"\n"})),
    ("group-other", "A group's other name.", "UCF-16", "document-mismatch",
     lambda files: files.update({"params/model/w/zarr.json": files["params/model/v/zarr.json"]})),
    ("root-unconsolidated", "A root without its metadata.", "UCF-17", "document-mismatch",
     _put("zarr.json", b'{"zarr_format":3,"node_type":"group","attributes":{}}')),
    ("stray", "A file that nobody names.", "UCF-2", "stray-file", _put("params/model/w/value/c.1.0", b"x")),
    ("stray-top", "The same at the top.", "UCF-2", "stray-file", _put("notes.txt", b"x")),
    ("stray-reserved", "A reserved name in placement plain.", "UCF-6", "stray-file", _put("packs/00000.bin", b"x")),
    ("stray-writer", "A third writer's fragment file.", "UCF-2", "stray-file", _put("fragments/00002.msgpack", b"x")),
)  # fmt: skip


_REFERENCES: tuple[tuple[str, str, str, str, Change], ...] = (
    ("references-offset", "A reference to other bytes.", "UCF-161", "document-mismatch", _first_target(1, 64)),
    ("references-length", "A reference to fewer bytes.", "UCF-161", "document-mismatch", _first_target(2, 64)),
    ("references-pack", "A reference into another pack.", "UCF-161", "document-mismatch", _first_target(0, "{{root}}/" + PACK)),
    ("references-missing", "A chunk without one.", "UCF-161", "document-mismatch",
     lambda record: record["refs"].pop(f"{V}/c.0.0")),
    ("references-document", "Another document.", "UCF-161", "document-mismatch",
     lambda record: record["refs"].update({"zarr.json": "{}"})),
    ("references-absolute", "A reference to a file anywhere.", "UCF-163", "unsafe", _first_target(0, "/etc/passwd")),
    ("references-url", "One to another host.", "UCF-163", "unsafe", _first_target(0, "http://example.org/x")),
    ("references-outside", "One out of the folder.", "UCF-163", "unsafe", _first_target(0, "{{root}}/../other/" + PACK)),
    ("references-template", "A template that leads elsewhere.", "UCF-161", "document-mismatch",
     lambda record: record["templates"].update(root="/etc")),
)  # fmt: skip


_PACKED_LATER: tuple[tuple[str, str, str, str, Later], ...] = (
    ("pack-missing", "A pack is gone.", "UCF-3", "missing-file", _drop(PACK)),
    ("pack-short", "A pack's last byte is gone.", "UCF-4", "wrong-length",
     lambda files: files.update({PACK: files[PACK][:-1]})),
    ("pack-long", "A byte behind a pack.", "UCF-4", "wrong-length", lambda files: files.update({PACK: files[PACK] + b"\0"})),
    ("pack-swapped", "Two packs in each other's place.", "FRAG-32", "checksum-mismatch",
     _swap("packs/3f1c-00000.bin", PACK)),
    ("pack-pad-flip", "One bit of an edge chunk's pad.", "UCF-18", "checksum-mismatch", flip("packs/3f1c-00000.bin", 65)),
    ("packs-no-manifest", "Packs without their manifest.", "UCF-160", "uncommitted", _drop("checkpoint.json")),
)  # fmt: skip


def vectors() -> Iterator[Vector]:
    yield from _valid()
    for name, about, rule, kind, change in _REFERENCES:
        files = build(_named, later=_references(_named, change=change))
        yield vector("invalid", name, about, rule, files, error=kind)
    for name, about, rule, kind, later in _PACKED_LATER:
        yield vector("invalid", name, about, rule, build(_named, later=later), error=kind)
    for name, about, rule, kind, edit in _EDITS:
        yield vector("invalid", name, about, rule, build(edit), error=kind)
    for name, about, rule, kind, edit in _RECORDS:
        yield vector("invalid", name, about, rule, build(records=edit), error=kind)
    for name, about, rule, kind, later in _LATER:
        yield vector("invalid", name, about, rule, build(later=later), error=kind)
    files = build(_pack, later=_put("zarr.json", b'{"zarr_format":3,"node_type":"group","attributes":{}}'))
    yield vector("invalid", "packed-document", "A document in a pack.", "UCF-19", files, error="stray-file")
    files = build(_pack, later=_put("packs/00002.bin", b"x"))
    yield vector("invalid", "packed-stray", "A pack that nobody names.", "UCF-6", files, error="stray-file")
    files = build(_pack, later=flip("packs/00000.bin", 3))
    yield vector("invalid", "packed-flip", "One bit of a pack.", "FRAG-32", files, error="checksum-mismatch")
    swapped = build()
    swapped["extra/t/c.0"], swapped["extra/t/c.1"] = swapped["extra/t/c.1"], swapped["extra/t/c.0"]
    yield vector(
        "invalid", "chunks-swapped", "Two chunks in each other's place.", "FRAG-32", swapped, error="checksum-mismatch"
    )
