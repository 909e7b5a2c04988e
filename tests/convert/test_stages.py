"""Megatron's layers over pipeline stages: uneven, empty and virtual ones are found in the names of the files. [LANG-12]"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.cli.main import main
from tests.convert.test_sources import ARGS, array, convert, done, rank_file

SHAPES = {
    "self_attention.linear_proj.weight": (8, 8),
    "self_attention.linear_qkv.weight": (24, 8),
    "mlp.linear_fc1.weight": (32, 8),
    "mlp.linear_fc2.weight": (8, 32),
}
MORE = {"decoder_first_pipeline_num_layers": 3, "untie_embeddings_and_output_weights": True}


def whole_of(layers: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    whole = {f"decoder.layers.{i}.{name}": torch.randn(shape) for i in range(layers) for name, shape in SHAPES.items()}
    ends = {"embedding.word_embeddings.weight": (16, 8), "decoder.final_layernorm.weight": (8,), "output_layer.weight": (16, 8)}
    return whole | {name: torch.randn(shape) for name, shape in ends.items()}


def megatron(folder: Path, stages: list[list[int]]) -> dict[str, torch.Tensor]:
    """Files of as many ranks as each list has; a list for each round of virtual stages."""
    whole = whole_of(sum(map(sum, stages)))
    rounds, pp = len(stages), len(stages[0])
    args = {**ARGS, **MORE, "num_layers": sum(map(sum, stages)), "pipeline_model_parallel_size": pp}
    args |= {"tensor_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": rounds if rounds > 1 else None}
    ranks: list[dict[str, object]] = [{"args": argparse.Namespace(**args)} for _ in range(pp)]
    first = 0
    for v, sizes in enumerate(stages):
        for rank, size in enumerate(sizes):
            chunk = {
                f"decoder.layers.{k}.{name}": whole[f"decoder.layers.{first + k}.{name}"].clone()
                for k in range(size)
                for name in SHAPES
            }
            ranks[rank][f"model{v}" if rounds > 1 else "model"] = chunk
            first += size
            ends = [name for name in whole if "layers" not in name]
            if (v, rank) == (0, 0):
                chunk |= {name: whole[name].clone() for name in ends if name.startswith("embedding")}
            if (v, rank) == (rounds - 1, pp - 1):
                chunk |= {name: whole[name].clone() for name in ends if not name.startswith("embedding")}
    for rank, contents in enumerate(ranks):
        rank_file(folder, contents, 0, rank if pp > 1 else None)
    return whole


def tensors(folder: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    found = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in folder.rglob("*.pt"):
            contents = torch.load(path, weights_only=True)
            found[path.parent.name] = {key: one for key, one in contents.items() if key.startswith("model")}
            found[path.parent.name]["args"] = vars(contents["args"])
    return found


def same(one: dict[str, dict[str, dict[str, torch.Tensor]]], other: dict[str, dict[str, dict[str, torch.Tensor]]]) -> None:
    assert one.keys() == other.keys()
    for rank, chunks in one.items():
        assert chunks.keys() == other[rank].keys()
        for chunk, held in chunks.items():
            if chunk != "args":
                assert held.keys() == other[rank][chunk].keys(), (rank, chunk)
                assert all(torch.equal(tensor, other[rank][chunk][name]) for name, tensor in held.items())


@pytest.mark.parametrize(
    "stages", [[[3, 1, 2]], [[0, 4, 0]], [[2, 2, 2]], [[6]], [[1, 2], [2, 0]], [[2, 0, 1], [1, 1, 1]]], ids=str
)
def test_stages_are_found_and_come_back_at_their_own_mesh(tmp_path, stages: list[list[int]]) -> None:
    whole = megatron(tmp_path / "m", stages)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    for name, one in whole.items():
        assert array(tmp_path / "u", name).tobytes() == one.numpy().tobytes(), name
    done(tmp_path / "u", tmp_path / "back", "--to", "megatron", "--quiet")
    same(tensors(tmp_path / "m"), tensors(tmp_path / "back"))
    assert all(one["args"]["decoder_first_pipeline_num_layers"] == 3 for one in tensors(tmp_path / "back").values())
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "u2"), "--quiet"]) == 0  # what the layout says lasts
    assert ek.open(tmp_path / "u2").manifest.layout_text == ek.open(tmp_path / "u").manifest.layout_text


def test_another_mesh_has_even_stages_or_those_that_are_given(tmp_path) -> None:
    whole = megatron(tmp_path / "m", [[3, 1, 2]])
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    words = [tmp_path / "u", tmp_path / "n", "--to", "megatron", "--mesh"]
    said = done(*words, "pp=2")
    assert "not carried: /args/decoder_first_pipeline_num_layers: it says how the source's layers were cut" in said
    found = tensors(tmp_path / "n")
    assert {rank: len(one["model"]) for rank, one in found.items()} == {"mp_rank_00_000": 13, "mp_rank_00_001": 14}
    assert found["mp_rank_00_000"]["args"]["decoder_first_pipeline_num_layers"] is None
    code, told = convert(tmp_path / "u", tmp_path / "o", "--to", "megatron", "--mesh", "pp=4")
    assert (code, "6 cannot be cut evenly 4 ways here: give --set stages=N,N,..., a size for each share" in told) == (1, True)
    done(tmp_path / "u", tmp_path / "o", "--to", "megatron", "--mesh", "pp=4", "--set", "stages=2,0,3,1", "--quiet")
    held = tensors(tmp_path / "o")
    layers = [sum(name.endswith("fc1.weight") for name in held[f"mp_rank_00_00{k}"]["model"]) for k in range(4)]
    assert layers == [2, 0, 3, 1]
    done(tmp_path / "o", tmp_path / "v", "--quiet")
    for name, one in whole.items():
        assert array(tmp_path / "v", name).tobytes() == one.numpy().tobytes(), name
    done(tmp_path / "m", tmp_path / "q", "--to", "megatron", "--mesh", "pp=2", "--set", "stages=5,1", "--quiet")  # in one step
    assert {rank: len(one["model"]) for rank, one in tensors(tmp_path / "q").items()} == {
        "mp_rank_00_000": 21,
        "mp_rank_00_001": 6,
    }
    code, told = convert(tmp_path / "u", tmp_path / "p", "--to", "megatron", "--mesh", "pp=4", "--set", "stages=2,0,3")
    assert (code, "sizes (2, 0, 3) add up to 5 in 3 shares: expected 6 in 4" in told) == (1, True)


@pytest.mark.parametrize("turned", [False, True])
def test_files_that_order_names_otherwise_come_back_with_their_own_numbers(tmp_path, turned: bool) -> None:
    """Optimizers count by the model's order, which is that of the files and not that of the program. [LANG-28]"""
    megatron(tmp_path / "m", [[1, 2], [2, 1]])
    for path in (tmp_path / "m").rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, weights_only=True)
        for chunk in ("model0", "model1"):
            names = sorted(contents[chunk], key=lambda name: name[::-1] if turned else name)
            layers = sorted(names, key=lambda name: "".join(filter(str.isdigit, name.partition(".mlp")[0])))  # in their order
            contents[chunk] = {name: contents[chunk][name] for name in layers}
        values = [one for chunk in ("model0", "model1") for one in contents[chunk].values()]
        ordered = [one for one in values if one.ndim > 1] + [one for one in values if one.ndim < 2]
        states = {k: {"step": torch.tensor(3.0), "exp_avg": one * 2} for k, one in enumerate(ordered)}
        groups = [{"lr": 0.1, "params": list(range(len(ordered)))}]
        torch.save({**contents, "optimizer": {"state": states, "param_groups": groups}}, path)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    done(tmp_path / "u", tmp_path / "back", "--to", "megatron", "--quiet")
    for path in (tmp_path / "m").rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            one = torch.load(path, weights_only=True)
            other = torch.load(tmp_path / "back" / path.relative_to(tmp_path / "m"), weights_only=True)
        assert [list(one[chunk]) for chunk in ("model0", "model1")] == [list(other[chunk]) for chunk in ("model0", "model1")]
        for number, states in one["optimizer"]["state"].items():
            assert torch.equal(states["exp_avg"], other["optimizer"]["state"][number]["exp_avg"]), number
    done(tmp_path / "u", tmp_path / "v1", "--to", "megatron", "--mesh", "pp=1", "--quiet")
    done(tmp_path / "v1", tmp_path / "w", "--quiet")
    assert main(["diff", str(tmp_path / "u"), str(tmp_path / "w"), "--quiet"]) == 6  # but for what args say of stages
    done(tmp_path / "u", tmp_path / "v2", "--to", "megatron", "--mesh", "pp=2,v=1", "--quiet")
    assert {key for one in tensors(tmp_path / "v2").values() for key in one} == {"model", "args"}


def test_a_layout_of_stages_in_args_stays_with_its_mesh(tmp_path, monkeypatch) -> None:
    """An object of Megatron's own, which is data here, and is Megatron's again at the source's mesh."""
    module = types.ModuleType("megatron.core.transformer.pipeline_parallel_layer_layout")
    layout = type("PipelineParallelLayerLayout", (), {"__module__": module.__name__})
    vars(module)["PipelineParallelLayerLayout"] = layout
    for name in ("megatron", "megatron.core", "megatron.core.transformer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = layout()
    vars(made)["input_data"] = "Et*3|t|t*2L"
    megatron(tmp_path / "m", [[3, 1, 2]])
    for path in (tmp_path / "m").rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, weights_only=True)
        vars(contents["args"])["pipeline_model_parallel_layout"] = made
        torch.save(contents, path)
    done(tmp_path / "m", tmp_path / "u", "--quiet")
    done(tmp_path / "u", tmp_path / "back", "--to", "megatron", "--quiet")
    with torch.serialization.safe_globals([argparse.Namespace, layout]):
        (found,) = {
            torch.load(path, weights_only=True)["args"].pipeline_model_parallel_layout.input_data
            for path in (tmp_path / "back").rglob("*.pt")
        }
    assert found == "Et*3|t|t*2L"
    said = done(tmp_path / "u", tmp_path / "n", "--to", "megatron", "--mesh", "pp=2")
    assert "not carried: /args/pipeline_model_parallel_layout: it says how the source's layers were cut into stages" in said


def test_layers_that_no_file_holds_are_refused(tmp_path) -> None:
    megatron(tmp_path / "m", [[3, 1, 2]])
    path = next((tmp_path / "m").rglob("mp_rank_00_001/*.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        contents = torch.load(path, weights_only=True)
    contents["model"] = {}
    torch.save(contents, path)
    code, said = convert(tmp_path / "m", tmp_path / "u")
    assert (code, "sizes (3, 0, 2) add up to 5 in 3 shares: expected 6 in 3" in said) == (1, True)


def test_a_list_that_is_given_stands_in_the_layout(tmp_path) -> None:
    """A program of one's own that needs a list: what was converted by it can be converted again."""
    megatron(tmp_path / "m", [[3, 1, 2]])
    assert main(["convert", str(tmp_path / "m"), "x", "--show-rules"]) == 0
    (tmp_path / "my.ucl").write_text(
        "ucl 1\nneeds stages, num_layers\nmesh m = pp, tp\nin model\n"
        "    decoder.layers.{i: num_layers/pp:stages}.{*n}  ...  same tp\n"
        "    decoder.final_layernorm.weight  h  same tp  last pp\n    output_layer.weight  ...  same tp  last pp\n"
        "    embedding.word_embeddings.weight  ...  same tp  first pp\n"
    )
    given = ["--rules", tmp_path / "my.ucl", "--set", "stages=3,1,2"]
    done(tmp_path / "m", tmp_path / "u", *given, "--quiet")
    assert "stages = (3, 1, 2)" in (ek.open(tmp_path / "u").manifest.layout_text or "")
    done(tmp_path / "u", tmp_path / "back", "--to", "megatron", "--quiet")
    same(tensors(tmp_path / "m"), tensors(tmp_path / "back"))


@pytest.mark.parametrize(("ep", "more"), [(0, {}), (None, {"decoder.layers.0.mlp.router.weight": torch.ones(4, 8)})])
def test_experts_are_refused_by_name_with_a_way_on(tmp_path, capsys, ep: int | None, more: dict[str, torch.Tensor]) -> None:
    args = argparse.Namespace(**ARGS, num_experts=4, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    model = {"embedding.word_embeddings.weight": torch.ones(16, 8), **more}
    rank_file(tmp_path / "m", {"args": args, "model": model}, 0, 0 if ep is not None else None, ep)
    code, said = convert(tmp_path / "m", tmp_path / "u")
    assert code == 1
    assert "is for dense GPT models; this release ships none for experts: change the one that --show-rules prints" in said
    assert main(["convert", str(tmp_path / "m"), "x", "--show-rules"]) == 0
    assert "mesh dense = pp, tp" in capsys.readouterr().out
