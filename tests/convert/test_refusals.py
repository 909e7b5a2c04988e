"""What is refused, with which exit code; nothing stands at OUT then. [CLI-60, CLI-61, CLI-62, CLI-64, CLI-66, CLI-80]"""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from elastickpt.cli.main import main
from elastickpt.convert import engine
from elastickpt.convert.conversion import open_source, prepare
from elastickpt.convert.options import Options
from elastickpt.errors import Refused
from elastickpt.storage.local import LocalStore


@pytest.fixture
def megatron(megatron_case, tmp_path) -> Path:
    shutil.copytree(megatron_case.folder / "checkpoint", tmp_path / "source")
    return tmp_path / "source"


def refused(capsys, *words: object, code: int = 1) -> str:
    assert main(["convert", *map(str, words)]) == code
    return capsys.readouterr().err


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


def test_out_that_exists_or_lies_inside_the_source(megatron, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "found 1 entries" in refused(capsys, megatron, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    assert "inside SOURCE" in refused(capsys, megatron, megatron / "out")
    assert "inside SOURCE" in refused(capsys, megatron, megatron)
    assert left(tmp_path) == ["out"]


def test_a_rank_without_its_file(megatron, tmp_path, capsys) -> None:
    shutil.rmtree(megatron / "iter_0000003" / "mp_rank_01_001")
    assert "the file of the rank at pp 1, tp 1 is missing" in refused(capsys, megatron, tmp_path / "out", code=3)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "strange=3"], "--set strange: no program here needs it"),
        (["--set", "num_layers=4.5"], "--set num_layers=4.5: expected a whole number"),
        (["--set", "num_layers=5"], "constant 'num_layers': 4 in the files, 5 by --set"),
        (["--set", "swiglu=1", "--set", "swiglu=1"], "--set swiglu is given twice"),
        (["--names", "nothing"], "expected a file or the name of a shipped one"),
        (["--names", "gpt2-hf"], "neither a gate nor squares"),
        (["--to", "strange"], "--to strange: expected one of"),
        (["--only", "nothing"], "nothing is left to convert"),
        (["--cast", "value=float31"], "expected one of the types"),
        (["--cast", "momentum=float32"], "there is no such state"),
        (["--to", "megatron", "--mesh", "dp=2"], "mesh axis 'dp': expected one of pp, tp"),
        (["--to", "megatron", "--mesh", "tp=3"], "cannot be cut evenly 3 ways"),
        (["--from", "dcp"], "expected dcp, found megatron-legacy"),
        (["--workers", "0"], "--workers 0"),
        (["--to", "dcp", "--mesh", "tp=2"], "--mesh: OUT is dcp, which has no axes"),
        (["--rules-out", "megatron"], "--rules-out: OUT is universal, which needs no program"),
        (["--to", "torch", "--config", "."], "--config: OUT is torch, beside which no configuration stands"),
    ],
)
def test_options_that_do_not_fit(megatron, tmp_path, capsys, words: list[str], said: str) -> None:
    assert said in refused(capsys, megatron, tmp_path / "out", *words)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("h  same tp  last pp, v\n", "h  same tp\n"), "is not mentioned"),
        (lambda text: text.replace("    decoder.final_layernorm.weight", "    decoder.last.weight"), "no rule matches it"),
        (lambda text: text.replace("(groups (q + 1 + 1) kv_channels)/tp  h", "groups/tp  h"), "expected shape"),
        (
            lambda text: text.replace("mlp.linear_fc2.weight  h  f/tp", "mlp.linear_fc2.weight  h  f/dp"),
            "axis 'tp' is not mentioned",
        ),
        (lambda text: text + "    strange  h  same pp, tp, v\n", "no tensor has such a name"),
        (lambda text: text.replace("(v pp):stages", "(v pp):(1, 2)"), "sizes (1, 2) add up to 3 in 2 shares"),
        (
            lambda text: text.replace("order optimizer = matrices, vectors", "order optimizer = matrices"),
            "order 'optimizer' has",
        ),
        (lambda text: text.replace("    input_layernorm.weight  h", "    input_layernorm.weight (h"), "expected one of"),
    ],
)
def test_programs_that_do_not_fit_have_a_caret(megatron, tmp_path, capsys, change, said: str) -> None:
    assert main(["convert", str(megatron), str(tmp_path / "out"), "--show-rules"]) == 0
    text = capsys.readouterr().out
    assert change(text) != text
    (tmp_path / "mine.ucl").write_text(change(text))
    found = refused(capsys, megatron, tmp_path / "out", "--rules", tmp_path / "mine.ucl")
    assert said in found
    assert "[program]" in found
    assert "mine.ucl:" in found
    assert "^" in found or "no rule matches it" in found
    assert left(tmp_path) == ["mine.ucl"]


def test_a_name_map_that_gives_a_name_twice_or_leaves_one_over(megatron, tmp_path, capsys) -> None:
    mine = tmp_path / "mine.ucl"
    mine.write_text("ucl 1\ndecoder.layers.{i}.{*n}  ->  all.{*n}\n{*n}  ->  {*n}\n")
    assert "it is given twice" in refused(capsys, megatron, tmp_path / "out", "--names", mine)
    mine.write_text("ucl 1\ndecoder.{*n}  ->  all.{*n}\n")
    said = refused(capsys, megatron, tmp_path / "out", "--names", mine)
    assert "no line of the map has 'embedding.word_embeddings.weight'" in said
    assert left(tmp_path) == ["mine.ucl"]


@pytest.mark.parametrize("form", ["universal", "megatron", "torch"])
@pytest.mark.parametrize("more", [b"more", b""])
def test_a_source_that_changes_meanwhile(megatron, tmp_path, form: str, more: bytes) -> None:
    """By its size, or by its time alone. [CLI-66]"""
    options = Options(str(megatron), str(tmp_path / "out"), target_format=form)
    job = prepare(options, open_source(options))
    file = next(megatron.rglob("*.pt"))
    before = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes() + more)
    os.utime(file, ns=(before, before + (0 if more else 1)))
    with pytest.raises(Refused, match="the source changed meanwhile"):
        engine.carry_out(job)
    assert left(tmp_path) == []


@pytest.mark.parametrize("form", ["universal", "megatron", "torch"])
def test_an_interrupt_leaves_nothing_at_out(megatron, tmp_path, form: str) -> None:
    options = Options(str(megatron), str(tmp_path / "out"), target_format=form)
    job = prepare(options, open_source(options))

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.carry_out(job, progress=interrupt)
    assert not (tmp_path / "out").exists()
    (draft,) = left(tmp_path)
    assert draft.startswith(".out.draft-")
    assert main(["convert", str(megatron), str(tmp_path / "out"), "--to", form, "--quiet"]) == 0
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("form", ["universal", "megatron"])
def test_a_full_disk_leaves_nothing(megatron, tmp_path, capsys, monkeypatch, form: str) -> None:
    from elastickpt.errors import NoSpace

    opened = LocalStore.open_writer
    count = iter(range(1000))

    def full(self: LocalStore, path: str, nbytes: int):
        if next(count) > 0:
            raise NoSpace(f"{path}: no space left on device")
        return opened(self, path, nbytes)

    monkeypatch.setattr(LocalStore, "open_writer", full)
    assert "no space left" in refused(capsys, megatron, tmp_path / "out", "--to", form)
    assert left(tmp_path) == []


def test_a_file_that_is_cut_off_is_damage(megatron, tmp_path, capsys) -> None:
    file = next(megatron.rglob("*.pt"))
    file.write_bytes(file.read_bytes()[:-500])
    refused(capsys, megatron, tmp_path / "out", code=3)
    assert left(tmp_path) == []


@pytest.mark.parametrize("form", ["universal", "megatron", "dcp", "hf"])
def test_several_workers_make_the_same(megatron, tmp_path, form: str) -> None:
    words = ["--to", form, "--quiet", "--names", "megatron-te" if form != "megatron" else "llama-hf"][
        : 3 if form == "megatron" else 5
    ]
    for workers in ("1", "3"):
        assert main(["convert", str(megatron), str(tmp_path / workers), *words, "--workers", workers]) == 0
    assert main(["diff", str(tmp_path / "1"), str(tmp_path / "3"), "--quiet"]) == 0
    if form == "universal":
        assert main(["verify", str(tmp_path / "3"), "--quiet"]) == 0
        assert len(list((tmp_path / "3" / "fragments").iterdir())) == 3
    else:
        for file in (path for path in (tmp_path / "1").rglob("*") if path.is_file()):
            assert file.read_bytes() == (tmp_path / "3" / file.relative_to(tmp_path / "1")).read_bytes(), file


def test_a_universal_source_is_what_from_says_and_stands_alone(megatron, tmp_path, capsys) -> None:
    assert main(["convert", str(megatron), str(tmp_path / "u"), "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "out"), "--from", "dcp"]) == 1
    assert "expected dcp, found universal (checkpoint.json)" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "out"), "--from", "zarr"]) == 1
    assert "format 'zarr' is not known; expected one of universal, dcp" in capsys.readouterr().err
    (tmp_path / "u" / "model.safetensors").write_bytes(b"")
    assert main(["convert", str(tmp_path / "u"), str(tmp_path / "out")]) == 1
    assert "several formats in one folder: universal (checkpoint.json); safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_tells_whether_a_program_is_right(megatron, tmp_path, capsys) -> None:
    assert main(["check", "megatron"]) == 0
    assert main(["check", "llama-hf"]) == 0
    (tmp_path / "wrong.ucl").write_text("ucl 1\nmesh m = tp\nin model\n    a  h\n")
    assert main(["check", str(tmp_path / "wrong.ucl")]) == 1
    assert "wrong.ucl:4:5: axis 'tp' is not mentioned" in capsys.readouterr().err


@pytest.mark.parametrize("names", [[], ["llama-hf"]])
def test_no_byte_of_a_tensor_is_read_twice(megatron, tmp_path, monkeypatch, names: list[str]) -> None:
    """Counted at the store, for splits too: what several arrays come from is read once."""
    options = Options(str(megatron), str(tmp_path / "out"), names=tuple(names))
    job = prepare(options, open_source(options))
    job.source.reading.close()
    ranges: dict[str, list[tuple[int, int]]] = {}
    opened = LocalStore.open_reader

    class Counting:
        def __init__(self, path: str, inner) -> None:
            self.path, self.inner, self.nbytes = path, inner, inner.nbytes

        def read_into(self, offset: int, into: memoryview) -> None:
            ranges.setdefault(self.path, []).append((offset, offset + into.nbytes))
            self.inner.read_into(offset, into)

        def close(self) -> None:
            self.inner.close()

    monkeypatch.setattr(LocalStore, "open_reader", lambda self, path, **more: Counting(path, opened(self, path, **more)))
    engine.carry_out(job)
    read = [one for path, some in ranges.items() if path.endswith(".pt") for one in [sorted(some)]]
    assert len(read) == 4
    for some in read:
        assert all(stop <= start for (_, stop), (start, _) in pairwise(some))
    assert (
        sum(stop - start for some in read for start, stop in some) > job.nbytes
    )  # copies on other ranks are read to be compared
