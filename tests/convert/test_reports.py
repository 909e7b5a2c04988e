"""What `convert --json` says follows its schema, and what a dry run reads. [CLI-62, CLI-63, CLI-59]"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from noted_reads import noted_reads

from elastickpt.cli.main import main
from elastickpt.convert import engine

SCHEMA = Draft202012Validator(
    json.loads((Path(__file__).parents[2] / "spec" / "schemas" / "cli-convert.schema.json").read_text())
)


@pytest.fixture
def told(capsys):
    def run(*words: object) -> tuple[int, dict[str, object]]:
        code = main(["convert", "--json", *map(str, words)])
        answer = json.loads(capsys.readouterr().out)
        assert list(SCHEMA.iter_errors(answer)) == []
        return code, answer

    return run


@pytest.mark.parametrize("form", ["universal", "megatron", "dcp", "hf", "torch"])
def test_a_report_says_what_was_written(megatron_case, tmp_path, told, form: str) -> None:
    code, answer = told(megatron_case.folder / "checkpoint", tmp_path / "out", "--to", form)
    assert (code, answer["dry_run"], answer["resumed"]) == (0, False, 0)
    assert {(one["name"], one["state"]) for one in answer["arrays"]} >= {("decoder.final_layernorm.weight", "value")}
    for file in answer["files"]:
        path = tmp_path / "out" / file["path"] if (tmp_path / "out").is_dir() else tmp_path / "out"
        assert path.stat().st_size == file["nbytes"]
    assert any(one["name"] == "/rng_state" for one in answer["not_carried"]) or form == "universal" or answer["not_carried"]


def test_an_error_has_kind_and_message(megatron_case, tmp_path, told) -> None:
    code, answer = told(megatron_case.folder / "checkpoint", tmp_path / "out", "--names", "gpt2-hf")
    assert (code, answer["error"]["kind"]) == (1, "program")


def test_an_interrupted_conversion_that_goes_on_is_said(megatron_case, tmp_path, told, monkeypatch) -> None:
    source, out = megatron_case.folder / "checkpoint", tmp_path / "out"
    told_ = engine._Teller.__call__

    def interrupt(self, nbytes: int) -> None:
        told_(self, nbytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._Teller, "__call__", interrupt)
    assert main(["convert", str(source), str(out), "--quiet"]) == 130
    monkeypatch.setattr(engine._Teller, "__call__", told_)
    code, answer = told(source, out)
    assert code == 0
    assert answer["resumed"] > 0
    assert "goes on" in answer["said"][-1]


def test_a_dry_run_reads_no_tensor_and_writes_nothing(megatron_case, tmp_path, told, monkeypatch) -> None:
    """Of files of torch only their heads, pickles and directories; 0-d states neither."""
    from elastickpt.foreign.folder import open_folder
    from elastickpt.foreign.formats import find_source, read_foreign

    source = megatron_case.folder / "checkpoint"
    ranges = noted_reads(monkeypatch)
    code, _ = told(source, tmp_path / "out", "--dry-run")
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    read = list(ranges)
    listing = read_foreign(find_source(open_folder(str(source)), None, None))
    tensors = [one.stored for rank in listing.ranks for one in rank.tensors]
    assert any(one.shape == () for one in tensors)
    for stored in tensors:
        low, high = stored.start, stored.start + stored.nbytes
        assert not [one for one in read if one[0] == stored.storage.file and one[1] < high and low < one[2]], stored
