"""Sources of many kinds, made here: several models, states of any shape, old names, experts' files, chains of optimizers.

Files of vectors V11 and V12. [FOR-30, FOR-33, FOR-34, FOR-55, CLI-63]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.format.arrays import ArrayId


def convert(*words: object) -> tuple[int, str]:
    """(exit code, what was said)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["convert", *map(str, words)])
    return code, said.getvalue()


def done(*words: object) -> str:
    code, said = convert(*words)
    assert code == 0, said
    return said


def array(path: Path, name: str, state: str = "value", item: str = "model") -> np.ndarray:
    return ek.open(path).read(ArrayId("params", item, name, state))


def trained(make: type[torch.optim.Optimizer], seed: int = 0, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = make(list(net.named_parameters()), **options)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def test_a_model_and_its_average_are_two_models_and_a_note_says_whose_the_states_are(tmp_path) -> None:
    net, optimizer = trained(torch.optim.Adam)
    average = {name: one + 1 for name, one in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "ema": average, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    said = done(tmp_path / "a.pt", tmp_path / "u")
    assert "optimizer: model, ema have the names that it has; its states are taken for those of model" in said
    assert np.array_equal(array(tmp_path / "u", "0.weight", item="ema"), array(tmp_path / "u", "0.weight") + 1)
    assert array(tmp_path / "u", "0.weight", "exp_avg").shape == (4, 3)
    for form in ("torch", "dcp"):
        done(tmp_path / "u", tmp_path / form, "--to", form, "--quiet")
        assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / form), "--quiet"]) == 0


def test_two_models_with_an_optimizer_each_are_told_apart_by_shapes_and_places(tmp_path) -> None:
    """As of a generator and a discriminator, whose layers have one numbering."""
    one, first = trained(torch.optim.Adam)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    second = torch.optim.Adam(list(other.named_parameters()))
    other(torch.ones(1, 2)).sum().backward()
    second.step()
    state = {"g": one.state_dict(), "d": other.state_dict(), "opt_d": second.state_dict(), "opt_g": first.state_dict()}
    torch.save(state, tmp_path / "a.pt")
    said = done(tmp_path / "a.pt", tmp_path / "u")
    assert "taken for" not in said
    assert array(tmp_path / "u", "0.weight", "exp_avg", "g").shape == (4, 3)
    assert array(tmp_path / "u", "0.weight", "exp_avg", "d").shape == (6, 2)
    fresh_one, fresh_first = trained(torch.optim.Adam, seed=5)
    ek.load({"g": fresh_one, "opt_g": fresh_first}, tmp_path / "u", strict="missing")
    assert torch.equal(fresh_first.state_dict()["state"][0]["exp_avg"], first.state_dict()["state"][0]["exp_avg"])


def test_a_name_map_goes_through_all_models(tmp_path) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save({"model": weights, "ema": {"a.weight": weights["a.weight"] + 1}}, tmp_path / "a.pt")
    (tmp_path / "map.ucl").write_text("ucl 1\na.weight  x y -> b.weight  y x\n")
    done(tmp_path / "a.pt", tmp_path / "u", "--names", tmp_path / "map.ucl", "--quiet")
    for item, more in (("model", 0), ("ema", 1)):
        assert np.array_equal(array(tmp_path / "u", "b.weight", item=item), weights["a.weight"].numpy().T + more)


def test_a_name_map_drops_by_name_and_says_so(tmp_path) -> None:
    save_file({"a": torch.ones(2), "a.mask": torch.zeros(3)}, tmp_path / "m.safetensors")
    (tmp_path / "map.ucl").write_text("ucl 1\na -> b\n{*n}.mask  drop\n")
    said = done(tmp_path / "m.safetensors", tmp_path / "u", "--names", tmp_path / "map.ucl")
    assert "not carried: model/a.mask: the map map.ucl drops it" in said
    assert {one.name for one in ek.open(tmp_path / "u").records} == {"b"}


@pytest.mark.parametrize(
    ("make", "options", "states"),
    [
        (torch.optim.Adafactor, {}, {"row_var", "col_var", "variance"}),
        (torch.optim.ASGD, {}, {"ax", "eta", "mu"}),
        (torch.optim.Rprop, {}, {"prev", "step_size"}),
        (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}),
        (torch.optim.SGD, {"momentum": 0.9, "lr": 0.1}, {"momentum_buffer"}),
    ],
)
def test_states_of_any_optimizer_and_shape_come_along_and_go_out(tmp_path, make, options, states) -> None:
    net, optimizer = trained(make, **options)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    done(tmp_path / "a.pt", tmp_path / "u", "--quiet")
    assert ek.open(tmp_path / "u").verify().problems == ()
    assert {one.state for one in ek.open(tmp_path / "u").records} >= {one for one in states if one not in ("eta", "mu")}
    done(tmp_path / "u", tmp_path / "b.pt", "--to", "torch", "--quiet")
    again = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]
    wanted = optimizer.state_dict()["state"]
    assert again["state"].keys() == wanted.keys()
    for number, of_one in wanted.items():
        for name, one in of_one.items():
            found = again["state"][number][name]
            assert torch.equal(found, one) if isinstance(one, torch.Tensor) else found == one, (number, name)


def test_numpys_numbers_among_states_and_settings(tmp_path) -> None:
    net, optimizer = trained(torch.optim.Adam)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = np.float64(0.25)
    for one in state["state"].values():
        one["step"] = np.int64(7)
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "a.pt")
    done(tmp_path / "a.pt", tmp_path / "u", "--quiet")
    (table,) = ek.open(tmp_path / "u").tables
    found = {
        one.key: [np.frombuffer(v.data, v.dtype)[0] for v in one.values] for one in table.fields if one.key in ("lr", "step")
    }
    assert found == {"lr": [0.25], "step": [7]}
    done(tmp_path / "u", tmp_path / "b.pt", "--to", "torch", "--quiet")
    assert torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"] == 0.25


def test_an_optimizer_alone_keeps_its_states_by_name(tmp_path) -> None:
    _, optimizer = trained(torch.optim.Adam)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    done(tmp_path / "a.pt", tmp_path / "u", "--quiet")
    assert {one.state for one in ek.open(tmp_path / "u").records} == {"exp_avg", "exp_avg_sq"}
    wanted = optimizer.state_dict()["state"][0]["exp_avg"]
    assert np.array_equal(array(tmp_path / "u", "0.weight", "exp_avg"), wanted.numpy())


def test_an_optimizer_without_any_state_that_counts_can_be_left_out(tmp_path) -> None:
    net = nn.Linear(2, 2)
    torch.save({"m": net.state_dict(), "o": torch.optim.SGD(net.parameters(), lr=0.1).state_dict()}, tmp_path / "a.pt")
    code, said = convert(tmp_path / "a.pt", tmp_path / "u")
    assert (code, "order o:\n    NAME    # 0, no state" in said) == (1, True)
    assert "not carried: o: left out" in done(tmp_path / "a.pt", tmp_path / "u", "--skip", "o/*")


def test_a_parameter_that_the_program_drops_goes_with_its_states(tmp_path) -> None:
    net, optimizer = trained(torch.optim.Adam)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh one =\nin model\n    0.weight  drop\n    0.bias  h\n    2.{*n}  ...\n")
    said = done(tmp_path / "a.pt", tmp_path / "u", "--rules", tmp_path / "my.ucl")
    assert "not carried: 0.weight: the program drops it" in said
    assert "0.weight" not in {one.name for one in ek.open(tmp_path / "u").records}
    assert array(tmp_path / "u", "0.bias", "exp_avg").shape == (4,)


def test_lightnings_file_goes_in_and_out(tmp_path) -> None:
    net, optimizer = trained(torch.optim.Adam)
    state = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 1}]}
    torch.save({**state, "global_step": 3, "loops": {"fit": {"n": 1}}, "hyper_parameters": {"x": 1}}, tmp_path / "a.ckpt")
    done(tmp_path / "a.ckpt", tmp_path / "u", "--quiet")
    assert ek.open(tmp_path / "u").step == 3
    assert {one.item for one in ek.open(tmp_path / "u").records} == {"state_dict"}
    done(tmp_path / "u", tmp_path / "b.ckpt", "--to", "torch", "--quiet")
    assert main(["diff", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"), "--quiet"]) == 0


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_lists_and_groups_come_back_as_they_were(tmp_path, form: str) -> None:
    """Lists with models in them, several values in one mapping, two groups with equal options, one without parameters."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named = list(net.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:]}])
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"].append({**saved["param_groups"][0], "params": [], "param_names": []})
    inner = {"opt": [saved], "x": 1, "y": (2, "z")}
    nets = [{"w": torch.ones(2)}, 3, [{"v": torch.ones(1)}, "s"]]
    torch.save({"model": net.state_dict(), "trainer": inner, "nets": nets}, tmp_path / "a.pt")
    said = done(tmp_path / "a.pt", tmp_path / "u")
    assert "not carried: trainer.opt.0/param_groups/2: a param group without parameters" in said
    done(tmp_path / "u", tmp_path / form, "--to", form, "--quiet")
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / form), "--quiet"]) == 0
    done(tmp_path / form, tmp_path / "b.pt", "--to", "torch", "--quiet")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert found["nets"][1:] == [3, [{"v": torch.ones(1)}, "s"]]
    assert {key: one for key, one in found["trainer"].items() if key != "opt"} == {"x": 1, "y": (2, "z")}
    if form == "torch":
        groups = found["trainer"]["opt"][0]["param_groups"]
        assert [group["params"] for group in groups] == [[0, 1], [2, 3]]
        again = torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:]}])
        again.load_state_dict(found["trainer"]["opt"][0])
        assert torch.equal(again.state_dict()["state"][3]["exp_avg"], optimizer.state_dict()["state"][3]["exp_avg"])


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_class_that_no_reader_takes_is_told_where_only_its_value_goes(tmp_path, form: str) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, where=Path("x"))}, tmp_path / "a.pt")
    done(tmp_path / "a.pt", tmp_path / "u", "--quiet")
    said = done(tmp_path / "u", tmp_path / "out", "--to", form)
    assert "not carried: /args: its class argparse.Namespace: a plain value stands for it" in said


def test_an_order_clause_joins_the_default_program_and_carets_are_in_ones_own_lines(tmp_path) -> None:
    net, optimizer = trained(torch.optim.Adam)
    state = optimizer.state_dict()
    del state["param_groups"][0]["param_names"]
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "a.pt")
    mine = tmp_path / "mine.ucl"
    mine.write_text("# my order\nucl 1\norder optimizer:\n    0.weight\n    0.bias\n    2.weight\n    2.bigs\n")
    code, said = convert(tmp_path / "a.pt", tmp_path / "u", "--rules", mine)
    assert code == 1
    assert "mine.ucl:7:5: order 'optimizer' names '2.bigs', which is no tensor there" in said
    assert said.splitlines()[-1].startswith("        ^^^^^^") or "    ^^^^^^" in said
    mine.write_text(mine.read_text().replace("bigs", "bias"))
    done(tmp_path / "a.pt", tmp_path / "u", "--rules", mine, "--quiet")
    assert array(tmp_path / "u", "2.bias", "exp_avg").shape == (2,)


# -- Megatron's files --------------------------------------------------------------------------------------------------


def rank_file(folder: Path, contents: dict[str, object], tp: int, pp: int | None = None, ep: int | None = None) -> None:
    name = f"mp_rank_{tp:02d}" + "".join(f"_{one:03d}" for one in (pp, ep) if one is not None)
    place = folder / "iter_0000004" / name
    place.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    torch.save({"checkpoint_version": 3.0, "iteration": 4, **contents}, place / "model_optim_rng.pt")


ARGS = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 2,
    "hidden_size": 8,
    "padded_vocab_size": 16,
    "make_vocab_size_divisible_by": 8,
    "vocab_size": 13,
}


def old_names(folder: Path, *, tied: bool) -> dict[str, torch.Tensor]:
    """tp=2, pp=2 of a model from before core models, nested as it was; the whole, by name."""
    torch.manual_seed(2)
    layer = {
        "input_layernorm.weight": (8,),
        "input_layernorm.bias": (8,),
        "self_attention.query_key_value.weight": (24, 8),
        "self_attention.query_key_value.bias": (24,),
        "self_attention.dense.weight": (8, 8),
        "self_attention.dense.bias": (8,),
        "post_attention_layernorm.weight": (8,),
        "post_attention_layernorm.bias": (8,),
        "mlp.dense_h_to_4h.weight": (32, 8),
        "mlp.dense_h_to_4h.bias": (32,),
        "mlp.dense_4h_to_h.weight": (8, 32),
        "mlp.dense_4h_to_h.bias": (8,),
    }
    whole = {f"language_model.encoder.layers.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in layer.items()}
    whole["language_model.embedding.word_embeddings.weight"] = torch.randn(16, 8)
    whole["language_model.embedding.position_embeddings.weight"] = torch.randn(5, 8)
    whole["language_model.encoder.final_layernorm.weight"] = torch.randn(8)
    whole["language_model.encoder.final_layernorm.bias"] = torch.randn(8)
    if not tied:
        whole["language_model.output_layer.weight"] = torch.randn(16, 8)

    def part(name: str, one: torch.Tensor, tp: int) -> torch.Tensor:
        if "layernorm" in name or "position" in name or name.endswith(("dense.bias", "4h_to_h.bias")):
            return one.clone()
        return one.chunk(2, 1 if name.endswith(("dense.weight", "4h_to_h.weight")) else 0)[tp].clone()

    for pp in range(2):
        for tp in range(2):
            layers = {
                name.replace(f"layers.{pp}.", "layers.0."): part(name, one, tp)
                for name, one in whole.items()
                if f"layers.{pp}." in name
            }
            encoder = {name.removeprefix("language_model.encoder."): one for name, one in layers.items()}
            model: dict[str, object] = {"encoder": encoder}
            rest: dict[str, object] = {}
            if pp == 0:
                words, places = (whole[f"language_model.embedding.{kind}_embeddings.weight"] for kind in ("word", "position"))
                model["embedding"] = {
                    "word_embeddings": {"weight": words.chunk(2)[tp].clone()},
                    "position_embeddings": {"weight": places.clone()},
                }
            else:
                for kind in ("weight", "bias"):
                    encoder[f"final_layernorm.{kind}"] = whole[f"language_model.encoder.final_layernorm.{kind}"].clone()
                if tied:
                    words = whole["language_model.embedding.word_embeddings.weight"]
                    rest["word_embeddings_for_head"] = {"weight": words.chunk(2)[tp].clone()}
                else:
                    model["output_layer"] = {"weight": whole["language_model.output_layer.weight"].chunk(2)[tp].clone()}
            sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
            args = argparse.Namespace(**ARGS, **sizes, iteration=4, untie_embeddings_and_output_weights=not tied)
            rank_file(folder, {"args": args, "model": {"language_model": model, **rest}}, tp, pp)
    return whole


@pytest.mark.parametrize("tied", [True, False])
def test_names_from_before_core_models_are_found_out_and_become_those_of_core(tmp_path, tied: bool) -> None:
    whole = old_names(tmp_path / "m", tied=tied)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    for name, one in whole.items():
        assert array(tmp_path / "u", name).tobytes() == one.numpy().tobytes(), name
    done(tmp_path / "u", tmp_path / "m4", "--to", "megatron", "--mesh", "tp=4,pp=1", "--quiet")
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "m4"), "--quiet"]) == 0
    done(tmp_path / "u", tmp_path / "core", "--to", "megatron", "--names", "megatron-lm", "--mesh", "tp=2,pp=2", "--quiet")
    done(tmp_path / "core", tmp_path / "v", "--quiet")
    found = array(tmp_path / "v", "decoder.layers.1.self_attention.linear_qkv.weight")
    assert found.tobytes() == whole["language_model.encoder.layers.1.self_attention.query_key_value.weight"].numpy().tobytes()
    assert ("output_layer.weight" in {one.name for one in ek.open(tmp_path / "v").records}) is not tied


def test_more_tensor_ranks_than_key_heads_cut_the_rows_evenly(tmp_path) -> None:
    """As megatron-core does it: a group's rows are over several ranks."""
    torch.manual_seed(4)
    fused = torch.randn((4 + 2 * 1) * 2, 8)
    args = argparse.Namespace(
        **ARGS, tensor_model_parallel_size=4, pipeline_model_parallel_size=1, num_query_groups=1, group_query_attention=True
    )
    args.num_layers = 1
    shapes = {"self_attention.linear_proj.weight": (8, 2), "mlp.linear_fc1.weight": (4, 8), "mlp.linear_fc2.weight": (8, 4)}
    for tp in range(4):
        model = {f"decoder.layers.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
        model["decoder.layers.0.self_attention.linear_qkv.weight"] = fused.chunk(4)[tp].clone()
        model |= {"embedding.word_embeddings.weight": torch.randn(8, 8), "output_layer.weight": torch.randn(8, 8)}
        model["decoder.final_layernorm.weight"] = torch.ones(8)
        args.padded_vocab_size = 32
        rank_file(tmp_path / "m", {"args": args, "model": model}, tp)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    assert np.array_equal(array(tmp_path / "u", "decoder.layers.0.self_attention.linear_qkv.weight"), fused.numpy())


def test_virtual_stages_have_the_embedding_in_the_first_and_the_head_in_the_last(tmp_path) -> None:
    """Four layers on two stages with two chunks each: rank 0 has layers 0 and 2."""
    shapes = {
        "attn.c_attn.weight": (8, 24),
        "attn.c_proj.weight": (8, 8),
        "mlp.c_fc.weight": (8, 32),
        "mlp.c_proj.weight": (32, 8),
    }
    shapes |= {"ln_1.weight": (8,), "ln_2.weight": (8,)}
    whole = {f"transformer.h.{i}.{name}": torch.randn(shape) for i in range(4) for name, shape in shapes.items()}
    whole |= {"transformer.wte.weight": torch.randn(13, 8), "transformer.ln_f.weight": torch.ones(8)}
    whole["lm_head.weight"] = torch.randn(13, 8)
    (tmp_path / "hf").mkdir()
    save_file(whole, tmp_path / "hf" / "model.safetensors")
    config = {"model_type": "gpt2", "n_head": 2, "n_embd": 8, "n_layer": 4, "vocab_size": 13, "tie_word_embeddings": False}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    words = ["--to", "megatron", "--names", "gpt2-hf", "--mesh", "pp=2", "--set", "virtual_pipeline_model_parallel_size=2"]
    done(tmp_path / "hf", tmp_path / "m", *words, "--quiet")
    held = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for pp in range(2):
            found = torch.load(next((tmp_path / "m").rglob(f"mp_rank_00_00{pp}/*.pt")), weights_only=True)
            for chunk in range(2):
                held[pp, chunk] = {name for name in found[f"model{chunk}"] if "layers" not in name}
                fc1 = found[f"model{chunk}"]["decoder.layers.0.mlp.linear_fc1.weight"]
                assert torch.equal(fc1, whole[f"transformer.h.{2 * chunk + pp}.mlp.c_fc.weight"].T)
    assert held == {
        (0, 0): {"embedding.word_embeddings.weight"},
        (0, 1): set(),
        (1, 0): set(),
        (1, 1): {"decoder.final_layernorm.weight", "output_layer.weight"},
    }
    done(tmp_path / "m", tmp_path / "back", "--to", "hf", "--names", "gpt2-hf", "--quiet")
    assert main(["diff", str(tmp_path / "hf"), str(tmp_path / "back"), "--quiet"]) == 0


EXPERTS = """\
ucl 1
needs num_experts
mesh m = pp, ep, tp
in model
    experts.{e: num_experts/ep}.up  f/tp  h  same pp
    router                          h        same pp, ep, tp
"""


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_v11_experts_files_of_any_number_of_ranks(tmp_path, ep: int) -> None:
    """Every rank calls its first expert `experts.0`; ranks of one expert-parallel size to files of none."""
    whole = [torch.randn(4, 3) for _ in range(8)]
    router = torch.randn(3)
    for rank in range(ep):
        for tp in range(2):
            args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, num_experts=8)
            own = whole[8 // ep * rank : 8 // ep * (rank + 1)]
            model = {f"experts.{k}.up": one.chunk(2)[tp].clone() for k, one in enumerate(own)}
            rank_file(tmp_path / "m", {"args": args, "model": {**model, "router": router.clone()}}, tp, 0, rank)
    (tmp_path / "moe.ucl").write_text(EXPERTS)
    done(tmp_path / "m", tmp_path / "u", "--rules", tmp_path / "moe.ucl", "--quiet")
    for k, one in enumerate(whole):
        assert np.array_equal(array(tmp_path / "u", f"experts.{k}.up"), one.numpy())


def test_v11_three_ranks_do_not_divide_eight_experts(tmp_path) -> None:
    for rank in range(3):
        args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, num_experts=8)
        rank_file(
            tmp_path / "m", {"args": args, "model": {"experts.0.up": torch.ones(2, 2), "router": torch.ones(2)}}, 0, 0, rank
        )
    (tmp_path / "moe.ucl").write_text(EXPERTS)
    code, said = convert(tmp_path / "m", tmp_path / "u", "--rules", tmp_path / "moe.ucl")
    assert code == 1
    assert "moe.ucl:5:13: 8 cannot be cut evenly 3 ways along ep" in said
    assert not (tmp_path / "u").exists()


def test_a_chain_of_optimizers_is_refused_by_name_and_can_be_left_out(tmp_path) -> None:
    args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    one = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    rank_file(tmp_path / "m", {"args": args, "model": {"a": torch.ones(2), "b": torch.ones(2)}, "optimizer": [one, one]}, 0)
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh m = pp, tp\nin model\n    {*n}  h  same pp, tp\n")
    words = [tmp_path / "m", tmp_path / "u", "--rules", tmp_path / "my.ucl"]
    code, said = convert(*words)
    assert (code, "order optimizer0:\n    NAME    # 0, shape (2,)" in said) == (1, True)
    orders = "order optimizer0:\n    b\norder optimizer1:\n    a\n"
    (tmp_path / "my.ucl").write_text(f"ucl 1\nmesh m = pp, tp\n{orders}in model\n    {{*n}}  h  same pp, tp\n")
    done(*words, "--quiet")
    assert array(tmp_path / "u", "a", "exp_avg").tolist() == [1, 1]
    shutil.rmtree(tmp_path / "u")
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh m = pp, tp\nin model\n    {*n}  h  same pp, tp\n")
    assert "not carried: optimizer0: left out" in done(*words, "--skip", "optimizer?/*")


# -- V12: fragments that are gone, or left over ------------------------------------------------------------------------


def dcp_folder(folder: Path) -> torch.Tensor:
    whole = torch.arange(12.0).reshape(6, 2)
    dcp.save({"model": {"a": whole}}, checkpoint_id=folder)
    return whole


def test_v12_a_fragment_that_is_left_over_from_another_save_changes_nothing(tmp_path) -> None:
    whole = dcp_folder(tmp_path / "s")
    shutil.copy(next((tmp_path / "s").glob("*.distcp")), tmp_path / "s" / "__7_0.distcp")
    done(tmp_path / "s", tmp_path / "u", "--quiet")
    assert np.array_equal(array(tmp_path / "u", "a"), whole.numpy())


def test_v12_a_fragment_that_is_gone_is_named(tmp_path) -> None:
    dcp_folder(tmp_path / "s")
    next((tmp_path / "s").glob("*.distcp")).unlink()
    code, said = convert(tmp_path / "s", tmp_path / "u")
    assert code == 3
    assert "__0_0.distcp" in said
    assert not (tmp_path / "u").exists()


def test_v12_a_rank_that_is_left_over_from_a_run_with_more_of_them_is_refused(tmp_path) -> None:
    for tp in range(2):
        args = argparse.Namespace(tensor_model_parallel_size=2 if tp == 0 else 1, pipeline_model_parallel_size=1)
        rank_file(tmp_path / "m", {"args": args, "model": {"a": torch.ones(2)}}, tp)
    code, said = convert(tmp_path / "m", tmp_path / "u")
    assert code == 1
    assert "args.tensor_model_parallel_size is 1, and there are files of 2 such ranks" in said


# -- folders of transformers -------------------------------------------------------------------------------------------


def test_a_gpt2_body_without_prefix_and_with_masks_becomes_megatron(tmp_path) -> None:
    """As the first files of GPT-2 on the hub are."""
    shapes = {
        "ln_1.weight": (8,),
        "ln_1.bias": (8,),
        "attn.bias": (1, 1, 5, 5),
        "attn.c_attn.weight": (8, 24),
        "attn.c_attn.bias": (24,),
        "attn.c_proj.weight": (8, 8),
        "attn.c_proj.bias": (8,),
        "ln_2.weight": (8,),
        "ln_2.bias": (8,),
        "mlp.c_fc.weight": (8, 32),
        "mlp.c_fc.bias": (32,),
        "mlp.c_proj.weight": (32, 8),
        "mlp.c_proj.bias": (8,),
    }
    whole = {f"h.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in shapes.items()}
    whole |= {"wte.weight": torch.randn(13, 8), "wpe.weight": torch.randn(5, 8), "ln_f.weight": torch.ones(8)}
    whole["ln_f.bias"] = torch.zeros(8)
    (tmp_path / "hf").mkdir()
    save_file(whole, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_head": 2, "n_embd": 8, "n_layer": 2, "vocab_size": 13})
    )
    said = done(tmp_path / "hf", tmp_path / "m", "--to", "megatron", "--names", "gpt2-hf", "--mesh", "tp=2,pp=2")
    assert "not carried: model/h.1.attn.bias" in said
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    found = array(tmp_path / "u", "decoder.layers.1.self_attention.linear_qkv.weight")
    wanted = whole["h.1.attn.c_attn.weight"].numpy().T.reshape(3, 2, 4, 8).transpose(1, 0, 2, 3).reshape(24, 8)
    assert np.array_equal(found, wanted)


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1, "vocab_size": 10}


def test_a_release_of_meta_becomes_a_folder_of_transformers(tmp_path) -> None:
    """`params.json` has names of its own; a config is made, or what it lacks is named."""
    shapes = {f"attention.w{k}.weight": (8 if k in "qo" else 4, 8) for k in "qkvo"}
    shapes |= {"feed_forward.w1.weight": (12, 8), "feed_forward.w2.weight": (8, 12), "feed_forward.w3.weight": (12, 8)}
    shapes |= {"attention_norm.weight": (8,), "ffn_norm.weight": (8,)}
    whole = {f"layers.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    whole |= {"tok_embeddings.weight": torch.randn(10, 8), "output.weight": torch.randn(10, 8), "rope.freqs": torch.ones(2)}
    whole["norm.weight"] = torch.ones(8)
    (tmp_path / "meta").mkdir()
    torch.save(whole, tmp_path / "meta" / "consolidated.00.pth")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": -1}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    words = [tmp_path / "meta", tmp_path / "hf", "--to", "hf", "--names", "llama-meta"]
    code, said = convert(*words)
    assert (code, "config.json needs max_position_embeddings, rms_norm_eps or norm_epsilon" in said) == (1, True)
    given = ["--set", "max_position_embeddings=64", "--set", "rope_theta=10000.0", "--set", "rms_norm_eps=1e-5"]
    said = done(*words, *given)
    assert "not carried: model/rope.freqs" in said
    made = json.loads((tmp_path / "hf" / "config.json").read_text())
    wanted = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5}
    assert {key: made[key] for key in wanted} == wanted
    done(tmp_path / "hf", tmp_path / "u", "--quiet")
    pairs = whole["layers.0.attention.wq.weight"].numpy().reshape(2, 2, 2, 8)
    halves = array(tmp_path / "u", "model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(halves, pairs.transpose(0, 2, 1, 3).reshape(8, 8))


def llama(folder: Path, more: dict[str, tuple[int, ...]]) -> None:
    layer = {
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
        "self_attn.q_proj.weight": (8, 8),
        "self_attn.k_proj.weight": (4, 8),
        "self_attn.v_proj.weight": (4, 8),
        "self_attn.o_proj.weight": (8, 8),
        "mlp.gate_proj.weight": (12, 8),
        "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12),
        **more,
    }
    whole = {f"model.layers.0.{name}": torch.randn(shape) for name, shape in layer.items()}
    whole |= {"model.embed_tokens.weight": torch.randn(10, 8), "model.norm.weight": torch.ones(8)}
    whole["lm_head.weight"] = torch.randn(10, 8)
    folder.mkdir()
    save_file(whole, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HEADS))


@pytest.mark.parametrize(
    ("more", "family", "bias"),
    [
        ({}, "llama", False),
        ({"self_attn.q_norm.weight": (4,), "self_attn.k_norm.weight": (4,)}, "qwen3", False),
        ({f"self_attn.{k}_proj.bias": (8 if k == "q" else 4,) for k in "qkv"}, "qwen2", True),
        ({f"self_attn.{k}_proj.bias": (8 if k in "qo" else 4,) for k in "qkvo"}, "llama", True),
    ],
)
def test_a_config_that_is_made_says_the_family_whose_tensors_are_there(tmp_path, more, family: str, bias: bool) -> None:
    llama(tmp_path / "hf", more)
    done(tmp_path / "hf", tmp_path / "m", "--to", "megatron", "--names", "llama-hf", "--mesh", "tp=2", "--quiet")
    code, said = convert(tmp_path / "m", tmp_path / "back", "--to", "hf", "--names", "llama-hf")
    assert (code, "config.json needs max_position_embeddings, rms_norm_eps" in said) == (1, True)
    done(tmp_path / "m", tmp_path / "u", "--names", "llama-hf", "--quiet")
    from elastickpt.convert.configs import config_files
    from elastickpt.convert.conversion import open_source
    from elastickpt.convert.options import Options

    known = {"max_position_embeddings": 5, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    source = open_source(Options(str(tmp_path / "u"), ""))
    made = json.loads(config_files(None, ("llama-hf",), source.contents, {**source.facts, **known})["config.json"])
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 10, "head_dim": 4, "num_key_value_heads": 1}
    wanted = {"model_type": family, "attention_bias": bias, **sizes}
    assert {key: made[key] for key in wanted} == wanted
