"""Reads a checkpoint from the specification alone: numpy, msgpack, xxhash, ml_dtypes and the standard library.

`python -m tools.mini_reader PATH` lists the arrays, `--dump NAME` prints one. It shares no code with the library, so
that two readers agreeing says that spec/ is complete. Clear before fast: it holds every file in memory.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import msgpack
import numpy as np
import xxhash

Json = Any
Files = Mapping[str, bytes]

CORE: dict[str, tuple[Any, Json]] = {
    "bool": (np.bool_, True),
    **{f"int{bits}": (np.dtype(f"<i{bits // 8}"), -(2 ** (bits - 1))) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (np.dtype(f"<u{bits // 8}"), 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (np.dtype(f"<f{bits // 8}"), "NaN") for bits in (16, 32, 64)},
    **{f"complex{bits}": (np.dtype(f"<c{bits // 8}"), ["NaN", "NaN"]) for bits in (64, 128)},
}
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TYPES: dict[str, tuple[Any, Json]] = {
    **CORE,
    **{name: (getattr(ml_dtypes, name), "NaN") for name in ("bfloat16", *FLOAT8)},
}
MIB = 2**20


class Refusal(Exception):
    """A checkpoint that breaks the specification, with the kind of error that it states."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def refuse(kind: str, message: str) -> NoReturn:
    raise Refusal(kind, message)


def check(holds: bool, message: str, kind: str = "malformed") -> None:
    if not holds:
        refuse(kind, message)


def is_int(value: Json, low: int = 0, high: int = 2**63 - 1) -> bool:
    return type(value) is int and low <= value <= high


def is_text(value: Json) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def members(record: Json, names: str, where: str) -> list[Json]:
    """UCF-44: exactly these members; their values in this order."""
    check(isinstance(record, dict), f"{where} is no object")
    wanted = names.split()
    check(set(record) == set(wanted), f"{where} has members {sorted(map(str, record))}, expected {sorted(wanted)}")
    return [record[name] for name in wanted]


def checked_list(value: Json, where: str, test: Any = lambda one: True) -> list[Json]:
    check(isinstance(value, list) and all(test(one) for one in value), f"{where} is no list of what it should hold")
    return list(value)


# --- JSON, msgpack, names (UCF-30 to UCF-47)


def parse_json(data: bytes | str) -> Json:
    def once(pairs: list[tuple[str, Json]]) -> Json:
        check(len(dict(pairs)) == len(pairs), "a member stands twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        refuse("malformed", f"{name} is no JSON")

    try:
        text = data if isinstance(data, str) else data.decode()
        check(sum(map(text.count, ",[{")) <= 2**22, "too many values", "limit-exceeded")
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        refuse("limit-exceeded", "JSON too deep")
    except ValueError as problem:
        refuse("malformed", str(problem))


def parse_msgpack(data: bytes, limit: int) -> Json:
    check(len(data) <= limit, "record too large", "limit-exceeded")
    left = 2**22

    def spend(items: Any) -> Any:
        nonlocal left
        left -= len(items) + 1
        check(left >= 0, "too many values", "limit-exceeded")
        return items

    def once(pairs: Iterable[tuple[Json, Json]]) -> Json:
        listed = spend(list(pairs))
        check(len(dict(listed)) == len(listed), "a member stands twice")
        return dict(listed)

    def extension(code: int, data: bytes) -> NoReturn:
        refuse("malformed", f"extension type {code}")

    try:
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=extension, list_hook=spend, object_pairs_hook=once)
    except msgpack.StackError:
        refuse("limit-exceeded", "msgpack too deep")
    except (ValueError, msgpack.UnpackException) as problem:
        refuse("malformed", f"{type(problem).__name__} {problem}")


def column(data: Json, rows: int | None, low: int = 0, high: int = 2**63 - 1, unsigned: str = "q") -> list[int]:
    check(isinstance(data, bytes) and len(data) % 8 == 0, "no column")
    values = list(struct.unpack(f"<{len(data) // 8}{unsigned}", data))
    check(rows is None or len(values) == rows, f"a column of {len(values)} entries, expected {rows}")
    check(all(low <= value <= high for value in values), f"a column with entries beyond [{low}, {high}]")
    return values


def checked_name(name: Json) -> str:
    check(is_text(name), "a name is no text")
    check(len(name.encode()) <= 1024, "name too long", "limit-exceeded")
    check(not re.search("[\x00-\x1f\x7f]", name), f"control character in {name!r}", "unsafe")
    return str(name)


def checked_path(path: Json) -> str:
    check(is_text(path), "a path is no text")
    check(len(path) <= 4096, "path too long", "limit-exceeded")
    parts = path.split("/")
    good = re.fullmatch(r"[\x20-\x5b\x5d-\x7e]+", path) and not {"", ".", ".."} & set(parts) and ":" not in parts[0]
    check(bool(good), f"path {path!r}", "unsafe")
    check(max(map(len, parts)) <= 255, "path component too long", "limit-exceeded")
    return str(path)


def child_keys(names: Iterable[str]) -> dict[str, str]:
    """UCF-31 to UCF-34."""
    keys = {}
    for name in names:
        data = checked_name(name).encode()
        parts = [chr(byte) if re.match(rb"[A-Za-z0-9._-]", bytes([byte])) else f"%{byte:02X}" for byte in data]
        if re.fullmatch(r"\.+|__.*|zarr\.json", name, re.IGNORECASE):
            parts[0] = f"%{data[0]:02X}"
        keys[name] = parts or ["%"]
    lower = Counter("".join(parts).lower() for parts in keys.values())
    found = {}
    for name, parts in keys.items():
        key = "".join(parts)
        if len(key) > 200 or lower[key.lower()] > 1:
            while len("".join(parts)) > 180:
                parts = parts[:-1]
            key = "".join(parts) + "%~" + str(xxhash.xxh3_64_hexdigest(name.encode()))
        found[name] = key
    return found


def check_keys(arrays: list[Json]) -> None:
    """UCF-35: every key is made from the names beside it."""
    below: dict[tuple[str, ...], set[str]] = {}
    places = []
    for array in arrays:
        tokens = [array["name"], array["state"]]
        if array["section"] == "extra":
            tokens = [one.replace("~1", "/").replace("~0", "~") for one in array["name"].split("/") if array["name"]]
        place = (array["section"], array["item"], *tokens)
        places.append(place)
        for depth in range(1, len(place)):
            below.setdefault(place[:depth], set()).add(place[depth])
    keys = {parent: child_keys(names) for parent, names in below.items()}
    for array, place in zip(arrays, places, strict=True):
        check(place not in below, f"{place} is an array and a group", "structure-conflict")
        wanted = [place[0], *(keys[place[:depth]][place[depth]] for depth in range(1, len(place)))]
        check(array["key"] == "/".join(wanted), f"key {array['key']}, expected {wanted}")


def digest_of(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def expand(runs: Json, budget: list[int]) -> list[int]:
    found: list[int] = []
    for run in checked_list(runs, "runs", lambda one: isinstance(one, list) and len(one) == 2):
        low, high = run
        check(is_int(low) and is_int(high, low), f"run {run}")
        check(high < 2**20, "rank beyond 2^20", "limit-exceeded")
        budget[0] -= high - low + 1
        check(budget[0] >= 0, "runs stand for too many integers", "limit-exceeded")
        check(not found or found[-1] + 1 != low, "a run continues the one before")
        found.extend(range(low, high + 1))
    return found


# --- values (UCF-50 to UCF-58)


def read_value(text: str) -> Json:
    return value_of(parse_json(text), 0)


def value_of(typed: Json, depth: int) -> Json:
    if isinstance(typed, float):
        check(isfinite(typed), "a number beyond binary64")
    elif type(typed) is int:
        check(abs(typed) <= 2**53, "an integer beyond 2^53")
    elif isinstance(typed, str):
        check(is_text(typed), "a lone surrogate")
    elif isinstance(typed, list):
        check(depth < 16, "too deep", "limit-exceeded")
        return [value_of(one, depth + 1) for one in typed]
    elif isinstance(typed, dict):
        tags = [name for name in typed if name.startswith("$")]
        if tags:
            check(len(typed) == 1, f"{tags[0]} beside other members")
            return tagged(tags[0], typed[tags[0]], depth)
        check(depth < 16, "too deep", "limit-exceeded")
        check(all(map(is_text, typed)), "a key with a lone surrogate")
        return {name: value_of(one, depth + 1) for name, one in typed.items()}
    return typed


def tagged(tag: str, body: Json, depth: int) -> Json:
    if tag == "$tuple":
        return tuple(value_of(checked_list(body, tag), depth))
    if tag in ("$map", "$odict", "$counter"):
        return mapping(tag, body, depth)
    if tag in ("$set", "$frozenset"):
        return elements(tag, body, depth)
    if tag == "$bytes":
        return from_base64(body)
    if tag == "$float":
        check(body in ("nan", "inf", "-inf"), "$float")
        return float(body)
    if tag == "$int":
        check(is_text(body), "$int is no text")
        check(len(body) <= 4097, "$int too long", "limit-exceeded")
        check(bool(re.fullmatch("-?[1-9][0-9]*", body)) and abs(int(body)) > 2**53, f"$int {body}")
        return int(body)
    if tag == "$complex":
        parts = [value_of(one, depth) for one in checked_list(body, tag)]
        check(len(parts) == 2 and all(isinstance(part, float) for part in parts), "$complex")
        return complex(*parts)
    if tag == "$array":
        return small_array(body)
    if tag in ("$tensor", "$numpy"):
        item, name = members(body, "item name", tag)
        check(is_text(item) and is_text(name), tag)
        return (tag[1:], item, name)
    if tag in PYTHON_TAGS:
        return PYTHON_TAGS[tag](body, depth)
    refuse("unsupported", f"value tag {tag}")


# --- tags of features (UCF-100 to UCF-106)


def is_name(value: Json) -> bool:
    return is_text(value) and value != ""


def one_name(tag: str) -> Any:
    def read(body: Json, depth: int) -> Json:
        check(is_name(body), f"{tag} is no name")
        return (tag, body)

    return read


def two_names(body: Json, depth: int) -> Json:
    kind, name = members(body, "type name", "$enum")
    check(is_name(kind) and is_name(name), "$enum")
    return ("enum", kind, name)


def state_name(body: Json, depth: int) -> Json:
    name, origin = members(body, "name origin", "$state")
    check(is_name(name) and origin in ("torch", "numpy"), "$state")
    return ("state", name)


def strided(body: Json, depth: int) -> Json:
    order = body.get("order") if isinstance(body, dict) else None
    order = checked_list(order, "order", is_int)
    found = small_array({name: one for name, one in body.items() if name != "order"})
    check(sorted(order) == list(range(found.ndim)) != order, "order")
    return found


def bounded(body: Json, depth: int) -> Json:
    maxlen, items = members(body, "maxlen items", "$deque")
    found = value_of(checked_list(items, "$deque"), depth)
    check(maxlen is None or (is_int(maxlen) and maxlen >= len(found)), "maxlen")
    return deque(found, maxlen)


def with_factory(body: Json, depth: int) -> Json:
    factory, pairs = members(body, "factory pairs", "$defaultdict")
    check(factory is None or factory in FACTORIES.split(), "factory")
    return defaultdict(lambda: factory, mapping("$odict", pairs, depth))


def named_tuple(body: Json, depth: int) -> Json:
    kind, fields = members(body, "type fields", "$namedtuple")
    check(depth < 16, "too deep", "limit-exceeded")
    checked_list(fields, "fields", lambda one: isinstance(one, list) and len(one) == 2 and is_name(one[0]))
    check(is_name(kind) and len({name for name, _ in fields}) == len(fields), "$namedtuple")
    return ("namedtuple", kind, *((name, value_of(one, depth + 1)) for name, one in fields))


FEATURES = {"python-types", "arrays-in-values", "axis-order", "composites", "own-entries", "optimizer-parts", "packs"}
FACTORIES = "bool bytes complex dict float frozenset int list set str tuple"
PYTHON_TAGS: dict[str, Any] = {
    "$dtype": one_name("dtype"),
    "$device": one_name("device"),
    "$enum": two_names,
    "$state": state_name,
    "$strided": strided,
    "$deque": bounded,
    "$defaultdict": with_factory,
    "$namedtuple": named_tuple,
}


def hashable(value: Json) -> Json:
    try:
        hash(value)
    except TypeError:
        refuse("malformed", "a key or element that cannot be hashed")
    return value


def mapping(tag: str, body: Json, depth: int) -> Json:
    check(depth < 16, "too deep", "limit-exceeded")
    pairs = checked_list(body, tag, lambda one: isinstance(one, list) and len(one) == 2)
    found = OrderedDict((hashable(value_of(key, depth + 1)), value_of(one, depth + 1)) for key, one in pairs)
    check(len(found) == len(pairs), "a key stands twice")
    if tag == "$odict":
        return found
    if tag == "$counter":
        return Counter(found)
    check(any(not isinstance(key, str) or key.startswith("$") for key in found), "a needless $map")
    return dict(found)


def elements(tag: str, body: Json, depth: int) -> Json:
    found = [hashable(one) for one in value_of(checked_list(body, tag), depth)]
    texts = [json.dumps(one, separators=(",", ":")) for one in body]
    check(texts == sorted(set(texts)) and len(set(found)) == len(found), f"{tag} out of order, or twice")
    return set(found) if tag == "$set" else frozenset(found)


def from_base64(body: Json) -> bytes:
    try:
        data = base64.b64decode(body, validate=True)
    except (ValueError, TypeError):
        refuse("malformed", "no base64")
    check(base64.b64encode(data).decode() == body, "base64 that is not canonical")
    return data


def small_array(body: Json) -> Json:
    dtype, shape, data, origin = members(body, "dtype shape data origin", "$array")
    check(dtype in TYPES, f"element type {dtype}", "unsupported")
    checked_list(shape, "shape", lambda one: is_int(one, 0, 2**48))
    raw, kind = from_base64(data), np.dtype(TYPES[dtype][0])
    check(len(raw) <= 65536 and len(shape) <= 32, "array in a value too large", "limit-exceeded")
    check(prod(shape) * kind.itemsize == len(raw) and origin in ("torch", "numpy"), "$array")
    return np.frombuffer(raw, kind).reshape(shape)


def pointers(typed: Json) -> Json:
    check(isinstance(typed, dict) and all(name.startswith("/") for name in typed), "values are no pointers")
    return {name: value_of(one, 0) for name, one in typed.items()}


# --- the manifest (UCF-70 to UCF-83)


def read_manifest(data: bytes) -> Json:
    check(len(data) <= 64 * MIB, "manifest too large", "limit-exceeded")
    tail = re.fullmatch(rb',"digest":"([0-9a-f]{32})"\}\n', data[-46:])
    check(tail is not None, "no digest at the end")
    check(tail is not None and digest_of(data[:-46]) == tail[1].decode(), "digest", "checksum-mismatch")
    found = parse_json(data)
    check(isinstance(found, dict) and found.get("format") == "elastickpt", "format")
    check(is_int(found.get("version")), "version")
    check(found["version"] == 1, f"version {found['version']}; this reader reads 1", "unsupported")
    unknown = set(checked_list(found.get("requires"), "requires", is_text)) - FEATURES
    check(not unknown, f"requires {sorted(unknown)}", "unsupported")
    names = (
        "format version requires attempt step time world_size placement versions items meshes layouts layout_text "
        "bases index fragments tied values digest"
    )
    members(found, names, "manifest")
    check(is_text(found["attempt"]) and (found["layout_text"] is None or is_text(found["layout_text"])), "text")
    check(found["step"] is None or is_int(found["step"]), "step")
    check(isinstance(found["time"], float) and isfinite(found["time"]), "time")
    check(is_int(found["world_size"], 1), "world_size")
    check(found["placement"] in ("plain", "packed"), "placement")
    check(isinstance(found["versions"], dict) and all(map(is_text, found["versions"].values())), "versions")
    check_items_and_meshes(found)
    check_record_files(found)
    for group in checked_list(found["tied"], "tied"):
        check(isinstance(group, list) and len(group) >= 2, "tied")
        for one in group:
            check(isinstance(one, list) and len(one) == 2 and all(map(is_text, one)), "tied")
    found["values"] = pointers(found["values"])
    return found


def check_items_and_meshes(found: Json) -> None:
    items = [members(item, "name kind type", "item") for item in checked_list(found["items"], "items")]
    for name, kind, type_name in items:
        checked_name(name)
        check(kind in ("module", "optimizer", "stateful", "values") and is_text(type_name), "item")
    check(len({name for name, _, _ in items}) == len(items), "an item stands twice")
    budget = [2**23]
    for mesh in checked_list(found["meshes"], "meshes"):
        name, axes, sizes, runs = members(mesh, "name axes sizes ranks", "mesh")
        mesh["ranks"] = ranks = expand(runs, budget)
        checked_list(axes, "axes", is_text)
        checked_list(sizes, "sizes", lambda one: is_int(one, 1))
        check(is_text(name) and len(set(axes)) == len(axes) == len(sizes), "mesh")
        check(prod(sizes) == len(ranks) == len(set(ranks)), "ranks of a mesh")
    for layout in checked_list(found["layouts"], "layouts"):
        mesh, placements = members(layout, "mesh placements", "layout")
        check(is_int(mesh, 0, len(found["meshes"]) - 1), "a layout's mesh")
        checked_list(placements, "placements", lambda one: is_text(one) and re.fullmatch(r"R|_?S\((0|[1-9]\d?)\)", one))
        check(len(placements) == len(found["meshes"][mesh]["axes"]), "placements")


def check_record_files(found: Json) -> None:
    digests = []
    for base in checked_list(found["bases"], "bases"):
        uri, digest = members(base, "uri digest", "base")
        digests.append(digest)
        check(is_text(uri), "uri")
        check("::" not in uri, f"chained URL {uri}", "unsafe")
    check(bool(checked_list(found["index"], "index")), "no index")
    last, paths = None, []
    for entry in found["index"]:
        path, nbytes, digest, first, end = members(entry, "path nbytes digest first last", "index")
        paths.append(checked_path(path))
        digests.append(digest)
        check(is_int(nbytes) and is_text(first) and is_text(end), "index")
        check(first <= end and (last is None or last < first), "index parts out of order")
        last = end
    for entry in checked_list(found["fragments"], "fragments"):
        path, nbytes, digest = members(entry, "path nbytes digest", "fragments")
        paths.append(checked_path(path))
        digests.append(digest)
        check(is_int(nbytes), "nbytes")
    check(all(is_text(one) and re.fullmatch("[0-9a-f]{32}", one) for one in digests), "a digest's form")
    check(len(set(paths)) == len(paths), "a record file is named twice")


# --- fragment files and index parts (FRAG-11 to FRAG-24, UCF-60 to UCF-69)


def head(data: bytes, limit: int, name: str) -> Json:
    record = parse_msgpack(data, limit)
    check(isinstance(record, dict) and record.get("format") == name, "format")
    check(is_int(record.get("version")), "version")
    check(record["version"] == 1, f"version {record['version']}; this reader reads 1", "unsupported")
    return record


def check_tables(tables: Json) -> None:
    seen = []
    for table in checked_list(tables, "tables"):
        item, models, model, names, fields = members(table, "item models model names fields", "table")
        checked_list(models, "models", is_text)
        checked_list(names, "names", is_text)
        parameters = set(zip(column(model, len(names), 0, len(models) - 1), names, strict=True))
        check(is_text(item) and len(parameters) == len(names), "a parameter stands twice")
        keys = set()
        for field in checked_list(fields, "fields"):
            kind, key, values, which = members(field, "kind key values which", "field")
            check(kind in ("hyper", "scalar", "schedule") and is_text(key) and is_text(values), "field")
            decoded = read_value(values)
            check(isinstance(decoded, list), "values of a field")
            column(which, len(names), -1, len(decoded) - 1)
            keys.add((kind, key))
        check(len(keys) == len(fields), "a field stands twice")
        seen.append(item)
    check(len(set(seen)) == len(seen), "two tables of one optimizer")


def read_fragments(data: bytes) -> Json:
    """The fragment map; `pieces` is a list of dicts."""
    record = head(data, 1024 * MIB, "elastickpt-fragments")
    names = "format version writer attempt block_nbytes arrays ndims files pieces checksums tables values"
    _, _, writer, attempt, block, arrays, ndims, files, pieces, checksums, tables, values = members(record, names, "map")
    check(is_int(writer) and is_text(attempt), "writer or attempt")
    check(writer < 2**20, "writer", "limit-exceeded")
    check(is_int(block, 16384, MIB) and block & (block - 1) == 0, "block_nbytes")
    keys = [checked_path(key) for key in checked_list(arrays, "arrays")]
    check(all(low < high for low, high in pairwise(keys)), "arrays out of order")
    axes = column(ndims, len(keys))
    check(all(ndim <= 32 for ndim in axes), "ndims", "limit-exceeded")
    base, paths, nbytes = members(files, "base path nbytes", "files")
    paths = [checked_path(path) for path in checked_list(paths, "paths")]
    check(block >= 65536 or any(path.startswith("packs/") for path in paths), "block_nbytes")
    table = list(zip(column(base, len(paths)), paths, column(nbytes, len(paths), 0, 2**62), strict=True))
    check(len({(number, path) for number, path, _ in table}) == len(table), "a file stands twice")
    found = read_pieces(pieces, keys, axes, table)
    sums = column(checksums, None, 0, 2**64 - 1, "Q")
    for piece in found:
        count = -(-piece["nbytes"] // block)
        piece["checksums"], sums = sums[:count], sums[count:]
        check(len(piece["checksums"]) == count, "checksums are missing")
    check(not sums, "checksums are left over")
    check_tables(tables)
    check(values is None or is_text(values), "values")
    per_rank = None if values is None else pointers(parse_json(values))
    return {"writer": writer, "attempt": attempt, "block": block, "arrays": dict(zip(keys, axes, strict=True)),
            "files": table, "pieces": found, "values": per_rank}  # fmt: skip


def read_pieces(pieces: Json, keys: list[str], axes: list[int], table: list[tuple[int, str, int]]) -> list[Json]:
    names = "array file offset nbytes row_nbytes row_stride start shape"
    array, file, offset, nbytes, row_nbytes, row_stride, start, shape = members(pieces, names, "pieces")
    array = column(array, None, 0, len(keys) - 1)
    rows, total = len(array), sum(axes[one] for one in array)
    file = column(file, rows, 0, len(table) - 1)
    offset, nbytes, row_nbytes, row_stride = (column(one, rows, 0, 2**62) for one in (offset, nbytes, row_nbytes, row_stride))
    start, shape = column(start, total), column(shape, total)
    check(all(low <= high for low, high in pairwise(array)), "pieces out of order")
    check(len(set(array)) == len(keys), "an array without a piece")
    found, axis = [], 0
    for p in range(rows):
        stop = axis + axes[array[p]]
        piece: Json = {
            "array": keys[array[p]],
            "start": start[axis:stop],
            "shape": shape[axis:stop],
            "file": table[file[p]][:2],
            "offset": offset[p],
            "nbytes": nbytes[p],
            "row_nbytes": row_nbytes[p],
            "row_stride": row_stride[p],
        }
        axis = stop
        check(piece["row_nbytes"] > 0 and piece["nbytes"] > 0 and piece["nbytes"] % piece["row_nbytes"] == 0, "rows")
        count = piece["nbytes"] // piece["row_nbytes"]
        if count == 1:
            check(piece["row_stride"] == piece["nbytes"], "one row with a stride of its own")
        check(count == 1 or piece["row_stride"] > piece["row_nbytes"], "rows that overlap or join")
        end = piece["offset"] + (count - 1) * piece["row_stride"] + piece["row_nbytes"]
        check(end <= table[file[p]][2], "a piece beyond its file")
        check(all(extent >= 1 for extent in piece["shape"]), "a piece without elements")
        check(all(low + n <= 2**48 for low, n in zip(piece["start"], piece["shape"], strict=True)), "a piece beyond 2^48")
        found.append(piece)
    return found


def read_index(data: bytes) -> list[Json]:
    """The arrays of one part, as dicts in the order of their keys."""
    record = head(data, 64 * MIB, "elastickpt-index")
    names = "format version templates entries leaves writer_sets arrays tables"
    _, _, templates, entries, leaves, writer_sets, arrays, tables = members(record, names, "index")
    likes = [read_template(one) for one in checked_list(templates, "templates")]
    section, item, items, name, key = members(entries, "section item items name key", "entries")
    items = [checked_name(one) for one in checked_list(items, "items")]
    names_ = [checked_name(one) for one in checked_list(name, "names")]
    keys = [checked_path(one) for one in checked_list(key, "keys")]
    check(len(names_) == len(keys), "names and keys")
    section, item = column(section, len(keys), 0, 1), column(item, len(keys), 0, len(items) - 1)
    for leaf in checked_list(leaves, "leaves", lambda one: isinstance(one, list) and len(one) == 2):
        check(checked_name(leaf[0]) == leaf[1] == "" or "/" not in checked_path(leaf[1]), "a leaf")
    budget = [2**23]
    sets = [expand(runs, budget) for runs in checked_list(writer_sets, "writer_sets")]
    check(all(low < high for one in sets for low, high in pairwise(one)), "writers out of order")
    check_tables(tables)
    entry, leaf, like, writers, shape = members(arrays, "entry leaf template writers shape", "arrays")
    entry = column(entry, None, 0, len(keys) - 1)
    leaf = column(leaf, len(entry), 0, len(leaves) - 1)
    like = column(like, len(entry), 0, len(likes) - 1)
    writers = column(writers, len(entry), 0, len(sets) - 1)
    shape = column(shape, sum(len(likes[one]["chunk_shape"]) for one in like))
    found, axis = [], 0
    for e, k, t, w in zip(entry, leaf, like, writers, strict=True):
        stop = axis + len(likes[t]["chunk_shape"])
        found.append(array_of(section[e], items[item[e]], names_[e], keys[e], leaves[k], likes[t], shape[axis:stop], sets[w]))
        axis = stop
    check(all(low["key"] < high["key"] for low, high in pairwise(found)), "keys out of order")
    return found


def read_template(template: Json) -> Json:
    dtype, chunk, codecs, layout, attributes = members(template, "data_type chunk_shape codecs layout attributes", "template")
    check(is_text(dtype) and is_text(codecs) and is_text(attributes), "template")
    check(dtype in TYPES, f"element type {dtype}", "unsupported")
    checked_list(chunk, "chunk_shape", is_int)
    size = np.dtype(TYPES[dtype][0]).itemsize
    check(len(chunk) <= 32 and all(extent <= 2**48 for extent in chunk), "chunk_shape", "limit-exceeded")
    check(all(extent >= 1 for extent in chunk), "chunk_shape")
    check(prod(chunk) * size <= 1024 * MIB, "chunk_shape", "limit-exceeded")
    check(codecs == json.dumps(codecs_of(size), separators=(",", ":")), f"codecs {codecs}", "unsupported")
    check(layout is None or is_int(layout), "layout")
    own = parse_json(attributes)
    check(isinstance(own, dict) and not {"item", "name", "state"} & set(own), "attributes")
    for one in own.values():
        value_of(one, 0)
    return {"dtype": dtype, "chunk_shape": chunk, "layout": layout, "attributes": own}


def codecs_of(size: int) -> Json:
    return [{"name": "bytes"}] if size == 1 else [{"name": "bytes", "configuration": {"endian": "little"}}]


def array_of(section: int, item: str, name: str, key: str, leaf: Json, like: Json, shape: list[int], writers: Any) -> Json:
    state, leaf_key = leaf
    check(bool(state) == (section == 0), "a state of an extra, or a parameter without")
    full = f"{key}/{leaf_key}" if state else key
    depth = 4 if section == 0 else 2 + (len(name.split("/")) if name else 0)
    prefix = ("params/", "extra/")[section]
    check(full.startswith(prefix) and full.count("/") == depth - 1, f"{full} is no key of {item}/{name}")
    check(all(extent <= 2**48 for extent in shape), "extent", "limit-exceeded")
    chunks = prod(-(-extent // step) for extent, step in zip(shape, like["chunk_shape"], strict=True))
    check(chunks <= 2**24, "chunks", "limit-exceeded")
    return {**like, "key": full, "section": prefix[:-1], "item": item, "name": name, "state": state,
            "shape": shape, "writers": writers}  # fmt: skip


# --- documents (UCF-10 to UCF-17)


def documents(arrays: list[Json]) -> dict[str, bytes]:
    nodes: dict[str, Json] = {}
    for array in arrays:
        parts, own = array["key"].split("/"), {"section": array["section"]}
        tokens = [array["name"]] if array["section"] == "params" else array["name"].split("/")
        for depth in range(1, len(parts)):
            if depth >= 2:
                own = {**own, "item": array["item"]}
            if depth >= 3:
                own = {**own, "name": "/".join(tokens[: depth - 2])}
            nodes["/".join(parts[:depth])] = {"zarr_format": 3, "node_type": "group", "attributes": {"elastickpt": own}}
        nodes[array["key"]] = array_document(array)
    root: Json = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    if 0 < len(arrays) <= 20_000 and all(array["dtype"] in CORE for array in arrays):
        metadata = {key: nodes[key] for key in sorted(nodes)}
        inline = {"kind": "inline", "must_understand": False, "metadata": metadata}
        full = {**root, "consolidated_metadata": inline}
        root = full if len(json.dumps(full, separators=(",", ":"))) <= 64 * MIB else root
    found = {f"{key}/zarr.json": node for key, node in nodes.items()} | {"zarr.json": root}
    return {path: json.dumps(node, separators=(",", ":")).encode() for path, node in found.items()}


def array_document(array: Json) -> Json:
    kind, fill = TYPES[array["dtype"]]
    shape = array["shape"]
    counts = [shape[: k + 1].count(extent) for k, extent in enumerate(shape)]
    own = {"item": array["item"], "name": array["name"], "state": array["state"], **array["attributes"]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": array["dtype"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array["chunk_shape"]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs_of(np.dtype(kind).itemsize),
        "attributes": {"elastickpt": own},
        "dimension_names": [f"n{n}" + (f"_{k}" if k > 1 else "") for n, k in zip(shape, counts, strict=True)],
    }


# --- a whole checkpoint


def record_file(files: Files, entry: Json) -> bytes:
    check(entry["path"] in files, f"{entry['path']} is missing", "missing-file")
    data = files[entry["path"]]
    check(len(data) == entry["nbytes"], f"{entry['path']} has {len(data)} bytes", "wrong-length")
    check(digest_of(data) == entry["digest"], f"{entry['path']} has another digest", "checksum-mismatch")
    return data


def read_files(files: Files, beside: Mapping[str, Files] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """key -> array, after checking everything that the specification asks of a whole checkpoint.

    `files` are those of its folder, an empty folder being a path that ends with a slash; `beside` maps the names of the
    folders that stand beside it to theirs.
    """
    check("draft.json" not in files, "a draft", "uncommitted")
    folders = {path.partition("/")[0] for path in files if "/" in path}
    attempt = "fragments" in folders and bool(folders & {"params", "packs"})
    check("checkpoint.json" in files, "no checkpoint.json", "uncommitted" if attempt else "not-a-checkpoint")
    manifest = read_manifest(files["checkpoint.json"])
    plain = manifest["placement"] == "plain"
    arrays: list[Json] = []
    for entry in manifest["index"]:
        part = read_index(record_file(files, entry))
        ends = (part[0]["key"], part[-1]["key"]) if part else ("", "")
        check(ends == (entry["first"], entry["last"]), "first and last key of an index part")
        arrays += part
    check_keys(arrays)
    check(all(one["layout"] is None or one["layout"] < len(manifest["layouts"]) for one in arrays), "layout")
    maps = [read_fragments(record_file(files, entry)) for entry in manifest["fragments"]]
    by_key = {array["key"]: array for array in arrays}
    for writer, one in enumerate(maps):
        check(one["writer"] == writer and one["attempt"] == manifest["attempt"], f"fragment file {writer} is another's")
        check(all(number <= len(manifest["bases"]) for number, _, _ in one["files"]), "base")
        check_packs(one, manifest)
        for key, ndim in one["arrays"].items():
            check(key in by_key and len(by_key[key]["shape"]) == ndim, f"array {key} is not in the index")
        for piece in one["pieces"]:
            check_piece(piece, by_key[piece["array"]], {path: n for base, path, n in one["files"] if base == 0}, plain)
    used = {number for one in maps for number, _, _ in one["files"] if number > 0}
    bases = {number: open_base(manifest["bases"][number - 1], {} if beside is None else beside) for number in sorted(used)}
    check_tree({0: files, **bases}, manifest, arrays, maps)
    return {array["key"]: assemble(array, maps, {0: files, **bases}) for array in arrays}


def check_packs(one: Json, manifest: Json) -> None:
    """FRAG-64, FRAG-65."""
    attempt = manifest["attempt"]
    for path in (path for number, path, _ in one["files"] if number == 0):
        name = re.fullmatch(r"packs/([0-9a-f]+)-[0-9]+\.bin", path)
        check(name is None or name[1] == attempt, f"{path} is another attempt's")
        own = f"packs/{attempt}-{one['writer']:05d}.bin"
        check("packs" not in manifest["requires"] or path == own, f"{path}, expected {own}")


def open_base(base: Json, beside: Mapping[str, Files]) -> Files:
    """UCF-84, UCF-85."""
    name = base["uri"].removeprefix("../")
    check(base["uri"] == f"../{name}" and "/" not in name and name not in ("", ".", ".."), f"base {base['uri']}", "unsafe")
    check("checkpoint.json" in beside.get(name, {}), f"no checkpoint {name}", "missing-file")
    check(digest_of(beside[name]["checkpoint.json"]) == base["digest"], f"base {name} is another one", "checksum-mismatch")
    return beside[name]


def check_piece(piece: Json, array: Json, lengths: dict[str, int], plain: bool) -> None:
    """FRAG-10, FRAG-18, FRAG-19, FRAG-43 and FRAG-44."""
    size, chunk = np.dtype(TYPES[array["dtype"]][0]).itemsize, array["chunk_shape"]
    start, stop = piece["start"], [low + n for low, n in zip(piece["start"], piece["shape"], strict=True)]
    check(all(high <= extent for high, extent in zip(stop, array["shape"], strict=True)), "a piece beyond its array")
    check(piece["nbytes"] == prod(piece["shape"]) * size, "a piece of another size than its box")
    place = [low // step for low, step in zip(start, chunk, strict=True)]
    check(place == [(high - 1) // step for high, step in zip(stop, chunk, strict=True)], "a piece over several chunks")
    if not plain:
        return
    number, path = piece["file"]
    check(number > 0 or path == ".".join([f"{array['key']}/c", *map(str, place)]), "a piece in another file")
    check(number > 0 or lengths[path] == prod(chunk) * size, "a file that is no whole chunk")
    cells = np.zeros(chunk, np.uint8)
    inside = tuple(slice(low - k * step, high - k * step) for low, high, k, step in zip(start, stop, place, chunk, strict=True))
    cells[inside] = 1
    first = np.flatnonzero(cells.reshape(-1)) * size
    rows = piece["offset"] + np.arange(piece["nbytes"] // piece["row_nbytes"]) * piece["row_stride"]
    expected = (rows[:, None] + np.arange(0, piece["row_nbytes"], size)[None, :]).reshape(-1)
    check(number > 0 or np.array_equal(first, expected), "a piece at another place than its box's")


def check_tree(bases: Mapping[int, Files], manifest: Json, arrays: list[Json], maps: list[Json]) -> None:
    files = bases[0]
    named = {"checkpoint.json"} | {entry["path"] for entry in manifest["index"] + manifest["fragments"]}
    for one in maps:
        for number, path, nbytes in one["files"]:
            held = bases[number]
            check(path in held, f"{path} of base {number} is missing", "missing-file")
            check(len(held[path]) == nbytes, f"{path} of base {number} has {len(held[path])} bytes", "wrong-length")
            named |= {path} if number == 0 else set()
    wanted = documents(arrays) if manifest["placement"] == "plain" else {}
    for path, text in wanted.items():
        check(path in files, f"{path} is missing", "missing-file")
        check(files[path] == text, f"{path} is not what the index says", "document-mismatch")
    strays = set(files) - named - set(wanted) - ({"references.json"} if manifest["placement"] == "packed" else set())
    check(not strays, f"nobody names {sorted(strays)}", "stray-file")
    used = {(number, path): np.zeros(nbytes, np.uint8) for one in maps for number, path, nbytes in one["files"]}
    for piece in (piece for one in maps for piece in one["pieces"]):
        for row in range(piece["nbytes"] // piece["row_nbytes"]):
            begin = piece["offset"] + row * piece["row_stride"]
            used[piece["file"]][begin : begin + piece["row_nbytes"]] += 1
    for (_, path), count in used.items():
        check(bool((count <= 1).all()), f"two pieces share bytes of {path}", "coverage-overlap")
    if "packs" in manifest["requires"]:
        check_references(files, arrays, maps)
    for array in arrays:
        listed = [writer for writer, one in enumerate(maps) if any(p["array"] == array["key"] for p in one["pieces"])]
        pieces = [p for one in maps for p in one["pieces"] if p["array"] == array["key"]]
        check_coverage(array, pieces)
        check(listed == array["writers"], f"writers of {array['key']}")
    for (number, path), count in used.items():
        if number == 0:
            check(not np.frombuffer(files[path], np.uint8)[count == 0].any(), f"a pad of {path}", "checksum-mismatch")


def check_references(files: Files, arrays: list[Json], maps: list[Json]) -> None:
    """UCF-161, UCF-163."""
    if "references.json" not in files:
        return
    try:
        found = parse_json(files["references.json"])
    except Refusal:
        refuse("document-mismatch", "references.json is no JSON")
    refs = found.get("refs") if isinstance(found, dict) else None
    for path in [one[0] for one in refs.values() if isinstance(one, list) and one] if isinstance(refs, dict) else []:
        check(isinstance(path, str) and path.startswith("{{root}}/"), f"a reference to {path}", "unsafe")
        checked_path(path.removeprefix("{{root}}/"))
    lengths = {path: nbytes for one in maps for number, path, nbytes in one["files"] if number == 0}
    entries = {array["key"]: references(array, maps, lengths) for array in arrays}
    texts = {
        path: text.decode() for path, text in documents([one for one in arrays if entries[one["key"]] is not None]).items()
    }
    chunks = {key: target for one in entries.values() for key, target in (one or {}).items()}
    wanted = {"version": 1, "templates": {"root": "."}, "refs": texts | chunks}
    check(found == wanted, "references.json is not what the records say", "document-mismatch")


def references(array: Json, maps: list[Json], lengths: dict[str, int]) -> Json:
    """The references to an array's chunks; None if one of them does not lie whole in one pack."""
    size, chunk, found = np.dtype(TYPES[array["dtype"]][0]).itemsize, array["chunk_shape"], {}
    slots: dict[tuple[int, ...], Counter[Json]] = defaultdict(Counter)
    for piece in (piece for one in maps for piece in one["pieces"] if piece["array"] == array["key"]):
        place = tuple(low // step for low, step in zip(piece["start"], chunk, strict=True))
        cells = np.zeros(chunk, np.uint8)
        cells[tuple(slice(low % n, low % n + k) for low, n, k in zip(piece["start"], chunk, piece["shape"], strict=True))] = 1
        rows = piece["offset"] + np.arange(piece["nbytes"] // piece["row_nbytes"]) * piece["row_stride"]
        lies = (rows[:, None] + np.arange(0, piece["row_nbytes"], size)[None, :]).reshape(-1)
        bases = set((lies - np.flatnonzero(cells.reshape(-1)) * size).tolist())
        number, path = piece["file"]
        slots[place][(path, min(bases)) if len(bases) == 1 and number == 0 else None] += len(lies)
    for place in np.ndindex(*(-(-extent // step) for extent, step in zip(array["shape"], chunk, strict=True))):
        whole = prod(min(step, extent - k * step) for k, step, extent in zip(place, chunk, array["shape"], strict=True))
        (slot, count), *more = slots[place].items() or [(None, 0)]
        if more or slot is None or count != whole or slot[1] < 0 or slot[1] + prod(chunk) * size > lengths[slot[0]]:
            return None
        found[".".join([f"{array['key']}/c", *map(str, place)])] = ["{{root}}/" + slot[0], slot[1], prod(chunk) * size]
    return found


def check_coverage(array: Json, pieces: list[Json]) -> None:
    total, whole = sum(prod(piece["shape"]) for piece in pieces), prod(array["shape"])
    check(total >= whole, f"elements of {array['key']} are missing", "coverage-gap")
    seen = np.zeros(array["shape"], np.uint8) if total else np.zeros(0, np.uint8)
    for piece in pieces:
        seen[tuple(slice(low, low + n) for low, n in zip(piece["start"], piece["shape"], strict=True))] += 1
    check(bool((seen <= 1).all()), f"elements of {array['key']} were written twice", "coverage-overlap")


def assemble(array: Json, maps: list[Json], bases: Mapping[int, Files]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(TYPES[array["dtype"]][0])
    whole = np.zeros(array["shape"], dtype)
    for one in maps:
        for piece in (piece for piece in one["pieces"] if piece["array"] == array["key"]):
            number, path = piece["file"]
            starts = range(
                piece["offset"],
                piece["offset"] + piece["nbytes"] // piece["row_nbytes"] * piece["row_stride"],
                piece["row_stride"],
            )
            data = b"".join(bases[number][path][start : start + piece["row_nbytes"]] for start in starts)
            blocks = [data[k : k + one["block"]] for k in range(0, len(data), one["block"])]
            sums = [xxhash.xxh3_64_intdigest(block) for block in blocks]
            check(sums == piece["checksums"], f"bytes of {array['key']}", "checksum-mismatch")
            box = tuple(slice(low, low + n) for low, n in zip(piece["start"], piece["shape"], strict=True))
            whole[box] = np.frombuffer(data, dtype).reshape(piece["shape"])
    return whole


def read(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """key -> array of the checkpoint in a folder; its bases stand beside it. Raises Refusal."""
    root = Path(path).absolute()
    return read_files(files_of(root), _Beside(root.parent))


class _Beside(dict[str, Files]):
    """The folders beside a checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if (self.folder / name / "checkpoint.json").is_file() else default

    def __missing__(self, name: str) -> Files:
        self[name] = files_of(self.folder / name)
        return self[name]


def files_of(root: Path) -> Files:
    files = {}
    for file in sorted(root.rglob("*")):
        check(not file.is_symlink() and (file.is_dir() or file.is_file()), f"{file} is no regular file", "unsafe")
        name = file.relative_to(root).as_posix()
        if file.is_file():
            files[name] = file.read_bytes()
        elif not any(file.iterdir()):
            files[f"{name}/"] = b""
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Read a checkpoint from the specification alone.")
    parser.add_argument("path")
    parser.add_argument("--dump", metavar="NAME", help="print the array with this key")
    options = parser.parse_args(arguments)
    try:
        arrays = read(options.path)
    except Refusal as refusal:
        print(refusal)
        return 5 if refusal.kind in ("unsafe", "limit-exceeded") else 4 if refusal.kind == "unsupported" else 3
    for key, array in arrays.items():
        if options.dump == key:
            print(array)
        elif options.dump is None:
            print(f"{key}  {array.dtype}  {list(array.shape)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
