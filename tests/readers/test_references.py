"""A packed checkpoint through `references.json`, by readers that know nothing of packs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from torch import nn

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.layout import references

sys.path.append(str(Path(__file__).parent.parent / "save"))

Truth = dict[str, np.ndarray]


def options(folder: Path, file: Path | None = None) -> dict[str, Any]:
    file = file or folder / "references.json"
    return {"fo": str(file), "remote_protocol": "file", "template_overrides": {"root": str(folder)}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Truth]:
    """A checkpoint that was moved since it was saved, and what it holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1001), nn.BatchNorm1d(1001))
    state = {"model": model, "more": {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "flags": torch.arange(3) > 1}}
    ek.save(state, tmp_path / "first", placement="packed")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    truth = {f"params/model/{name}/value": tensor.numpy() for name, tensor in model.state_dict().items()}
    return tmp_path / "moved", truth | {f"extra/more/{name}": tensor.numpy() for name, tensor in state["more"].items()}


@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"])
def test_zarr_reads_every_array_of_a_moved_folder(saved: tuple[Path, Truth], pipeline: str) -> None:
    """[UCF-161, UCF-162]"""
    pytest.importorskip(pipeline.partition(".")[0])
    folder, truth = saved
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        group = zarr.open_group("reference://", mode="r", storage_options=options(folder))
        found = {key: node[...] for key, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert found.keys() == truth.keys()
    for key, array in truth.items():
        assert found[key].dtype == array.dtype
        assert found[key].tobytes() == array.tobytes()


def test_xarray_opens_the_tree(saved: tuple[Path, Truth]) -> None:
    folder, truth = saved
    kwargs = {"storage_options": options(folder)}
    tree = xarray.open_datatree("reference://", engine="zarr", backend_kwargs=kwargs, mask_and_scale=False)  # type: ignore[arg-type]
    for key, array in truth.items():
        assert np.array_equal(tree[key].values, array)


def test_our_own_readers_never_look_at_it(saved: tuple[Path, Truth]) -> None:
    """[UCF-164]"""
    folder, truth = saved
    (folder / "references.json").write_text("no JSON")
    key = "params/model/1.weight/value"
    assert np.array_equal(ek.open(folder).arrays[key][:], truth[key])
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1001), nn.BatchNorm1d(1001))
    ek.load({"model": model}, folder, strict="missing")
    assert np.array_equal(model[1].weight.detach().numpy(), truth[key])
    assert {problem.kind for problem in ek.open(folder).verify().problems} == {"document-mismatch"}
    (folder / "references.json").unlink()
    assert ek.open(folder).verify().problems == ()


def test_a_reference_out_of_the_folder_is_unsafe(saved: tuple[Path, Truth]) -> None:
    """[UCF-163]"""
    folder, _ = saved
    text = (folder / "references.json").read_text()
    for path in ("/etc/passwd", "{{root}}/../x", "file:///etc/passwd", "{{root}}//etc/passwd"):
        changed = json.loads(text)
        changed["refs"]["params/model/0.weight/value/c.0.0"][0] = path
        (folder / "references.json").write_text(json.dumps(changed))
        assert {problem.kind for problem in ek.open(folder).verify().problems} == {"unsafe"}
    (folder / "references.json").write_text(json.dumps(json.loads(text), indent=1))
    assert ek.open(folder).verify().problems == (), "the same in other words"


def test_beyond_the_limits_the_command_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """[UCF-162, CLI-45, CLI-46]"""
    monkeypatch.setattr(references, "MAX_ARRAYS", 2)
    state = {f"t{n}": torch.arange(4) + n for n in range(3)}
    path, file = tmp_path / "c", tmp_path / "refs.json"
    ek.save(state, path, placement="packed")
    assert not (path / "references.json").exists()
    assert main(["references", str(path), "--dry-run", "-o", str(file)]) == 0
    assert not file.exists()
    assert main(["references", str(path), "-o", str(file)]) == 0
    assert "3 arrays" in capsys.readouterr().err
    group = zarr.open_group("reference://", mode="r", storage_options={"fo": str(file), "remote_protocol": "file"})
    assert [group[f"extra/t{n}"][:].tolist() for n in range(3)] == [[n, n + 1, n + 2, n + 3] for n in range(3)]
    assert main(["references", str(path), "-o", str(file)]) == 1
    assert main(["references", str(path), "-o", str(path / "references.json")]) == 0
    assert ek.open(path).verify().problems == ()
    assert main(["references", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["templates"] == {"root": str(path)}
    ek.save(state, tmp_path / "plain", placement="plain")
    assert main(["references", str(tmp_path / "plain")]) == 1
    assert "plain" in capsys.readouterr().err


def test_a_second_save_of_a_structure_has_references_of_its_own(tmp_path: Path) -> None:
    state = {"t": torch.zeros(6)}
    for number in range(3):
        state["t"].fill_(number)
        info = ek.save(state, tmp_path / str(number), placement="packed")
        assert ek.open(info.path).verify().problems == ()
        group = zarr.open_group("reference://", mode="r", storage_options=options(Path(info.path)))
        assert group["extra/t"][:].tolist() == [number] * 6


def test_what_stands_in_several_packs_is_left_out_and_named(tmp_path: Path, capsys: Any) -> None:
    """50,257 rows on TP2 and FSDP4 beside an array that is cut evenly. [UCF-161, FRAG-60, FRAG-66]"""
    from imagined import held, job_of, live

    from elastickpt.format.arrays import Mesh
    from elastickpt.saving.request import Placing
    from elastickpt.storage.local import LocalStore

    mesh = Mesh("fsdp.tp", ("fsdp", "tp"), (4, 2), tuple(range(8)))
    shapes = {"vocabulary": (50257, 2), "even": (16, 4)}
    wholes = {name: np.arange(shape[0] * shape[1], dtype="<f4").reshape(shape) for name, shape in shapes.items()}
    ways = ("_S(0)", "S(0)")
    states = [live(*(held(name, shape, rank, mesh, ways) for name, shape in shapes.items())) for rank in range(8)]
    job = job_of(states, Placing("packed"))
    store = LocalStore(tmp_path)
    draft = job.draft(store, "c")
    job.commit(store, draft, [job.write(store, draft, rank, wholes) for rank in range(8)])
    checkpoint = ek.open(tmp_path / "c")
    assert checkpoint.verify().problems == ()
    for name, whole in wholes.items():
        assert np.array_equal(checkpoint.arrays[f"params/model/{name}/value"][:], whole)
    group = zarr.open_group("reference://", mode="r", storage_options=options(tmp_path / "c"))
    assert [key for key, node in group.members(max_depth=None) if isinstance(node, zarr.Array)] == ["params/model/even/value"]
    assert np.array_equal(group["params/model/even/value"][:], wholes["even"])
    assert main(["references", str(tmp_path / "c"), "--dry-run"]) == 0
    assert "left out: params/model/vocabulary/value" in capsys.readouterr().err
