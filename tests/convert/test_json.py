"""What `diff --json` and `check --json` print follows its schema, whatever the outcome. [CLI-72, CLI-81]"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from elastickpt.cli.main import main

SCHEMAS = Path(__file__).parents[2] / "spec" / "schemas"


def printed(capsys: pytest.CaptureFixture[str], code: int, command: str, *words: object) -> dict[str, Any]:
    """What the command printed, valid by its schema, which a changed one is not."""
    capsys.readouterr()
    assert main([command, *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    validator = Draft202012Validator(json.loads((SCHEMAS / f"cli-{command}.schema.json").read_text()))
    validator.validate(found)
    for name in found:
        less = copy.deepcopy(found)
        del less[name]
        assert not validator.is_valid(less), name
    assert not validator.is_valid({**found, "more": 1})
    return found


def saved(path: Path, **changes: object) -> Path:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2), "c": torch.ones(2)}
    group = {"lr": changes.pop("lr", 0.1), "params": [0], "param_names": ["b"]}
    step = changes.pop("step", 3)
    weights.update(changes)  # type: ignore[arg-type]  # tensors are left
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [group]}
    torch.save({"model": {k: v for k, v in weights.items() if v is not None}, "optimizer": state, "step": step}, path)
    return path


def test_of_differences(tmp_path, capsys) -> None:
    one = saved(tmp_path / "a.pt")
    other = saved(
        tmp_path / "b.pt", a=torch.zeros(2, 3), b=torch.ones(2).half(), c=torch.ones(3), d=torch.ones(1), lr=0.2, step=4
    )
    assert printed(capsys, 0, "diff", one, one)["differences"] == []
    found = printed(capsys, 6, "diff", one, other)["differences"]
    whats = {"values", "dtype", "shape", "only in B", "setting", "value"}
    assert {each["what"] for each in found} == whats
    (values,) = [each for each in found if each["what"] == "values"]
    assert (values["max_abs"], values["max_rel"], values["index"]) == (5.0, 1.0, [0, 1])
    assert {each["what"] for each in printed(capsys, 6, "diff", other, one)["differences"]} == whats - {"only in B"} | {
        "only in A"
    }
    odd = saved(tmp_path / "c.pt", a=torch.full((2, 3), float("nan")))
    (values,) = printed(capsys, 6, "diff", one, odd)["differences"]
    assert values["max_abs"] is None  # nothing of the difference is a number
    assert printed(capsys, 1, "diff", one, tmp_path / "absent")["error"]["kind"] == "not-a-checkpoint"


def test_of_checks(tmp_path, capsys) -> None:
    assert printed(capsys, 0, "check", "megatron")["right"]
    (tmp_path / "wrong.ucl").write_text("ucl 1\nmesh m = tp\nin model\n    a  h\n")
    found = printed(capsys, 1, "check", tmp_path / "wrong.ucl")
    assert found["error"]["kind"] == "program"
    assert "wrong.ucl:4:5" in found["error"]["message"]
    (tmp_path / "whole.ucl").write_text("ucl 1\nmesh one =\nin {*item}\n    {*name}  ...\n")
    one, other = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt", a=torch.zeros(2, 3))
    assert printed(capsys, 0, "check", tmp_path / "whole.ucl", "--against", one)["right"]
    found = printed(capsys, 6, "check", tmp_path / "whole.ucl", "--against", one, "--against", other)
    assert [each.split(":")[0] for each in found["differences"]] == ["params/model/a/value"]
