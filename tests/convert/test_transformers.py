"""Models of transformers made here: tied heads, Conv1D, experts; there and back, with the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main

transformers = pytest.importorskip("transformers")


def convert(*words: object) -> int:
    return main(["convert", *map(str, words), "--quiet"])


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def saved(folder: Path, config: object) -> torch.Tensor:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for one in model.parameters():
            one.normal_(std=0.2)
    model.save_pretrained(folder)
    return logits(folder)


def test_gpt2_with_a_tied_head_becomes_megatron_and_comes_back(tmp_path) -> None:
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=4, n_head=4, n_inner=40)
    wanted = saved(tmp_path / "hf", config)
    words = ["--to", "megatron", "--names", "gpt2-hf", "--mesh", "tp=2,pp=2", "--set", "make_vocab_size_divisible_by=4"]
    assert convert(tmp_path / "hf", tmp_path / "m", *words) == 0
    assert convert(tmp_path / "m", tmp_path / "u") == 0
    names = {one.name for one in ek.open(tmp_path / "u").records}
    assert "decoder.layers.3.self_attention.linear_qkv.bias" in names
    assert "output_layer.weight" not in names
    assert convert(tmp_path / "u", tmp_path / "back", "--to", "hf", "--names", "gpt2-hf") == 0  # a config of its own
    assert torch.equal(logits(tmp_path / "back"), wanted)
    assert main(["diff", str(tmp_path / "hf"), str(tmp_path / "back"), "--quiet"]) == 0


def test_llama_with_a_tied_head_and_grouped_heads(tmp_path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    wanted = saved(tmp_path / "hf", config)
    assert convert(tmp_path / "hf", tmp_path / "m", "--to", "megatron", "--names", "llama-hf", "--mesh", "tp=2") == 0
    assert convert(tmp_path / "m", tmp_path / "back", "--to", "hf", "--names", "llama-hf", "--config", tmp_path / "hf") == 0
    assert torch.equal(logits(tmp_path / "back"), wanted)


def test_experts_stay_what_they_are(tmp_path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    wanted = saved(tmp_path / "hf", config)
    assert convert(tmp_path / "hf", tmp_path / "u") == 0
    assert convert(tmp_path / "u", tmp_path / "back", "--to", "hf", "--config", tmp_path / "hf") == 0
    assert torch.equal(logits(tmp_path / "back"), wanted)
