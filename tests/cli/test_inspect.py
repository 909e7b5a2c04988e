"""What `inspect` says of real checkpoints, for people and for programs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.elastic.history import History
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.records import FileDigest

Answer = Callable[..., tuple[int, dict[str, object]]]
Captured = pytest.CaptureFixture[str]


def shown(capsys: Captured, *argv: object) -> list[str]:
    """The lines of a command that ends well and has nothing to say on stderr. [CLI-1]"""
    assert main([*map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def row(lines: list[str], *starts: str) -> list[str]:
    """The words of the one line whose words after its tree guides begin so."""
    found = [line.lstrip("│├└─ ").split() for line in lines]
    (only,) = [words for words in found if words[: len(starts)] == list(starts)]
    return only


def test_the_json_lists_every_array_as_the_library_reads_it(four_ranks: Path, json_of: Answer) -> None:
    """[CLI-21]"""
    code, answer = json_of("inspect", four_ranks)
    checkpoint = ek.open(four_ranks)
    assert (code, answer["step"], answer["world_size"]) == (0, 7, 4)
    assert [array["key"] for array in answer["arrays"]] == sorted(record.key for record in checkpoint.records.values())
    for array, (identity, record) in zip(answer["arrays"], checkpoint.records.items(), strict=True):
        assert (array["item"], array["name"], array["state"]) == (identity.item, identity.name, identity.state)
        assert tuple(array["writers"]) == record.writers
        files = list((four_ranks / array["key"]).glob("c*"))
        assert array["chunks"] == len(files)
        assert checkpoint.read(identity).nbytes == array["nbytes"]
        assert list(checkpoint.read(identity).shape) == array["shape"]
    assert answer["total"]["nbytes"] == sum(array["nbytes"] for array in answer["arrays"]) == 11008
    assert answer["total"]["parameters"] == len(checkpoint.parameters)
    down = next(array for array in answer["arrays"] if array["name"] == "blocks.0.down.weight")
    assert (down["mesh"], down["placements"], down["chunk_shape"]) == ("dp.tp", ["S(0)", "S(1)"], [10, 7])


def test_settings_stand_once_for_each_distinct_group(four_ranks: Path, json_of: Answer, capsys: Captured) -> None:
    _, answer = json_of("inspect", four_ranks)
    (optimizer,) = answer["optimizers"]
    groups = [({s["key"]: s["value"] for s in group["settings"]}, len(group["parameters"])) for group in optimizer["groups"]]
    assert groups == [({"lr": 1e-3, "weight_decay": 0.1}, 8), ({"lr": 3e-4, "weight_decay": 0.0}, 5)]
    shared = {setting["key"]: setting["value"] for setting in optimizer["shared"]}
    assert shared["betas"] == {"$tuple": [0.9, 0.999]}
    assert {"lr", "weight_decay"}.isdisjoint(shared)
    lines = shown(capsys, "inspect", four_ranks)
    assert row(lines, "8")[1:3] == ["0.001", "0.1"]
    assert row(lines, "5")[1:3] == ["0.0003", "0.0"]


def test_the_header_tells_the_checkpoint_as_a_whole(four_ranks: Path, capsys: Captured) -> None:
    lines = shown(capsys, "inspect", four_ranks)
    assert lines[0] == str(four_ranks)
    assert row(lines, "step") == ["step", "7"]
    assert row(lines, "world", "size") == ["world", "size", "4", "ranks"]
    assert row(lines, "mesh", "dp.tp")[2:] == ["dp=2", "×", "tp=2", "over", "ranks", "0-3"]
    assert row(lines, "bytes") == ["bytes", "11,008", "(10.8", "KiB)"]
    assert "model (module FSDPModel)" in " ".join(row(lines, "items"))


def test_a_state_that_losses_made_approximate_says_since_when(tmp_path: Path, capsys: Captured) -> None:
    """[REC-60]"""
    mended = [{"step": step, "stage": 1, "rung": "checkfree", "generation": 2} for step in (3, 1007)]
    for name, lineage in (("exact", []), ("rebuilt", mended)):
        state = {"model": torch.nn.Linear(2, 2), "elastic": History(lineage=lineage)}
        ek.save(state, tmp_path / name, step=1010)
        said = [line for line in shown(capsys, "inspect", tmp_path / name) if "approximate" in line]
        assert [line.split()[-4:] for line in said] == [["approximate", "since", "step", "3"]] * bool(lineage)


def test_equal_numbered_siblings_are_one_in_the_tree_and_apart_with_all(four_ranks: Path, capsys: Captured) -> None:
    """[CLI-23]"""
    lines = shown(capsys, "inspect", four_ranks)
    assert row(lines, "blocks.{0..1}")
    both = row(lines, "down.weight")
    assert both[1:6] == ["10×14", "float32", "value", "exp_avg", "exp_avg_sq"]
    assert both[6:8] == ["3.3", "KiB"]  # 2 blocks, 3 states, 560 bytes each
    assert both[8:] == ["2", "of", "10×7", "0-3", "dp:S(0)", "tp:S(1)"]
    apart = shown(capsys, "inspect", four_ranks, "--all")
    assert sum("down.weight" in line for line in apart[:-5]) == 2
    assert not any("{" in line for line in apart)


def test_siblings_of_another_shape_stand_apart_and_numbers_are_ordered_by_value(odd: Path, capsys: Captured) -> None:
    """[CLI-23]"""
    lines = shown(capsys, "inspect", odd)
    labels = [line for line in lines if "{0..11}" in line or "── 12" in line]
    assert len(labels) == 2
    assert "{0..11}" in labels[0]
    apart = [line.split()[1] for line in shown(capsys, "inspect", odd, "--all") if line.startswith(("├── ", "└── "))]
    assert apart[:13] == [str(k) for k in range(13)]


def test_the_table_has_a_row_for_every_array(four_ranks: Path, odd: Path, capsys: Captured) -> None:
    for path in (four_ranks, odd):
        lines = shown(capsys, "inspect", path, "--format", "table")
        start = next(k for k, line in enumerate(lines) if line.startswith("array "))
        stop = lines.index("", start)
        assert stop - start - 1 == len(ek.open(path).records)


def test_extra_arrays_scalars_and_empty_ones_are_listed(odd: Path, json_of: Answer, capsys: Captured) -> None:
    _, answer = json_of("inspect", odd, "--name", "stats/*")
    found = {array["name"]: (array["section"], array["state"], array["shape"]) for array in answer["arrays"]}
    assert found == {
        "mean": ("extra", None, [4]),
        "empty": ("extra", None, [0, 4]),
        "deep~1er/名前": ("extra", None, [2, 2]),
    }
    assert row(shown(capsys, "inspect", odd), "empty")[1:3] == ["0×4", "float32"]


def test_a_glob_chooses_by_name_with_or_without_item_and_state(four_ranks: Path, json_of: Answer, capsys: Captured) -> None:
    """[CLI-22]"""

    def chosen(*globs: str) -> set[str]:
        _, answer = json_of("inspect", four_ranks, *(word for glob in globs for word in ("--name", glob)))
        assert answer["total"]["arrays"] == 46
        return {f"{array['item']}/{array['name']}/{array['state']}" for array in answer["arrays"]}

    head = {f"model/head.bias/{state}" for state in ("value", "exp_avg", "exp_avg_sq")}
    assert chosen("head.bias") == chosen("model/head.bias") == chosen("*d.bias") == head
    assert chosen("head.bias/value") == {"model/head.bias/value"}
    assert chosen("model/*.bias/exp_avg", "frozen") == {
        *(f"model/{name}.bias/exp_avg" for name in ("head", "blocks.0.norm", "blocks.0.up", "blocks.1.norm", "blocks.1.up")),
        "model/frozen/value",
    }
    assert chosen("head") == chosen("HEAD.bias") == set()
    assert main(["inspect", str(four_ranks), "--name", "nothing"]) == 0
    assert capsys.readouterr().err == "note: no array matches nothing\n"


def test_values_are_shown_on_request_and_cut_to_what_people_read(odd: Path, json_of: Answer, capsys: Captured) -> None:
    """[CLI-5]"""
    lines = shown(capsys, "inspect", odd, "--values")
    assert row(lines, "/loader/note") == ["/loader/note", r"'a\x1b[31mred\u202e'"]
    assert row(lines, "/loader/of") == ["/loader/of", "(1,", "2.5,", "None)"]
    assert row(lines, "/seen/blob") == ["/seen/blob", "bytes[300]"]
    assert not any("/loader/" in line for line in shown(capsys, "inspect", odd))
    _, answer = json_of("inspect", odd, "--values")
    assert answer["values"]["/loader/note"] == "a\x1b[31mred\u202e"
    (own,) = answer["per_rank"]
    assert own["values"]["/seen/position"] == 17


def test_writers_and_pieces_account_for_every_byte(four_ranks: Path, json_of: Answer, capsys: Captured) -> None:
    _, answer = json_of("inspect", four_ranks, "--writers", "--fragments")
    writers, pieces = answer["writers"], answer["fragments"]
    assert [writer["writer"] for writer in writers] == [0, 1, 2, 3]
    assert sum(writer["nbytes"] for writer in writers) == sum(piece["nbytes"] for piece in pieces) == 11008
    assert sum(writer["pieces"] for writer in writers) == len(pieces)
    assert {piece["key"] for piece in pieces} == {array["key"] for array in answer["arrays"]}
    for piece in pieces:
        assert piece["offset"] + piece["nbytes"] <= (four_ranks / piece["file"]).stat().st_size
    lines = shown(capsys, "inspect", four_ranks, "--writers", "--fragments", "--name", "blocks.1.down.weight/value")
    assert row(lines, "3", "27")[-1] == "fragments/00003.msgpack"
    assert row(lines, "params/model/blocks.1.down.weight/value", "3")[2:5] == ["5:10,7:14", "140", "140"]


def test_manifest_and_index_are_enough(damaged: Path, json_of: Answer) -> None:
    """[CLI-20]"""
    shutil.rmtree(damaged / "params")
    shutil.rmtree(damaged / "fragments")
    code, answer = json_of("inspect", damaged)
    assert (code, len(answer["arrays"])) == (0, 46)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_damage_leaves_nothing_but_the_error(damaged: Path, options: tuple[str, ...], capsys: Captured) -> None:
    """[CLI-3, CLI-7, CLI-24]"""
    path = damaged / "fragments/00001.msgpack"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(damaged), "--writers", *options]) == 3
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {damaged}: fragments/00001.msgpack: ")
    assert err.endswith("[wrong-length]\n")
    assert out.startswith('{"schema": "ckpt-convert.inspect/1"') if options else out == ""


def test_an_error_in_json_follows_the_schema(damaged: Path, json_of: Answer) -> None:
    """[CLI-7]"""
    (damaged / "index.msgpack").write_bytes(b"")
    code, answer = json_of("inspect", damaged)
    assert (code, answer["error"]["kind"]) == (3, "wrong-length")


def test_a_layout_that_the_manifest_lacks_is_damage_and_no_crash(damaged: Path, capsys: Captured) -> None:
    index, manifest = damaged / "index.msgpack", damaged / "checkpoint.json"
    part = decode_index(index.read_bytes(), path="index.msgpack")
    data = encode_index(replace(part, arrays=(replace(part.arrays[0], layout=77), *part.arrays[1:])))
    index.write_bytes(data)
    said = decode_manifest(manifest.read_bytes(), path="checkpoint.json")
    entry = replace(said.index[0], file=FileDigest("index.msgpack", len(data), file_digest(data)))
    manifest.write_bytes(encode_manifest(replace(said, index=(entry,))))
    assert main(["inspect", str(damaged)]) == 3
    assert capsys.readouterr().err.endswith("layout 77, the manifest has 3 [malformed]\n")
