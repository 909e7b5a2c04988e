"""Which format a source has: by what it holds, and by the word of `--from`. [FOR-80, FOR-82, FOR-83]"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from elastickpt.errors import MissingFile, NotACheckpoint, Refused, Unsupported
from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.formats import WORDS, find_source, read_foreign
from elastickpt.storage.opening import open_store


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["checkpoint.json", "params/zarr.json"], "universal"),
        ([".metadata", "__0_0.distcp"], "dcp"),
        ([".metadata", "__0_0.distcp", "common.pt", "metadata.json"], "megatron-dist"),
        (["model.safetensors", "config.json"], "safetensors"),
        (["model.safetensors.index.json", "a.safetensors"], "safetensors"),
        (["model.safetensors", "optimizer.pt", "rng_state_0.pth", "training_args.bin"], "safetensors"),
        (["pytorch_model.bin"], "torch"),
        (["consolidated.00.pth", "params.json"], "torch"),
        (["mp_rank_00/model_optim_rng.pt"], "megatron-legacy"),
        (["mp_rank_00_000/model_optim_rng.pt", "mp_rank_01_000/model_optim_rng.pt"], "megatron-legacy"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"], "deepspeed"),
        (["mp_rank_00_model_states.pt", "zero/optimizer_state.pt"], "deepspeed-universal"),
    ],
)
def test_a_folder_is_known_by_its_names(tmp_path, names, found) -> None:
    assert find_source(open_folder(touched(tmp_path, *names))).format == found


@pytest.mark.parametrize(
    ("names", "word", "found"),
    [
        (["model.safetensors", "pytorch_model.bin"], "hf", "safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "plain", "torch"),
        (["mp_rank_00/model_optim_rng.pt"], "megatron", "megatron-legacy"),
        ([".metadata", "common.pt"], "megatron", "megatron-dist"),
        ([".metadata", "common.pt"], "torch_dist", "megatron-dist"),
        (["rank_0.pt"], "fsdp1", "fsdp1"),
    ],
)
def test_a_word_says_which(tmp_path, names, word, found) -> None:
    assert find_source(open_folder(touched(tmp_path, *names)), word).format == found


@pytest.mark.parametrize(
    ("names", "word", "error"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, Refused),
        (["model.safetensors", ".metadata"], None, Refused),
        (["checkpoint.json", "mp_rank_00/a.pt"], None, Refused),
        ([], None, NotACheckpoint),
        (["notes.txt"], None, NotACheckpoint),
        (["model.safetensors"], "dcp", NotACheckpoint),
        ([".metadata"], "megatron", NotACheckpoint),
        (["model.safetensors"], "onnx", Refused),
    ],
)
def test_several_formats_none_and_another_are_refused_with_what_was_found(tmp_path, names, word, error) -> None:
    with pytest.raises(error) as caught:
        find_source(open_folder(touched(tmp_path, *names)), word)
    assert type(caught.value) is error
    assert any(choice in str(caught.value) for choice in WORDS)
    if names and names[0] == "model.safetensors" and word != "onnx":
        assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("names", [[".metadata", "common.pt"], ["a_model_states.pt"], ["a_model_states.pt", "zero/"]])
def test_a_format_that_is_not_read_is_refused_by_name(tmp_path, names) -> None:
    source = find_source(open_folder(touched(tmp_path, *names)))
    with pytest.raises(Unsupported, match=source.format):
        read_foreign(source)


def test_a_file_is_known_by_its_first_bytes(tmp_path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "weights")
    save_file({"a": torch.ones(1)}, tmp_path / "others")
    (tmp_path / "text").write_text("hello, this is text")
    assert find_source(open_folder(tmp_path / "weights")).format == "torch"
    assert find_source(open_folder(tmp_path / "others")).format == "safetensors"
    with pytest.raises(NotACheckpoint, match="text"):
        find_source(open_folder(tmp_path / "text"))
    with pytest.raises(Refused, match="one file"):
        find_source(open_folder(tmp_path / "weights"), step=3)
    with pytest.raises(NotACheckpoint, match="nothing is there"):
        open_folder(tmp_path / "absent")


def test_a_tracker_names_the_step_and_a_chosen_step_wins(tmp_path) -> None:
    touched(tmp_path, "global_step5/a_model_states.pt", "global_step10/a_model_states.pt")
    (tmp_path / "latest").write_text("global_step10\n")
    source = find_source(open_folder(tmp_path))
    assert source.folder.url.endswith("global_step10")
    assert source.said == ("latest says global_step10: global_step10 is read",)
    assert find_source(open_folder(tmp_path), step=5).folder.url.endswith("global_step5")
    with pytest.raises(NotACheckpoint, match="step 0"):
        find_source(open_folder(tmp_path), step=0)


def test_steps_of_any_writer_can_be_chosen(tmp_path) -> None:
    for step in (10, 100):
        dcp.save({"model": {"a": torch.ones(1)}, "step": step}, checkpoint_id=tmp_path / f"step-{step}")
    assert read_foreign(find_source(open_folder(tmp_path), step=10)).step == 10
    with pytest.raises(NotACheckpoint):
        find_source(open_folder(tmp_path))


def test_a_store_that_is_no_disk_is_read_alike(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    store = open_store("memory://foreign-formats")
    store.make_directories("m")
    store.create("m/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    found = read_foreign(find_source(open_folder("memory://foreign-formats/m")))
    assert [one.name for one in found.wholes] == ["a"]


@pytest.mark.parametrize("name", ["", "/model.safetensors"])
def test_a_folder_or_file_of_fsspec_is_read_alike(tmp_path, name) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    found = read_foreign(find_source(open_folder(f"local://{tmp_path}{name}")))
    assert [one.name for one in found.wholes] == ["a"]


def test_a_cache_of_links_is_read_and_a_link_to_nothing_is_named(tmp_path) -> None:
    """As model hubs keep snapshots, and Megatron's users their newest step. [FOR-8]"""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "1234")
    (blobs / "5678").write_text('{"layers": 3}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").symlink_to("../../blobs/5678")
    (tmp_path / "newest").symlink_to(snapshot)
    (tmp_path / "one.safetensors").symlink_to(blobs / "1234")
    for source in (snapshot, tmp_path / "newest", tmp_path / "one.safetensors"):
        found = read_foreign(find_source(open_folder(source)))
        assert [one.name for one in found.wholes] == ["a"]
        assert found.files[0].nbytes == (blobs / "1234").stat().st_size
    (blobs / "1234").unlink()
    with pytest.raises(MissingFile, match="1234"):
        read_foreign(find_source(open_folder(snapshot)))


def test_a_step_folder_may_be_a_link(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, touched(tmp_path, "steps/step-5/") / "steps" / "step-5" / "model.safetensors")
    touched(tmp_path, "run/")
    (tmp_path / "run" / "step-7").symlink_to(tmp_path / "steps" / "step-5")
    assert read_foreign(find_source(open_folder(tmp_path / "run"), step=7)).format == "safetensors"
