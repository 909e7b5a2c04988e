"""A spoiled or forged checkpoint: one typed error that names the thing, found before anything changes where that can be."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt import errors
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.records import FragmentMap, IndexPart, StoredFile, StoredPiece

WEIGHT = "params/model/first.weight/value"


def _chunk(case: Any) -> Path:
    return Path(case.path, WEIGHT, "c.0.0")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flipped(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


FILES = {
    "missing chunk": (WEIGHT + "/c.0.0", Path.unlink, errors.MissingFile),
    "truncated chunk": (WEIGHT + "/c.0.0", _truncated, errors.WrongLength),
    "longer chunk": (WEIGHT + "/c.0.0", _longer, errors.WrongLength),
    "missing fragment file": ("fragments/00000.msgpack", Path.unlink, errors.MissingFile),
    "truncated fragment file": ("fragments/00000.msgpack", _truncated, errors.WrongLength),
    "flipped fragment file": ("fragments/00000.msgpack", _flipped, errors.ChecksumMismatch),
    "missing index": ("index.msgpack", Path.unlink, errors.MissingFile),
    "flipped index": ("index.msgpack", _flipped, errors.ChecksumMismatch),
    "edited manifest": ("checkpoint.json", lambda path: _flipped(path, 60), errors.ChecksumMismatch),
    "truncated manifest": ("checkpoint.json", _truncated, errors.Malformed),
    "empty manifest": ("checkpoint.json", lambda path: path.write_bytes(b""), errors.Malformed),
}


@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_named_and_nothing_changes(case: Any, name: str) -> None:
    path, spoil, cls = FILES[name]
    spoil(case.path / path)
    tried = case.load()
    assert type(tried.error) is cls
    assert path in str(tried.error)
    assert tried.unchanged
    if "chunk" in name:
        assert "array params/model/first.weight/value" in str(tried.error)
        assert {problem.kind for problem in ek.open(case.path).verify().problems} == {cls.kind}


def test_a_flipped_bit_in_a_chunk_is_found_while_loading_and_the_error_says_what_that_means(case: Any, new_job: Any) -> None:
    _flipped(_chunk(case), 17)
    tried = case.load()
    assert type(tried.error) is errors.ChecksumMismatch
    for text in (WEIGHT + "/c.0.0", "block 0", "expected checksum", "(in the fragment map)", "is now undefined"):
        assert text in str(tried.error)
    state = new_job(2)
    with pytest.raises(errors.ChecksumMismatch):
        ek.load(state, case.path)
    assert (state["epoch"], state["extra"]["tokens"]) == (2, 20)  # values are installed only when all was read
    assert state["optimizer"].param_groups[0]["lr"] == 0.03


def test_a_flipped_bit_is_found_by_reads_of_its_array_only(case: Any) -> None:
    _flipped(_chunk(case), 17)
    opened = ek.open(case.path)
    with pytest.raises(errors.ChecksumMismatch, match="first"):
        opened.read(ArrayId("params", "model", "first.weight", "value"))
    with pytest.raises(errors.ChecksumMismatch, match="first"):
        opened.arrays[WEIGHT][...]
    assert opened.read(ArrayId("params", "model", "last.weight", "value")).shape == (3, 6)


def test_a_lost_chunk_is_an_error_in_our_group_never_a_fill(case: Any) -> None:
    _chunk(case).unlink()
    with pytest.raises(errors.MissingFile):
        ek.open(case.path).arrays[WEIGHT][...]


def test_a_byte_flipped_anywhere_is_found_by_verify(case: Any) -> None:
    """In each file of the tree, at several places. [SAVE-6]"""
    places = random.Random(7)
    missed = []
    for file in sorted(path for path in case.path.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for at in {0, len(data) - 1, places.randrange(len(data))}:
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << places.randrange(8))]) + data[at + 1 :])
            try:
                sound = ek.open(case.path).verify().sound
            except errors.CheckpointError:
                sound = False
            if sound:
                missed.append((file, at))
        file.write_bytes(data)
    assert missed == []
    assert ek.open(case.path).verify().sound


def test_verify_finds_what_no_record_names(case: Any) -> None:
    (case.path / "params" / "model" / "first.weight" / "value" / "c.9.9").write_bytes(b"x")
    (case.path / "notes").mkdir()
    (case.path / "link").symlink_to("checkpoint.json")
    found = ek.open(case.path).verify().problems
    assert sorted(problem.message.partition(":")[0] for problem in found) == ["link", "notes", WEIGHT + "/c.9.9"]
    assert {problem.kind for problem in found} == {"stray-file"}


def test_a_lost_document_is_named_by_verify_and_does_not_stop_a_load(case: Any, new_job: Any) -> None:
    (case.path / WEIGHT / "zarr.json").unlink()
    assert [problem.kind for problem in ek.open(case.path).verify().problems] == ["missing-file"]
    ek.load(new_job(2), case.path)


# -- records with right digests and wrong contents ---------------------------------------------------------------------


def _piece_of(fragments: FragmentMap, key: str = WEIGHT) -> tuple[int, StoredPiece]:
    return next((k, piece) for k, piece in enumerate(fragments.pieces) if piece.array == key)


def _with_piece(fragments: FragmentMap, *pieces: StoredPiece) -> FragmentMap:
    """`pieces` in place of those of the weight."""
    others = [piece for piece in fragments.pieces if piece.array != WEIGHT]
    return replace(fragments, pieces=(*others, *pieces))


def _gap(fragments: FragmentMap) -> FragmentMap:
    _, piece = _piece_of(fragments)
    return _with_piece(fragments, replace(piece, box=Box((0, 0), (5, 4)), nbytes=80, row_nbytes=80, row_stride=80))


def _overlap(fragments: FragmentMap) -> FragmentMap:
    _, piece = _piece_of(fragments)
    return _with_piece(
        fragments, piece, replace(piece, box=Box((5, 0), (6, 4)), offset=80, nbytes=16, row_nbytes=16, row_stride=16)
    )


def _nowhere(fragments: FragmentMap) -> FragmentMap:
    return _with_piece(fragments)


def _beyond(fragments: FragmentMap) -> FragmentMap:
    _, piece = _piece_of(fragments)
    return _with_piece(fragments, replace(piece, box=Box((1, 0), (7, 4))))


def _other_rank(fragments: FragmentMap) -> FragmentMap:
    _, piece = _piece_of(fragments)
    return _with_piece(fragments, replace(piece, box=Box((0,), (24,))))


def _other_volume(fragments: FragmentMap) -> FragmentMap:
    _, piece = _piece_of(fragments)
    return _with_piece(fragments, replace(piece, nbytes=64, row_nbytes=64, row_stride=64))


def _traversal(fragments: FragmentMap) -> FragmentMap:
    number = _piece_of(fragments)[1].file
    files = list(fragments.files)
    files[number] = replace(files[number], path="../../../etc/passwd")
    return replace(fragments, files=tuple(files))


def _absolute(fragments: FragmentMap) -> FragmentMap:
    return replace(fragments, files=(StoredFile(0, "/etc/passwd", 1), *fragments.files[1:]))


def _based(fragments: FragmentMap) -> FragmentMap:
    return replace(fragments, files=tuple(replace(file, base=1) for file in fragments.files))


def _unknown_array(fragments: FragmentMap) -> FragmentMap:
    number, piece = _piece_of(fragments)
    pieces = list(fragments.pieces)
    pieces[number] = replace(piece, array="params/model/first.weight/valuf")
    return replace(fragments, pieces=tuple(pieces))


def _other_writer(fragments: FragmentMap) -> FragmentMap:
    return replace(fragments, writer=1)


def _other_attempt(fragments: FragmentMap) -> FragmentMap:
    return replace(fragments, attempt="0" * 16)


FORGED_FRAGMENTS: dict[str, tuple[Callable[[FragmentMap], FragmentMap], tuple[type, ...], str]] = {
    "gap": (_gap, (errors.CoverageGap,), WEIGHT),
    "overlap": (_overlap, (errors.CoverageOverlap,), WEIGHT),
    "stored nowhere": (_nowhere, (errors.CoverageGap, errors.Malformed), WEIGHT),
    "beyond the array": (_beyond, (errors.Malformed, errors.CoverageGap), WEIGHT),
    "other number of axes": (_other_rank, (errors.Malformed,), WEIGHT),
    "fewer bytes than elements": (_other_volume, (errors.Malformed,), WEIGHT),
    "traversal": (_traversal, (errors.Unsafe,), "../../../etc/passwd"),
    "absolute path": (_absolute, (errors.Unsafe,), "/etc/passwd"),
    "another checkpoint's file": (_based, (errors.Malformed,), "base 1"),
    "unknown array": (_unknown_array, (errors.Malformed, errors.CoverageGap), "first.weight/valu"),
    "other writer": (_other_writer, (errors.Malformed,), "of writer 1"),
    "other attempt": (_other_attempt, (errors.Malformed,), "attempt '0000000000000000'"),
}


@pytest.mark.parametrize("name", FORGED_FRAGMENTS)
def test_a_forged_fragment_map_is_refused_before_anything_changes(case: Any, name: str) -> None:
    change, classes, text = FORGED_FRAGMENTS[name]
    case.forge.fragments(change)
    tried = case.load()
    assert type(tried.error) in classes, tried.error
    assert text in str(tried.error)
    assert tried.unchanged
    _require_unsound(case.path)


def _require_unsound(path: Path) -> None:
    """`verify` reports problems, or raises where nothing can be looked at; always as one of ours."""
    try:
        report = ek.open(path).verify()
    except errors.CheckpointError:
        return
    assert not report.sound


def test_overlapping_columns_of_one_chunk_are_refused_by_verify(case: Any) -> None:
    """Boxes that are disjoint, bytes that are not: only strided pieces can do that."""

    def change(fragments: FragmentMap) -> FragmentMap:
        _, piece = _piece_of(fragments)
        left = replace(piece, box=Box((0, 0), (6, 2)), nbytes=48, row_nbytes=8, row_stride=16)
        return _with_piece(fragments, left, replace(left, box=Box((0, 2), (6, 4))))

    case.forge.fragments(change)
    _require_unsound(case.path)


# -- index and manifest ------------------------------------------------------------------------------------------------


def _each_array(change: Callable[[Any], Any]) -> Callable[[IndexPart], IndexPart]:
    def changed(part: IndexPart) -> IndexPart:
        return replace(part, arrays=tuple(change(record) if record.key == WEIGHT else record for record in part.arrays))

    return changed


def _shape(*shape: int) -> Callable[[IndexPart], IndexPart]:
    def change(record: Any) -> Any:
        chunk = tuple(min(extent, 1024) for extent in shape)
        return replace(record, spec=ArraySpec(record.spec.id, shape, record.spec.dtype), chunk_shape=chunk)

    return _each_array(change)


FORGED_INDEX: dict[str, tuple[Callable[[IndexPart], IndexPart], tuple[type, ...], str]] = {
    "other shape": (_shape(8, 4), (errors.Malformed,), WEIGHT),
    "absurd shape": (_shape(1 << 40, 1 << 40), (errors.LimitExceeded,), WEIGHT),
    "huge shape": (_shape(1 << 22, 1 << 10), (errors.Malformed,), WEIGHT),
    "unknown writer": (_each_array(lambda r: replace(r, writers=(7,))), (errors.Malformed,), WEIGHT),
    "no writer": (_each_array(lambda r: replace(r, writers=())), (errors.Malformed,), WEIGHT),
    "unknown layout": (_each_array(lambda r: replace(r, layout=3)), (errors.Malformed,), "layout 3"),
}


@pytest.mark.parametrize("name", FORGED_INDEX)
def test_a_forged_index_is_refused_before_anything_changes(case: Any, name: str) -> None:
    change, classes, text = FORGED_INDEX[name]
    case.forge.index(change)
    tried = case.load()
    assert type(tried.error) in classes, tried.error
    assert text in str(tried.error)
    assert tried.unchanged
    _require_unsound(case.path)


def test_a_key_that_leads_out_of_the_tree_is_refused(case: Any) -> None:
    data = (case.path / "index.msgpack").read_bytes()
    keys = [record.key for record in ek.open(case.path).records.values()]
    forged = data.replace(b"params/model/first.weight", b"params/model/../../../etc")
    assert forged != data
    case.forge.index_bytes(forged, keys[0], keys[-1])
    tried = case.load()
    assert type(tried.error) is errors.Unsafe
    assert "params/model/../../../etc" in str(tried.error)
    assert tried.unchanged


def test_a_huge_shape_that_nobody_stored_costs_no_memory(case: Any) -> None:
    """[SAVE-10]"""
    case.forge.index(_shape(1 << 28, 1 << 10))  # 1 TiB
    tracemalloc.start()
    try:
        with pytest.raises(errors.CheckpointError, match=r"first\.weight"):
            ek.open(case.path).read(ArrayId("params", "model", "first.weight", "value"))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_an_array_that_stands_twice_under_two_keys_is_refused(case: Any) -> None:
    def change(part: IndexPart) -> IndexPart:
        record = next(record for record in part.arrays if record.key == WEIGHT)
        twin = replace(record, key="params/model/first.weighu/value")
        return replace(part, arrays=tuple(sorted((*part.arrays, twin), key=lambda one: one.key)))

    case.forge.index(change)
    assert type(case.load().error) is errors.Malformed
    _require_unsound(case.path)


def test_versions_and_features_that_this_release_does_not_know_are_named(case: Any) -> None:
    case.forge.text(b'"version":1', b'"version":2')
    tried = case.load()
    assert type(tried.error) is errors.Unsupported
    assert tried.unchanged
    assert "version 2" in str(tried.error)
    assert "version 1" in str(tried.error)


def test_required_features_that_this_release_does_not_know_are_named(case: Any) -> None:
    case.forge.text(b'"requires":[]', b'"requires":["holograms"]')
    tried = case.load()
    assert type(tried.error) is errors.Unsupported
    assert tried.unchanged
    assert "holograms" in str(tried.error)


FRAGMENTS = b'"path":"fragments/00000.msgpack"'
FORGED_MANIFEST: dict[str, tuple[bytes, bytes, type, str]] = {
    "traversal": (FRAGMENTS, b'"path":"../other/00000.msgpack"', errors.Unsafe, "../other"),
    "absolute": (FRAGMENTS, b'"path":"/etc/passwd"', errors.Unsafe, "/etc/passwd"),
    "of another checkpoint": (FRAGMENTS, b'"path":"fragments/00001.msgpack"', errors.MissingFile, "fragments/00001.msgpack"),
    "chained base": (
        b'"bases":[]',
        b'"bases":[{"uri":"a::file:///b","digest":"' + b"0" * 32 + b'"}]',
        errors.Unsafe,
        "a::file",
    ),
    "layout of no mesh": (b'"layouts":[]', b'"layouts":[{"mesh":2,"placements":["R"]}]', errors.Malformed, "mesh"),
    "no ranks": (b'"world_size":1', b'"world_size":0', errors.Malformed, "world_size"),
    "unknown member": (b'"world_size":1', b'"world_size":1,"worlds":2', errors.Malformed, "worlds"),
}


@pytest.mark.parametrize("name", FORGED_MANIFEST)
def test_a_forged_manifest_is_refused_before_anything_changes(case: Any, name: str) -> None:
    old, new, cls, text = FORGED_MANIFEST[name]
    case.forge.text(old, new)
    tried = case.load()
    assert type(tried.error) is cls, tried.error
    assert text in str(tried.error)
    assert tried.unchanged
    _require_unsound(case.path)


def test_a_job_may_have_had_more_ranks_than_the_checkpoint_has_writers(case: Any, new_job: Any) -> None:
    """As a converter leaves it; nothing of it depends on the number of writers."""
    case.forge.text(b'"world_size":1', b'"world_size":9')
    state = new_job(2)
    ek.load(state, case.path)
    assert state["epoch"] == 1


def test_a_link_in_place_of_a_chunk_is_not_followed(case: Any, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    _chunk(case).rename(copy)
    _chunk(case).symlink_to(copy)
    tried = case.load()
    assert type(tried.error) is errors.Unsafe
    assert tried.unchanged
    _require_unsound(case.path)


ONE_ARRAY = ("beyond the array", "other number of axes", "fewer bytes than elements", "unknown array")


@pytest.mark.parametrize("name", ONE_ARRAY)
def test_pieces_that_disagree_make_only_their_own_array_unreadable(case: Any, name: str) -> None:
    """[FRAG-36]"""
    wanted = {identity: ek.open(case.path).read(identity).tobytes() for identity in ek.open(case.path).records}
    case.forge.fragments(FORGED_FRAGMENTS[name][0])
    checkpoint = ek.open(case.path)
    (spoilt,) = (identity for identity in wanted if str(identity).endswith("first.weight/value"))
    with pytest.raises((errors.Malformed, errors.CoverageGap), match=re.escape(WEIGHT)):
        checkpoint.read(spoilt)
    for identity, data in wanted.items():
        assert identity == spoilt or checkpoint.read(identity).tobytes() == data
    state: dict[str, Any] = {"epoch": 0, "extra": {"mean": torch.zeros(5), "tokens": 0, "names": []}}
    assert ek.load(state, case.path, strict="missing").step == 5
    assert (state["epoch"], state["extra"]["tokens"]) == (1, 10)
    _require_unsound(case.path)


# -- packs -------------------------------------------------------------------------------------------------------------


def _in_pack(**changed: Any) -> Callable[[FragmentMap], FragmentMap]:
    """The last piece, which is the second one, with other members."""
    return lambda map_: replace(map_, pieces=(*map_.pieces[:-1], replace(map_.pieces[-1], **changed)))


def _called(name: str) -> Callable[[FragmentMap], FragmentMap]:
    """The pack by another name, in which `{}` stands for the attempt's."""
    return lambda map_: replace(map_, files=(replace(map_.files[0], path=name.format(map_.attempt)),))


FORGED_PACKS: dict[str, tuple[Callable[[FragmentMap], FragmentMap], type, tuple[str, ...]]] = {
    "beyond the end": (_in_pack(offset=4000), errors.Malformed, ("'extra/b'", "280 bytes from 4000 on", ".bin' of 4096")),
    "far beyond the end": (_in_pack(offset=1 << 50), errors.Malformed, ("'extra/b'", f"from {1 << 50} on")),
    "on another piece": (_in_pack(offset=64), errors.ChecksumMismatch, ("extra/b", "file offset 64", ".bin")),
    "rows that overlap": (_in_pack(row_nbytes=40, row_stride=8), errors.Malformed, ("'extra/b'", "rows overlap")),
    "of another attempt": (_called("packs/0000000000000000-00000.bin"), errors.Malformed, ("pack of another attempt",)),
    "of another writer": (_called("packs/{}-00001.bin"), errors.Malformed, ("this writer's pack", "-00001.bin")),
    "in capitals": (lambda m: _called(f"packs/{m.attempt.upper()}A-00000.bin")(m), errors.Malformed, ("this writer's pack",)),
    "above the folder": (_called("packs/../../x.bin"), errors.Unsafe, ("fragments/00000.msgpack", "'packs/../../x.bin'")),
    "a file beside": (_called("checkpoint.json"), errors.Malformed, ("checkpoint.json", "this writer's pack")),
}


@pytest.mark.parametrize("name", FORGED_PACKS)
def test_a_forged_place_in_a_pack_is_named(case: Any, tmp_path: Path, name: str) -> None:
    """By load, by `ek.open` and by verify. [FRAG-15, FRAG-34, FRAG-64, FRAG-65]"""
    change, cls, texts = FORGED_PACKS[name]
    ek.save({"a": torch.arange(100.0), "b": torch.arange(70.0)}, tmp_path / "packed", placement="packed")
    type(case.forge)(tmp_path / "packed").fragments(change)
    live = {"a": torch.zeros(100), "b": torch.zeros(70)}
    for act in (lambda: ek.load(live, tmp_path / "packed"), lambda: ek.open(tmp_path / "packed").arrays["extra/b"][...]):
        with pytest.raises(cls) as caught:
            act()
        assert all(text in str(caught.value) for text in texts), caught.value
    found = ek.open(tmp_path / "packed").verify().problems
    assert any(problem.kind == cls.kind and all(text in problem.message for text in texts) for problem in found)
    assert name != "on another piece" or "coverage-overlap" in {problem.kind for problem in found}
