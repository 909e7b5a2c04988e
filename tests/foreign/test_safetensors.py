"""safetensors files and indexes that are wrong; ties and constants of sound ones. [FOR-40..44]"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from elastickpt.errors import (
    CheckpointError,
    LimitExceeded,
    Malformed,
    MissingFile,
    Refused,
    StructureConflict,
    Unsafe,
    Unsupported,
)
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint, TiedName


def read(path: Path) -> ForeignCheckpoint:
    return read_foreign(find_source(open_folder(path)))


def file_of(header: object, nbytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def tensor(start: int, stop: int, dtype: str = "F32", shape: tuple[int, ...] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape or ((stop - start) // 4,)), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Malformed),
        (b"\x01", Malformed),
        ((1 << 40).to_bytes(8, "little") + b"{}", LimitExceeded),
        (b"\xff\xff\0\0\0\0\0\0{}", Malformed),
        (file_of(b"[]", 0), Malformed),
        (file_of(b"{", 0), Malformed),
        (file_of(b'{"a": 1, "a": 2}', 0), Malformed),
        (file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, 12), Malformed),
        (file_of({"a": tensor(0, 8), "b": tensor(0, 8)}, 8), Malformed),
        (file_of({"a": tensor(0, 8), "b": tensor(12, 16)}, 16), Malformed),
        (file_of({"a": tensor(4, 8)}, 8), Malformed),
        (file_of({"a": tensor(0, 8)}, 7), Malformed),
        (file_of({"a": tensor(0, 8)}, 9), Malformed),
        (file_of({"a": tensor(8, 0)}, 8), Malformed),
        (file_of({"a": tensor(0, 8, shape=(3,))}, 8), Malformed),
        (file_of({"a": tensor(0, 8, shape=(-1, -2))}, 8), Malformed),
        (file_of({"a": tensor(0, 8, "F4", (16,))}, 8), Unsupported),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}, 4), Malformed),
        (file_of({"a": 3}, 0), Malformed),
        (file_of({"__metadata__": {"a": 1}}, 0), Malformed),
        (file_of({"a": tensor(0, 0, shape=(1 << 60, 0))}, 0), LimitExceeded),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, data, error) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "a.safetensors")
    assert type(caught.value) is error
    assert "a.safetensors" in str(caught.value)


def two_files(folder: Path, places: object) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("places", "error", "says"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, MissingFile, "three"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, Unsafe, "not inside"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, Unsafe, "not inside"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, StructureConflict, "'b'"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, StructureConflict, "'c'"),
        ({"b": "two.safetensors", "a": 3}, Malformed, "weight_map"),
        ([], Malformed, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, places, error, says) -> None:
    two_files(tmp_path, places)
    with pytest.raises(error, match=says):
        read(tmp_path)


def test_a_file_that_holds_more_than_the_index_says_is_refused(tmp_path) -> None:
    two_files(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"b": torch.ones(3), "more": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(StructureConflict, match="'more'"):
        read(tmp_path)


def test_files_without_an_index_complete_one_another(tmp_path) -> None:
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(1)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(MissingFile, match="00003-of-00003"):
        read(tmp_path)
    save_file({"t3": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    assert sorted(one.name for one in read(tmp_path).wholes) == ["t1", "t2", "t3"]
    save_file({"t1": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(StructureConflict, match="'t1'"):
        read(tmp_path)


def test_two_indexes_are_refused(tmp_path) -> None:
    two_files(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(Refused, match="fp16"):
        read(tmp_path)


def test_ties_that_the_library_wrote_are_known(tmp_path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    found = read(tmp_path)
    assert len(found.wholes) == 1
    assert found.tied in (
        (TiedName("model", "head.weight", "embed.weight"),),
        (TiedName("model", "embed.weight", "head.weight"),),
    )


def test_what_a_trainer_left_beside_is_named_and_makes_no_second_format(tmp_path) -> None:
    """[FOR-81]"""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save([1], tmp_path / "training_args.bin")
    found = read(tmp_path)
    assert (found.format, [one.name for one in found.not_carried]) == ("safetensors", ["optimizer.pt", "training_args.bin"])


def test_an_empty_file_and_a_scalar_are_sound(tmp_path) -> None:
    save_file({"s": torch.tensor(3.0), "e": torch.ones(0, 4)}, tmp_path / "model.safetensors")
    assert {one.name: one.shape for one in read(tmp_path).wholes} == {"s": (), "e": (0, 4)}
