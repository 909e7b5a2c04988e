"""`checkpoint.json`: canonical JSON that ends with the digest of all bytes before it. [UCF-70..83]

The rule of the digest and the members `format`, `version` and `requires` are the same in every version of the format,
so that damage is told from novelty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import get_args

from elastickpt.errors import CheckpointError, LimitExceeded, Malformed, Unsafe, Unsupported
from elastickpt.format.arrays import Mesh
from elastickpt.format.canonical_json import dump, parse
from elastickpt.format.decode_values import decode_pointers
from elastickpt.format.digest import SEAL_NBYTES, check_seal, seal, seal_text
from elastickpt.format.encode_fragments import check_version
from elastickpt.format.encode_values import require_pointers
from elastickpt.format.keys import checked_name, checked_path
from elastickpt.format.long_texts import LONG, decode_long_pointers
from elastickpt.format.records import (
    FORMAT_VERSION,
    Base,
    FileDigest,
    IndexEntry,
    Item,
    ItemKind,
    Layout,
    Manifest,
    ManifestFrame,
    Placement,
)
from elastickpt.format.strict_reading import RankRuns, StrictObject, integers, is_int, pack_runs, pair, text
from elastickpt.format.typed_values import TypedValue, typed_values
from elastickpt.format.values import Value
from elastickpt.format.version import FEATURES, MAX_MANIFEST_NBYTES, MAX_WRITERS

FORMAT = "elastickpt"
FRAME = "elastickpt-frame"
_DIGEST = re.compile(r"[0-9a-f]{32}")
_PLACEMENT = re.compile(r"R|_?S\((0|[1-9][0-9]?)\)")
_ITEM_KINDS: dict[str, ItemKind] = {kind: kind for kind in get_args(ItemKind)}
_PLACEMENTS: dict[str, Placement] = {name: name for name in get_args(Placement)}


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `checkpoint.json`, its own digest last; `decode_manifest` takes what this returns.

    Raises ValueNotCarried, or what `decode_manifest` raises for a member that no reader would take.
    """
    return encode_manifest_with(manifest, typed_values(require_pointers(manifest.values, where="replicated values")))


def encode_manifest_with(manifest: Manifest, values: Mapping[str, TypedValue]) -> bytes:
    """The same with these values by JSON pointer, in place of its own. What was encoded, or found readable, is not again."""
    where = "manifest about to be written"
    record = dump(_members(manifest))
    decode_manifest(seal_text(f'{record[:-1]},"values":{{}}}}', where="manifest"), path=where)
    texts = ",".join(f"{dump(pointer)}:{one.text}" for pointer, one in require_pointers(values, where=where).items())
    data = seal_text(f'{record[:-1]},"values":{{{texts}}}}}', where="manifest")
    _require_size(data, where)
    for one in values.values():
        one.require_readable()
    return data


def _members(manifest: Manifest) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": manifest.version,
        "requires": list(manifest.requires),
        "attempt": manifest.attempt,
        "step": manifest.step,
        "time": manifest.time,
        **_frame_members(manifest),
        "bases": [{"uri": base.uri, "digest": base.digest} for base in manifest.bases],
        "index": [{**_file(entry.file), "first": entry.first, "last": entry.last} for entry in manifest.index],
        "fragments": [_file(file) for file in manifest.fragments],
        "tied": _tied_members(manifest),
    }


def _frame_members(frame: ManifestFrame) -> dict[str, object]:
    return {
        "world_size": frame.world_size,
        "placement": frame.placement,
        "versions": dict(frame.versions),
        "items": [{"name": item.name, "kind": item.kind, "type": item.type} for item in frame.items],
        "meshes": [
            {"name": mesh.name, "axes": list(mesh.axes), "sizes": list(mesh.sizes), "ranks": pack_runs(mesh.ranks)}
            for mesh in frame.meshes
        ],
        "layouts": [{"mesh": one.mesh, "placements": list(one.placements)} for one in frame.layouts],
        "layout_text": frame.layout_text,
    }


def _tied_members(frame: ManifestFrame) -> list[object]:
    return [[list(one) for one in group] for group in frame.tied]


def encode_frame(frame: ManifestFrame) -> bytes:
    """The members of a frame, sealed like a manifest, for other processes of one job; `decode_frame` takes what this returns.

    Raises what `decode_frame` raises for a member that no reader of a manifest would take.
    """
    record = {"format": FRAME, "version": FORMAT_VERSION, **_frame_members(frame), "tied": _tied_members(frame)}
    data = seal(record, where="frame")
    decode_frame(data, path="frame of a manifest about to be written")
    return data


def decode_frame(data: bytes, *, path: str) -> ManifestFrame:
    """What `encode_frame` encoded. `path` is for messages. Raises as `decode_manifest`."""
    check_seal(data, where=path)
    members = StrictObject(parse(data, where=path), where=path)
    check_version(members, FRAME)
    frame = _frame(members)
    members.take("digest")
    members.close()
    return frame


def _frame(members: StrictObject) -> ManifestFrame:
    meshes = tuple(_meshes(members))
    return ManifestFrame(
        world_size=members.integer("world_size", low=1, high=MAX_WRITERS),
        placement=_one_of(members, "placement", _PLACEMENTS),
        versions=_versions(members),
        items=_items(members),
        meshes=meshes,
        layouts=_layouts(members, meshes),
        tied=_tied(members),
        layout_text=_optional_text(members, "layout_text"),
    )


def manifest_in(
    frame: ManifestFrame,
    *,
    attempt: str,
    step: int | None,
    time: float,
    index: tuple[IndexEntry, ...],
    fragments: tuple[FileDigest, ...],
    values: Value,
    bases: tuple[Base, ...] = (),
    requires: tuple[str, ...] = (),
) -> Manifest:
    """The manifest of one save with this frame."""
    return Manifest(
        world_size=frame.world_size,
        placement=frame.placement,
        versions=frame.versions,
        items=frame.items,
        meshes=frame.meshes,
        layouts=frame.layouts,
        tied=frame.tied,
        layout_text=frame.layout_text,
        attempt=attempt,
        step=step,
        time=time,
        index=index,
        fragments=fragments,
        values=values,
        bases=bases,
        requires=requires,
    )


def _file(file: FileDigest) -> dict[str, object]:
    return {"path": file.path, "nbytes": file.nbytes, "digest": file.digest}


def decode_manifest(data: bytes, *, path: str) -> Manifest:
    """The manifest, every member checked. `path` is for messages.

    Raises LimitExceeded; Malformed when the digest's place is not found; ChecksumMismatch; Unsupported, naming the
    version or features found; Malformed or Unsafe for a member.
    """
    _require_size(data, path)
    check_seal(data, where=path)
    members, values = _parsed(data, path)
    check_version(members, FORMAT)  # [UCF-72]
    requires = members.texts("requires")
    unknown = sorted(set(requires) - FEATURES)
    if unknown:  # [UCF-73]
        raise Unsupported(f"{path}: requires {', '.join(unknown)}, which this release does not know")
    manifest = manifest_in(
        _frame(members),
        attempt=members.text("attempt"),
        step=_step(members),
        time=_time(members),
        index=_index(members),
        fragments=_fragments(members),
        values=decode_pointers(members.take("values"), where=f"{path}/values") if values is None else values,
        bases=_bases(members),
        requires=requires,
    )
    members.take("digest")
    members.close()
    _check_files(manifest, path)
    return manifest


def _parsed(data: bytes, path: str) -> tuple[StrictObject, Mapping[str, Value] | None]:
    """The members of a sealed manifest, and its values where those are long, and are read apart."""
    head, _, rest = data.partition(b',"values":{')
    texts, tail = rest[:-SEAL_NBYTES], rest[-SEAL_NBYTES:]
    if len(texts) >= LONG and texts.isascii():
        values = decode_long_pointers("{" + texts.decode("ascii"), where=f"{path}/values")
        if values is not None:
            try:
                members = parse(head + tail, where=path)
            except CheckpointError:
                members = None
            if isinstance(members, dict) and "values" not in members:
                return StrictObject(members, where=path), values
    return StrictObject(parse(data, where=path), where=path), None


def _require_size(data: bytes, path: str) -> None:
    if len(data) > MAX_MANIFEST_NBYTES:
        raise LimitExceeded(f"{path}: {len(data)} bytes, the limit is {MAX_MANIFEST_NBYTES}")


def _one_of(members: StrictObject, name: str, known: dict[str, Placement]) -> Placement:
    found = members.text(name)
    if found not in known:
        raise Malformed(f"{members.where}/{name}: {found!r}, expected one of {', '.join(known)}")
    return known[found]


def _optional_text(members: StrictObject, name: str) -> str | None:
    value = members.take(name)
    return None if value is None else text(value, where=f"{members.where}/{name}")


def _step(members: StrictObject) -> int | None:
    value = members.take("step")
    if value is None:
        return None
    if not is_int(value) or not 0 <= value < 2**63:
        raise Malformed(f"{members.where}/step: expected null or an integer of at least 0, found {value!r}")
    return value


def _time(members: StrictObject) -> float:
    value = members.take("time")
    if not isinstance(value, float) or not isfinite(value):
        raise Malformed(f"{members.where}/time: expected seconds since 1970 with a fraction, found {value!r}")
    return value


def _versions(members: StrictObject) -> tuple[tuple[str, str], ...]:
    value = members.take("versions")
    if not isinstance(value, dict):
        raise Malformed(f"{members.where}/versions: expected an object")
    where = f"{members.where}/versions"
    return tuple((text(name, where=where), text(one, where=f"{where}/{name}")) for name, one in value.items())


def _each(members: StrictObject, name: str) -> list[StrictObject]:
    where = f"{members.where}/{name}"
    return [StrictObject(one, where=f"{where}[{k}]") for k, one in enumerate(members.sequence(name))]


def _items(members: StrictObject) -> tuple[Item, ...]:
    found = []
    for one in _each(members, "items"):
        kind = one.text("kind")
        if kind not in _ITEM_KINDS:
            raise Malformed(f"{one.where}/kind: {kind!r}, expected one of {', '.join(_ITEM_KINDS)}")
        found.append(Item(checked_name(one.text("name")), _ITEM_KINDS[kind], one.text("type")))
        one.close()
    if len({item.name for item in found}) != len(found):
        raise Malformed(f"{members.where}/items: an item stands twice")
    return tuple(found)


def _meshes(members: StrictObject) -> list[Mesh]:
    runs = RankRuns()
    found = []
    for one in _each(members, "meshes"):
        sizes = integers(one.take("sizes"), where=f"{one.where}/sizes")
        ranks = runs.expand(one.take("ranks"), where=f"{one.where}/ranks")
        found.append(Mesh(one.text("name"), one.texts("axes"), sizes, ranks))
        one.close()
    return found


def _layouts(members: StrictObject, meshes: tuple[Mesh, ...]) -> tuple[Layout, ...]:
    found = []
    for one in _each(members, "layouts"):
        mesh = one.integer("mesh", high=len(meshes) - 1)
        placements = one.texts("placements")
        one.close()
        if len(placements) != len(meshes[mesh].axes):
            raise Malformed(f"{one.where}: {len(placements)} placements on a mesh of {len(meshes[mesh].axes)} axes")
        for placement in placements:
            if not _PLACEMENT.fullmatch(placement):  # [UCF-77]
                raise Malformed(f"{one.where}: placement {placement!r}, expected R, S(k) or _S(k)")
        found.append(Layout(mesh, placements))
    return tuple(found)


def _digest(members: StrictObject) -> str:
    found = members.text("digest")
    if not _DIGEST.fullmatch(found):
        raise Malformed(f"{members.where}/digest: expected 32 lower-case hex digits, found {found[:40]!r}")
    return found


def _file_digest(members: StrictObject) -> FileDigest:
    return FileDigest(checked_path(members.text("path")), members.integer("nbytes"), _digest(members))


def _fragments(members: StrictObject) -> tuple[FileDigest, ...]:
    found = []
    for one in _each(members, "fragments"):
        found.append(_file_digest(one))
        one.close()
    return tuple(found)


def _index(members: StrictObject) -> tuple[IndexEntry, ...]:
    found: list[IndexEntry] = []
    for one in _each(members, "index"):
        entry = IndexEntry(_file_digest(one), one.text("first"), one.text("last"))
        one.close()
        if entry.first > entry.last or (found and entry.first <= found[-1].last):  # [UCF-65]
            raise Malformed(f"{one.where}: keys {entry.first!r} to {entry.last!r} are out of order")
        found.append(entry)
    if not found:  # [UCF-80]
        raise Malformed(f"{members.where}/index: expected at least one part")
    return tuple(found)


def _tied(members: StrictObject) -> tuple[tuple[tuple[str, str], ...], ...]:
    groups = []
    for k, group in enumerate(members.sequence("tied")):
        where = f"{members.where}/tied[{k}]"
        if not isinstance(group, list) or len(group) < 2:
            raise Malformed(f"{where}: expected a list of at least two names")
        names = [pair(one, where=where) for one in group]
        groups.append(tuple((text(item, where=where), text(name, where=where)) for item, name in names))
    return tuple(groups)


def _bases(members: StrictObject) -> tuple[Base, ...]:
    found = []
    for one in _each(members, "bases"):
        base = Base(one.text("uri"), _digest(one))
        one.close()
        if "::" in base.uri:  # [UCF-82]
            raise Unsafe(f"{one.where}: chained URL {base.uri!r}")
        found.append(base)
    return tuple(found)


def _check_files(manifest: Manifest, path: str) -> None:
    files = [*(entry.file.path for entry in manifest.index), *(file.path for file in manifest.fragments)]
    if len(set(files)) != len(files):
        raise Malformed(f"{path}: a record file is named twice")
    if len(manifest.fragments) > MAX_WRITERS:
        raise LimitExceeded(f"{path}: {len(manifest.fragments)} writers, the limit is {MAX_WRITERS}")
