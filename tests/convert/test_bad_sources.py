"""Sources that are not what they say: typed errors with their exit codes, nothing at OUT. [CLI-60, CLI-64, LANG-14, LANG-24]"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import elastickpt as ek
from elastickpt.cli.main import main


def rank(folder: Path, name: str, *, step: int = 4, tp: int = 2, **more: object) -> None:
    place = folder / "iter_0000004" / name
    place.mkdir(parents=True)
    args = argparse.Namespace(tensor_model_parallel_size=tp, pipeline_model_parallel_size=1)
    torch.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": step, "model": {"a": torch.ones(2)}, **more},
        place / "model_optim_rng.pt",
    )


def megatron(folder: Path) -> Path:
    for tp in range(2):
        rank(folder, f"mp_rank_{tp:02d}")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    return folder / "iter_0000004"


def doubled(folder: Path) -> None:
    rank(folder, "mp_rank_00_000") if megatron(folder) else None


def other_step(folder: Path) -> None:
    shutil.rmtree(megatron(folder) / "mp_rank_01")
    rank(folder, "mp_rank_01", step=5)


def other_world(folder: Path) -> None:
    shutil.rmtree(megatron(folder) / "mp_rank_01")
    rank(folder, "mp_rank_01", tp=4)


def without_a_rank(folder: Path) -> None:
    megatron(folder)
    rank(folder, "mp_rank_03")


def foreign_class(folder: Path) -> None:
    shutil.rmtree(megatron(folder) / "mp_rank_01")
    rank(folder, "mp_rank_01", run=shutil.rmtree)


def truncated(folder: Path) -> None:
    path = megatron(folder) / "mp_rank_01" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-300])


def indexed(folder: Path, place: str) -> None:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": place}}))


def overlapping(folder: Path) -> None:
    folder.mkdir()
    entry = {"dtype": "F32", "shape": [2]}
    header = json.dumps({"a": {**entry, "data_offsets": [0, 8]}, "b": {**entry, "data_offsets": [4, 12]}}).encode()
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


def two_formats(folder: Path) -> None:
    indexed(folder, "a.safetensors")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def old_file(folder: Path) -> None:
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, folder / "a.pt", _use_new_zipfile_serialization=False)


def deepspeed(folder: Path) -> None:
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "code", "kind"),
    [
        (doubled, 1, "structure-conflict"),
        (other_step, 1, "structure-conflict"),
        (other_world, 1, "structure-conflict"),
        (without_a_rank, 3, "missing-file"),
        (foreign_class, 5, "unsafe"),
        (truncated, 3, "malformed"),
        (lambda folder: indexed(folder, "c.safetensors"), 3, "missing-file"),
        (lambda folder: indexed(folder, "../c.safetensors"), 5, "unsafe"),
        (overlapping, 3, "malformed"),
        (two_formats, 1, "refused"),
        (old_file, 4, "unsupported"),
        (deepspeed, 4, "unsupported"),
        (lambda folder: folder.mkdir(), 1, "not-a-checkpoint"),
    ],
)
def test_bad_sources_are_refused_with_their_codes(tmp_path, make: Callable[[Path], None], code: int, kind: str) -> None:
    make(tmp_path / "source")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--json"]) == code
    assert json.loads(said.getvalue())["error"]["kind"] == kind
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def module_of(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, one in weights.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, torch.nn.Parameter(one))
    return root


def test_a_checkpoint_that_ek_saved_needs_names_for_megatron_and_is_told_which(tmp_path, capsys) -> None:
    shapes = {"input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,), "mlp.down_proj.weight": (8, 12)}
    shapes |= {f"self_attn.{k}_proj.weight": (8, 8) for k in "qkvo"} | {f"mlp.{k}_proj.weight": (12, 8) for k in ("gate", "up")}
    weights = {f"model.layers.0.{name}": torch.ones(shape) for name, shape in shapes.items()}
    weights |= {
        "model.embed_tokens.weight": torch.ones(10, 8),
        "lm_head.weight": torch.ones(10, 8),
        "model.norm.weight": torch.ones(8),
    }
    ek.save({"model": module_of(weights)}, tmp_path / "saved")
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "m"), "--to", "megatron"]) == 1
    said = capsys.readouterr().err
    assert "--names llama-hf" in said
    assert "--rules FILE" in said
    assert not (tmp_path / "m").exists()


def test_a_true_size_that_the_program_does_not_have_is_refused(tmp_path, capsys) -> None:
    """Both say 16 rows with padding; one says 13 true ones, the other 12."""
    for tp in range(2):
        rank(tmp_path / "m", f"mp_rank_{tp:02d}", model={"w": torch.arange(8.0) + 8 * tp})
    text = "ucl 1\nmesh m = pp, tp\nlet v = {v}\nin model\n    w  pad(v, 8*|tp|)/tp  same pp\n"
    for v in (12, 13):
        (tmp_path / f"{v}.ucl").write_text(text.format(v=v))
    words = [
        "convert",
        str(tmp_path / "m" / "iter_0000004"),
        str(tmp_path / "u"),
        "--rules",
        str(tmp_path / "13.ucl"),
        "--quiet",
    ]
    assert main(words) == 0
    out = ["convert", str(tmp_path / "u"), str(tmp_path / "o"), "--to", "megatron", "--mesh", "tp=2", "--rules"]
    assert main([*out, str(tmp_path / "12.ucl")]) == 1
    said = capsys.readouterr().err
    assert "12.ucl:5:5: array 'w': expected shape (12,) by the program, found (13,)" in said
    assert main([*out, str(tmp_path / "13.ucl"), "--quiet"]) == 0
