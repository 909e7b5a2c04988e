"""From files at one mesh to universal and to files at another mesh, at random: every tensor is that of the dense truth."""

from __future__ import annotations

import argparse
import shutil
from math import prod
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.format.arrays import ArrayId
from elastickpt.language.parse import parse
from elastickpt.language.placing import PlacedTensor, place
from elastickpt.language.renaming import NamedShape
from elastickpt.language.rules import resolve
from tests.language.test_rules import cut

RULES = """\
ucl 1
needs layers, heads, groups
let q = heads/groups
mesh m = pp, tp
in model
    embed                pad(vocab, 3*|tp|)/tp  h                    first pp
    l.{{i: layers/pp{stages}}}.
        norm             h                                           same tp
        qkv              (groups (q + 1 + 1) 2)/tp  h
        glu              (2 f/tp:balanced)  h
        down             h  f/tp:balanced
        experts          as e.{{e}}  (e=4)  f/tp:balanced    optional
    head                 vocab/tp:chunk  h                           last pp
"""


def placed(text: str, dense: dict[str, np.ndarray], constants: dict[str, int], pp: int, tp: int) -> tuple[PlacedTensor, ...]:
    rules = resolve(parse(text), constants, {"pp": pp, "tp": tp})
    return place(rules, [NamedShape(name, one.shape) for name, one in dense.items()])


def padded(dense: dict[str, np.ndarray], tensors: tuple[PlacedTensor, ...]) -> dict[str, np.ndarray]:
    """The arrays as this mesh pads them, with other numbers in the padding."""
    wide = {part.array: part.held.whole for one in tensors for part in one.parts}
    found = dict(dense)
    for name, shape in wide.items():
        if shape != dense[name].shape:
            found[name] = np.full(shape, 7777)
            found[name][: len(dense[name])] = dense[name]
    return found


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_at_random_meshes(tmp_path, data: st.DataObject) -> None:
    layers, groups, q = (data.draw(st.integers(1, 4), label=name) for name in ("layers", "groups", "q"))
    vocab, f, h = data.draw(st.integers(5, 20)), data.draw(st.integers(4, 9)), data.draw(st.integers(1, 3))
    rows = groups * (q + 2) * 2
    meshes = [
        (data.draw(st.integers(1, 3)), data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if rows % n == 0]))) for _ in "ab"
    ]
    constants = {"layers": layers, "heads": groups * q, "groups": groups, "vocab": vocab, "f": f}
    text = RULES.format(stages=":balanced").replace("groups\nlet", "groups, vocab, f\nlet")
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, h), "head": (vocab, h)}
    for i in range(layers):
        shapes |= {f"l.{i}.norm": (h,), f"l.{i}.qkv": (rows, h), f"l.{i}.glu": (2 * f, h), f"l.{i}.down": (h, f)}
        shapes |= {f"l.{i}.e.{e}": (f,) for e in range(4)}
    count, dense = 1, {}
    for name, shape in shapes.items():
        dense[name] = np.arange(count, count + prod(shape)).reshape(shape)
        count += prod(shape)
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    source = tmp_path / "x" / "m"
    (pp, tp), (pp2, tp2) = meshes
    tensors = placed(text, dense, constants, pp, tp)
    wide = padded(dense, tensors)
    for p in range(pp):
        for k in range(tp):
            model = {o.name: torch.from_numpy(cut(o, wide)) for o in tensors if dict(o.coordinate) == {"pp": p, "tp": k}}
            args = argparse.Namespace(**constants, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
            folder = source / (f"mp_rank_{k:02d}_{p:03d}" if pp > 1 else f"mp_rank_{k:02d}")
            folder.mkdir(parents=True)
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model}, folder / "model_optim_rng.pt")
    (tmp_path / "x" / "my.ucl").write_text(text)
    out = tmp_path / "x" / "u"
    assert main(["convert", str(source), str(out), "--rules", str(tmp_path / "x" / "my.ucl"), "--quiet"]) == 0
    for name, one in dense.items():
        found = ek.open(out).read(ArrayId("params", "model", name, "value"))
        assert np.array_equal(found[: len(one)], one), name
    words = ["--to", "megatron", "--mesh", f"pp={pp2},tp={tp2}", "--quiet"]
    assert main(["convert", str(out), str(tmp_path / "x" / "n"), *words]) == 0
    again = read(tmp_path / "x" / "n")
    wanted = placed(text, dense, constants, pp2, tp2)
    zeros = {name: np.where(one == 7777, 0, one) for name, one in padded(dense, wanted).items()}
    rows = len(zeros["embed"])
    if rows <= len(wide["embed"]):  # what stays of the padding keeps its numbers
        zeros["embed"] = wide["embed"][:rows]
    for one in wanted:
        at = dict(one.coordinate)
        assert np.array_equal(again[at["pp"], at["tp"]][one.name].numpy(), cut(one, zeros)), (at, one.name)
    assert sum(map(len, again.values())) == len(wanted)


def test_a_tensor_that_feeds_several_arrays_in_one_process(tmp_path) -> None:
    """The first of them lies in it as in itself, and is only its begin."""
    stacked = torch.arange(12, dtype=torch.int64).reshape(3, 4)
    args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    folder = tmp_path / "m" / "mp_rank_00"
    folder.mkdir(parents=True)
    model = {"experts": stacked}
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model}, folder / "model_optim_rng.pt")
    (tmp_path / "my.ucl").write_text("ucl 1\nmesh m = pp, tp\nin model\n    experts  as e.{e}  (e=3)  4/tp  first pp\n")
    out = tmp_path / "u"
    assert main(["convert", str(tmp_path / "m"), str(out), "--rules", str(tmp_path / "my.ucl"), "--quiet"]) == 0
    for e in range(3):
        found = ek.open(out).read(ArrayId("params", "model", f"e.{e}", "value"))
        assert np.array_equal(found, stacked[e].numpy()), e


def read(folder: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    found = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in folder.rglob("*.pt"):
            _, _, tp, *pp = path.parent.name.split("_")
            found[int(pp[0]) if pp else 0, int(tp)] = torch.load(path, weights_only=True)["model"]
    return found
