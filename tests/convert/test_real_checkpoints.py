"""Conversions of real checkpoints: bit for bit their truth, and back out through the libraries that read them.

[CLI-62, CLI-63, CLI-65, CLI-70, CLI-71]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.format.arrays import ArrayId


def convert(*words: object) -> int:
    return main(["convert", *map(str, words), "--quiet"])


def step_rows(checkpoint: ek.Checkpoint) -> dict[str, Any]:
    (table,) = checkpoint.tables
    (field,) = [one for one in table.fields if (one.kind, one.key) == ("scalar", "step")]
    values = [np.frombuffer(value.data, value.dtype).reshape(value.shape) for value in field.values]
    return {name: values[code] for (_, name), code in zip(table.parameters, field.which, strict=True) if code >= 0}


def assert_truth(checkpoint: ek.Checkpoint, truth: dict[str, Any], *, prefix: str = "") -> None:
    """Every array of the truth, true rows of padded ones, and steps."""
    tied = {name: group[0][1] for group in checkpoint.manifest.tied for _, name in group[1:]}
    for key, wanted in truth.items():
        name, state = key.split("|")
        name = tied.get(prefix + name, prefix + name)
        if state == "step":
            assert step_rows(checkpoint)[name].tobytes() == wanted.tobytes(), key
            continue
        record = checkpoint.records[ArrayId("params", "model", name, state)]
        found = checkpoint.read(record.spec.id)
        true = dict(record.attributes).get("true_shape")
        if true is not None:
            assert list(wanted.shape) == true
            found = found[: true[0]]
        assert found.tobytes() == wanted.tobytes(), key


def test_megatron_is_its_truth_and_keeps_its_padding(megatron_case, tmp_path) -> None:
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "u") == 0
    checkpoint = ek.open(tmp_path / "u")
    assert checkpoint.verify().problems == ()
    assert checkpoint.step == 3
    assert_truth(checkpoint, megatron_case.truth)
    record = checkpoint.records[ArrayId("params", "model", "output_layer.weight", "exp_avg")]
    assert record.spec.shape == (128, 32)
    assert checkpoint.read(record.spec.id)[101:].any()  # rows of padding are live numbers, and stay
    assert "mesh dense = pp 2, tp 2" in (checkpoint.manifest.layout_text or "")
    assert "num_layers = 4" in (checkpoint.manifest.layout_text or "")


@pytest.mark.parametrize("mesh", ["pp=1,tp=1", "pp=2,tp=1", "pp=1,tp=2", "pp=4,tp=4"])
def test_megatron_at_any_mesh_and_back_is_the_same(megatron_case, tmp_path, mesh: str) -> None:
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "u") == 0
    assert convert(tmp_path / "u", tmp_path / "m", "--to", "megatron", "--mesh", mesh) == 0
    assert convert(tmp_path / "m", tmp_path / "u2") == 0
    assert_truth(ek.open(tmp_path / "u2"), megatron_case.truth)
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "m"), "--quiet"]) == 0


def test_megatron_at_its_own_mesh_is_the_source_bit_for_bit(megatron_case, tmp_path) -> None:
    source = megatron_case.folder / "checkpoint"
    assert convert(source, tmp_path / "u") == 0
    assert convert(tmp_path / "u", tmp_path / "m", "--to", "megatron") == 0  # the sizes are in `layout_text`
    for file in sorted(source.glob("iter_*/*/*.pt")):
        one, other = (rank_file(path) for path in (file, tmp_path / "m" / file.relative_to(source)))
        assert one["model"].keys() - other["model"].keys() == {name for name, found in one["model"].items() if found is None}
        for name, found in one["model"].items():
            assert found is None or torch.equal(found, other["model"][name]), name
        assert list(one["optimizer"]["state"]) == list(other["optimizer"]["state"])
        for index, states in one["optimizer"]["state"].items():
            for state, found in states.items():
                assert torch.equal(found, other["optimizer"]["state"][index][state]), (index, state)
        assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
        assert vars(one["args"]).keys() == vars(other["args"]).keys()
        assert {**vars(one["args"]), "attention_backend": 0, "model_type": 0} == {
            **vars(other["args"]),
            "attention_backend": 0,
            "model_type": 0,
        }
        assert one["opt_param_scheduler"] == other["opt_param_scheduler"]


class Stub:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


def rank_file(path: Path) -> dict[str, Any]:
    import argparse

    import numpy.dtypes

    reconstruct = np.empty(0).__reduce__()[0]
    known = [argparse.Namespace, np.ndarray, np.dtype, reconstruct, numpy.dtypes.UInt32DType]
    known += [(Stub, "megatron.core.enums.ModelType"), (Stub, "megatron.core.transformer.enums.AttnBackend")]
    with torch.serialization.safe_globals(known):
        return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_what_torch_reads_is_written_for_torch(dcp_case, tmp_path, form: str) -> None:
    source = dcp_case.folder / "checkpoint"
    assert convert(source, tmp_path / "u") == 0
    assert_truth(ek.open(tmp_path / "u"), dcp_case.truth)
    assert convert(tmp_path / "u", tmp_path / "out", "--to", form) == 0
    assert main(["diff", str(source), str(tmp_path / "out"), "--quiet"]) == 0
    if form == "torch":
        found = torch.load(tmp_path / "out", weights_only=True)
        for key, wanted in dcp_case.truth.items():
            name, state = key.split("|")
            if state == "value":
                assert found["model"][name].numpy().tobytes() == wanted.tobytes()


def test_a_plain_file_keeps_its_prefix_and_counts_by_its_names(tmp_path, plain_ddp) -> None:
    assert convert(plain_ddp.folder / "checkpoint.pt", tmp_path / "u") == 0
    assert_truth(ek.open(tmp_path / "u"), plain_ddp.truth, prefix="module.")


def test_a_plain_file_that_counts_needs_an_order(tmp_path, plain_single, capsys) -> None:
    source = plain_single.folder / "checkpoint.pt"
    assert convert(source, tmp_path / "u") == 1
    said = capsys.readouterr().err
    assert "order optimizer:\n    NAME    # 0, shape (10,)" in said
    assert not (tmp_path / "u").exists()
    assert convert(source, tmp_path / "w", "--skip", "*/exp_avg", "--skip", "*/exp_avg_sq") == 0
    assert {one.state for one in ek.open(tmp_path / "w").records if one.section == "params"} == {"value"}
    order = plain_single.facts["optimizer_index_to_parameter"]
    names = "".join(f"    {order[str(k)]}\n" for k in range(len(order)))
    (tmp_path / "mine.ucl").write_text(f"ucl 1\norder optimizer:\n{names}")
    assert convert(source, tmp_path / "u", "--rules", tmp_path / "mine.ucl") == 0
    assert_truth(ek.open(tmp_path / "u"), plain_single.truth)


def test_megatron_becomes_a_folder_that_transformers_loads(megatron_case, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "u") == 0
    assert convert(tmp_path / "u", tmp_path / "hf", "--to", "safetensors", "--names", "llama-hf") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    check = megatron_case.facts["check"]
    with torch.no_grad():
        logits = model(torch.tensor(check["input_ids"])).logits
    assert torch.allclose(logits, torch.tensor(check["logits"]), atol=1e-5)


def test_names_go_there_and_back(megatron_case, tmp_path) -> None:
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "u") == 0
    with np.load(megatron_case.folder / "truth_llama.npz") as found:
        llama = {name: found[name] for name in found.files}
    assert convert(tmp_path / "u", tmp_path / "hf", "--names", "llama-hf") == 0
    assert_truth(ek.open(tmp_path / "hf"), llama)
    for name in ("llama-titan", "llama-meta"):
        assert convert(tmp_path / "hf", tmp_path / name, "--names", name) == 0
        assert convert(tmp_path / name, tmp_path / f"{name}-back", "--names", name) == 0
        assert_truth(ek.open(tmp_path / f"{name}-back"), llama)
        assert convert(tmp_path / name, tmp_path / f"{name}-meg", "--names", name, "--names", "llama-hf") == 0
        assert_truth(ek.open(tmp_path / f"{name}-meg"), megatron_case.truth)


def test_rows_of_heads_are_pairs_for_torchtitan(megatron_case, tmp_path) -> None:
    """Hugging Face: first all first halves; torchtitan: pairs side by side."""
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "hf", "--names", "llama-hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "t", "--names", "llama-titan") == 0
    halves = ek.open(tmp_path / "hf").read(ArrayId("params", "model", "model.layers.0.self_attn.q_proj.weight", "value"))
    pairs = ek.open(tmp_path / "t").read(ArrayId("params", "model", "layers.0.attention.wq.weight", "value"))
    assert np.array_equal(pairs, halves.reshape(8, 2, 4, 32).transpose(0, 2, 1, 3).reshape(64, 32))


def test_hugging_face_comes_in_and_goes_out(hf_case, tmp_path) -> None:
    source = hf_case.folder / "model"
    assert convert(source, tmp_path / "u") == 0
    assert_truth(ek.open(tmp_path / "u"), hf_case.truth)
    assert convert(source, tmp_path / "hf", "--to", "hf", "--config", source, "--shard-size", "20KB") == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert main(["diff", str(source), str(tmp_path / "hf"), "--quiet"]) == 0
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = hf_case.facts["check"]["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
    assert torch.allclose(logits, torch.tensor(hf_case.facts["check"]["logits"]), atol=1e-5)


def test_hugging_face_becomes_megatron_and_comes_back(hf_case, tmp_path, capsys) -> None:
    source = hf_case.folder / "model"
    words = ["--to", "megatron", "--names", "llama-hf", "--mesh", "tp=2,pp=3", "--set", "make_vocab_size_divisible_by=8"]
    assert convert(source, tmp_path / "m", *words) == 0
    found = rank_file(tmp_path / "m" / "iter_0000000" / "mp_rank_01_002" / "model_optim_rng.pt")
    assert found["model"]["output_layer.weight"].shape == (56, 48)  # 101 rows, padded to 112
    assert not found["model"]["output_layer.weight"][45:].any()
    assert found["model"]["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (40, 48)
    assert convert(tmp_path / "m", tmp_path / "hf", "--to", "hf", "--names", "llama-hf", "--config", source) == 0
    assert main(["diff", str(source), str(tmp_path / "hf"), "--quiet"]) == 0
    assert convert(source, tmp_path / "u", "--names", "llama-hf") == 0  # in two steps: the constants are in `layout_text`
    assert convert(tmp_path / "u", tmp_path / "m2", "--to", "megatron", "--mesh", "tp=2") == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "m2"), "--json"]) == 6  # `args`, iteration and version are new
    assert {one["what"] for one in json.loads(capsys.readouterr().out)["differences"]} == {"value"}


def test_diff_tells_names_shapes_values_and_its_exit_code(megatron_case, tmp_path, capsys) -> None:
    assert convert(megatron_case.folder / "checkpoint", tmp_path / "u") == 0
    assert main(["diff", str(tmp_path / "u"), str(megatron_case.folder / "checkpoint")]) == 0
    assert convert(tmp_path / "u", tmp_path / "half", "--cast", "value=bfloat16", "--skip", "output_layer.*") == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "half"), "--json"]) == 6
    found = json.loads(capsys.readouterr().out)["differences"]
    assert {one["what"] for one in found} == {"only in A", "dtype", "setting"}
    assert convert(tmp_path / "half", tmp_path / "back", "--cast", "value=float32") == 0
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "back"), "--json", "--only", "*linear_qkv*/value"]) == 6
    (first, *_) = json.loads(capsys.readouterr().out)["differences"]
    assert first["what"] == "values"
    assert 0 < first["max_rel"] < 0.01
    assert len(first["index"]) == 2


def test_a_dry_run_reads_and_writes_nothing(megatron_case, tmp_path, capsys) -> None:
    assert main(["convert", str(megatron_case.folder / "checkpoint"), str(tmp_path / "u"), "--dry-run"]) == 0
    assert "embedding.word_embeddings.weight/value  float32  128×32, true 101×32" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_rules_shown_are_rules_that_do(megatron_case, tmp_path, capsys) -> None:
    source = megatron_case.folder / "checkpoint"
    assert main(["convert", str(source), str(tmp_path / "u"), "--show-rules"]) == 0
    (tmp_path / "shown.ucl").write_text(capsys.readouterr().out)
    assert convert(source, tmp_path / "a") == 0
    assert convert(source, tmp_path / "b", "--rules", tmp_path / "shown.ucl") == 0
    one, other = (ek.open(tmp_path / name) for name in "ab")
    assert one.manifest.layout_text == other.manifest.layout_text
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_a_step_at_two_degrees_proves_a_program(megatron_case, tmp_path, capsys) -> None:
    """Gate and up rows that are not cut apart: every check by content passes, and the wholes at two degrees differ."""
    source = megatron_case.folder / "checkpoint"
    assert convert(source, tmp_path / "m4", "--to", "megatron", "--mesh", "tp=4,pp=1") == 0
    assert main(["check", "megatron", "--against", str(source), "--against", str(tmp_path / "m4")]) == 0
    assert main(["convert", str(source), str(tmp_path / "u"), "--show-rules"]) == 0
    text = capsys.readouterr().out.partition("ucl 1")
    wrong = (text[1] + text[2]).replace("(2 f/tp)  h", "both/tp  h")
    (tmp_path / "wrong.ucl").write_text(wrong)
    assert main(["check", str(tmp_path / "wrong.ucl"), "--against", str(source)]) == 0
    assert main(["check", str(tmp_path / "wrong.ucl"), "--against", str(source), "--against", str(tmp_path / "m4")]) == 6
    assert "mlp.linear_fc1.weight/value: values at" in capsys.readouterr().out


def test_copies_that_are_none_and_shares_that_are_copies_are_refused(megatron_case, tmp_path, capsys) -> None:
    source = megatron_case.folder / "checkpoint"
    assert main(["convert", str(source), str(tmp_path / "u"), "--show-rules"]) == 0
    text = capsys.readouterr().out
    divided = "self_attention.linear_proj.weight  h  (num_attention_heads/tp kv_channels)"
    same = text.replace(divided, "self_attention.linear_proj.weight  h  p  same tp")
    (tmp_path / "same.ucl").write_text(same)
    assert convert(source, tmp_path / "u", "--rules", tmp_path / "same.ucl") == 1
    assert "element (0, 0):" in capsys.readouterr().err
    assert list(tmp_path.glob("[!s]*")) == []
