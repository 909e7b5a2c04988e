"""Megatron's models and the families that name maps know: what the one says of itself is so in the other, or is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from tests.convert.test_sources import array, convert, done, rank_file

ARGS = {
    "num_layers": 1,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 4,
    "vocab_size": 13,
    "padded_vocab_size": 16,
    "make_vocab_size_divisible_by": 8,
    "swiglu": True,
    "untie_embeddings_and_output_weights": False,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "rotary_base": 10000,
}
SHAPES = {
    "embedding.word_embeddings.weight": (16, 8),
    "decoder.layers.0.input_layernorm.weight": (8,),
    "decoder.layers.0.self_attention.linear_proj.weight": (8, 16),
    "decoder.layers.0.self_attention.linear_qkv.weight": (32, 8),
    "decoder.layers.0.pre_mlp_layernorm.weight": (8,),
    "decoder.layers.0.mlp.linear_fc1.weight": (24, 8),
    "decoder.layers.0.mlp.linear_fc2.weight": (8, 12),
    "decoder.final_layernorm.weight": (8,),
}


def megatron(folder: Path, **args: object) -> dict[str, torch.Tensor]:
    """A model of one rank, whose head is its embedding: no file holds it then."""
    torch.manual_seed(3)
    model = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    every = {**ARGS, **args, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    if not every["swiglu"]:
        model["decoder.layers.0.mlp.linear_fc1.weight"] = torch.randn(12, 8)
    if every["padded_vocab_size"] != 16:
        model["embedding.word_embeddings.weight"] = torch.randn(int(str(every["padded_vocab_size"])), 8)
    rank_file(folder, {"args": argparse.Namespace(**every), "model": model}, 0)
    return model


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def test_a_head_that_no_file_holds_is_the_embedding(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model = megatron(tmp_path / "m")
    done(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", "--quiet")
    assert config(tmp_path / "hf")["tie_word_embeddings"] is True
    made, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert torch.equal(made.lm_head.weight, model["embedding.word_embeddings.weight"][:13])
    for pp, head in ((1, 0), (2, 1)):
        words = [
            "--set",
            "make_vocab_size_divisible_by=8",
            "--mesh",
            f"pp={pp}",
            "--set",
            f"stages={'1' if pp == 1 else '1,0'}",
        ]
        done(tmp_path / "hf", tmp_path / f"m{pp}", "--to", "megatron", "--names", "llama-hf", *words, "--quiet")
        with torch.serialization.safe_globals([argparse.Namespace]):
            files = [torch.load(path, weights_only=True)["model"] for path in (tmp_path / f"m{pp}").rglob("*.pt")]
        assert sum("output_layer.weight" in one for one in files) == head  # Megatron has none where the embedding is at hand


@pytest.mark.parametrize(
    ("names", "args", "said"),
    [
        ("llama-hf", {"apply_layernorm_1p": True}, "norms that are not stored less 1"),
        ("llama-hf", {"swiglu": False}, "these have a gate"),
        ("gpt2-hf", {}, "neither a gate nor squares"),
        ("gpt2-hf", {"swiglu": False, "squared_relu": True}, "neither a gate nor squares"),
        ("gpt2-hf", {"swiglu": False, "apply_layernorm_1p": True}, "norms that are not stored less 1"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_line_that_says_so(tmp_path, names: str, args, said: str) -> None:
    megatron(tmp_path / "m", **args)
    code, told = convert(tmp_path / "m", tmp_path / "u", "--names", names)
    assert (code, "expected a division without remainder" in told, said in told) == (1, True, True)
    assert not (tmp_path / "u").exists()


def test_rows_that_are_interleaved_become_halves_and_come_back(tmp_path) -> None:
    model = megatron(tmp_path / "m", rotary_interleaved=True)
    done(tmp_path / "m", tmp_path / "u", "--names", "llama-hf", "--quiet")
    fused = model["decoder.layers.0.self_attention.linear_qkv.weight"].numpy().reshape(2, 4, 4, 8)
    parts = {"q": fused[:, :2], "k": fused[:, 2:3], "v": fused[:, 3:]}
    for part, rows in parts.items():
        pairs = rows.reshape(2, -1, 2, 2, 8)
        wanted = rows if part == "v" else pairs.transpose(0, 1, 3, 2, 4)
        found = array(tmp_path / "u", f"model.layers.0.self_attn.{part}_proj.weight")
        assert np.array_equal(found, wanted.reshape(found.shape)), part
    done(tmp_path / "u", tmp_path / "v", "--names", "llama-hf", "--quiet")
    for name, one in model.items():
        assert np.array_equal(
            array(tmp_path / "v", name)[:13] if "word" in name else array(tmp_path / "v", name),
            one[:13] if "word" in name else one,
        )


def test_scaled_frequencies_stand_in_the_config_that_is_made(tmp_path) -> None:
    megatron(tmp_path / "m", use_rope_scaling=True, rope_scaling_factor=4.0)
    done(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", "--quiet")
    assert config(tmp_path / "hf")["rope_parameters"] == {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000,
    }


@pytest.mark.parametrize("args", [{"rotary_percent": 0.5}, {"position_embedding_type": "none"}, {"normalization": "LayerNorm"}])
def test_what_no_model_of_a_family_is_like_is_refused(tmp_path, args: dict[str, object]) -> None:
    megatron(tmp_path / "m", **args)
    code, said = convert(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf")
    ((name, value),) = args.items()
    assert (code, f"{name} is {value!r}, and the models of llama-hf have" in said) == (1, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rms_norm_eps=1e-6", "--set rms_norm_eps=1e-06: the source states norm_epsilon 1e-05"),
        ("rope_theta=500000.0", "--set rope_theta=500000.0: the source states rotary_base 10000"),
        ("vocab=1.5", "--set vocab=1.5: expected a whole number"),
    ],
)
def test_settings_of_a_config_against_those_of_the_source_are_refused(tmp_path, given: str, said: str) -> None:
    megatron(tmp_path / "m")
    code, told = convert(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", "--set", given)
    assert (code, said in told) == (1, True)
    same = ["--set", "rms_norm_eps=1e-5", "--set", "rope_theta=10000.0"]
    done(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", *same, "--quiet")


def test_a_config_that_cannot_be_made_is_refused(tmp_path) -> None:
    megatron(tmp_path / "m")
    words = [tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", "--skip", "embedding.*"]
    code, said = convert(*words)
    assert (code, "config.json says the size of model.embed_tokens.weight, which is not written: give --config" in said) == (
        1,
        True,
    )
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    done(*words, "--config", tmp_path / "c", "--quiet")


@pytest.mark.parametrize(("padded", "at_two", "at_three"), [(16, 16, 24), (40, 40, 42)])
def test_a_padded_size_that_was_chosen_stays(tmp_path, padded: int, at_two: int, at_three: int) -> None:
    """16 is what 8 for each rank makes of 13; 40 somebody chose."""
    model = megatron(tmp_path / "m", padded_vocab_size=padded, num_attention_heads=12, num_query_groups=6, kv_channels=1)
    model |= {"decoder.layers.0.self_attention.linear_proj.weight": torch.randn(8, 12)}
    model |= {"decoder.layers.0.self_attention.linear_qkv.weight": torch.randn(24, 8)}
    path = next((tmp_path / "m").rglob("*.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save({**torch.load(path, weights_only=True), "model": model}, path)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    words = model["embedding.word_embeddings.weight"]
    assert np.array_equal(array(tmp_path / "u", "embedding.word_embeddings.weight"), words.numpy())
    for tp, rows in ((1, padded), (2, at_two), (3, at_three)):
        done(tmp_path / "u", tmp_path / f"m{tp}", "--to", "megatron", "--mesh", f"tp={tp}", "--quiet")
        done(tmp_path / f"m{tp}", tmp_path / f"u{tp}", "--quiet")
        found = array(tmp_path / f"u{tp}", "embedding.word_embeddings.weight")
        assert (len(found), np.array_equal(found[:13], words[:13].numpy())) == (rows, True)
        if tp == 1:
            assert np.array_equal(found, words.numpy())


def test_plain_values_among_states_of_ranks_are_carried(tmp_path) -> None:
    """Steps that are numbers, and states that are None."""
    args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
    for tp in range(2):
        states = {0: {"step": 7, "exp_avg": torch.ones(2) * tp, "buffer": None}}
        optimizer = {"state": states, "param_groups": [{"lr": 0.1, "params": [0]}]}
        rank_file(tmp_path / "m", {"args": args, "model": {"a": torch.ones(2) + tp}, "optimizer": optimizer}, tp)
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh m = pp, tp\norder optimizer = all\nin model\n    a  h/tp  same pp\n")
    done(tmp_path / "m", tmp_path / "u", "--rules", tmp_path / "my.ucl", "--quiet")
    (table,) = ek.open(tmp_path / "u").tables
    assert {one.key: one.values for one in table.fields if one.kind == "scalar"} == {"step": (7,), "buffer": (None,)}
    done(tmp_path / "u", tmp_path / "back", "--to", "megatron", "--quiet")
    for path in (tmp_path / "m").rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            one, other = (
                torch.load(at, weights_only=True)["optimizer"]["state"][0]
                for at in (path, tmp_path / "back" / path.relative_to(tmp_path / "m"))
            )
        assert (one["step"], one["buffer"], one["exp_avg"].tolist()) == (
            other["step"],
            other["buffer"],
            other["exp_avg"].tolist(),
        )


def test_a_distributed_optimizer_is_left_out_by_name(tmp_path) -> None:
    args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    optimizer = {"optimizer": {"param_groups": [{"lr": 0.1, "step": 3}]}, "grad_scaler": {"scale": torch.ones(1)}}
    rank_file(tmp_path / "m", {"args": args, "model": {"a": torch.ones(2)}, "optimizer": optimizer}, 0)
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh m = pp, tp\nin model\n    a  h  same pp, tp\n")
    said = done(tmp_path / "m", tmp_path / "u", "--rules", tmp_path / "my.ucl")
    assert "not carried: optimizer: a distributed optimizer, whose states are shards in files of their own" in said
    assert main(["verify", str(tmp_path / "u"), "--quiet"]) == 0
