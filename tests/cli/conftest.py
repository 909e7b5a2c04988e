"""Real checkpoints for the commands: one of four ranks, one in this process with what models rarely have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from layouts import save_at

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.testing.ranks import run_ranks

Json = dict[str, object]


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of TP2 x FSDP2: never changed by a test."""
    path = tmp_path_factory.mktemp("cli") / "step-7"
    run_ranks(save_at, 4, "tp2fsdp2", str(path))
    return path


@pytest.fixture
def damaged(four_ranks: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(four_ranks, tmp_path / "step-7"))


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process: two dtypes of one parameter, extra tensors, zero-size arrays, odd names, per-rank values."""
    path = tmp_path_factory.mktemp("cli") / "odd"
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({str(k): torch.nn.Linear(3, 3) for k in range(12)})
    model["12"] = torch.nn.Linear(3, 5)
    model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    loader = {"note": "a\x1b[31mred\u202e", "of": (1, 2.5, None)}
    seen = ek.PerRank({"position": 17, "blob": b"\0" * 300})
    extra = {"mean": torch.zeros(4), "empty": torch.zeros(0, 4), "deep/er": {"名前": torch.ones(2, 2)}}
    ek.save({"model": model, "optimizer": optimizer, "loader": loader, "seen": seen, "stats": extra}, path)
    return path


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Json]]:
    """Runs a command with `--json`: its exit code, and its answer, which follows the command's schema. [CLI-21, CLI-32]"""

    def run(*argv: object) -> tuple[int, Json]:
        code = main([*map(str, argv), "--json"])
        out = capsys.readouterr().out
        assert out.isascii()  # [CLI-6]
        assert out.count("\n") == 1
        answer = json.loads(out)
        assert list(SCHEMAS[str(argv[0])].iter_errors(answer)) == []
        return code, answer

    return run


def _schema(command: str) -> Draft202012Validator:
    path = Path(__file__).parents[2] / "spec" / "schemas" / f"cli-{command}.schema.json"
    schema = json.loads(path.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


SCHEMAS = {command: _schema(command) for command in ("inspect", "verify")}
