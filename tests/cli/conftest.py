"""Real checkpoints and runs for the commands: one of four ranks, one in this process with what models rarely have."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from layouts import save_at
from run_actors import begun, by, commit_of

import elastickpt as ek
from elastickpt.cli.main import main
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.ledger.epochs import Holding, decide, open_attempt
from elastickpt.ledger.names import AttemptId
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Claim, encode_claim
from elastickpt.storage.local import LocalStore
from elastickpt.storage.opening import path_in
from tools.gloo_ranks import run_ranks

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


@pytest.fixture(scope="session")
def whole_run(four_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Epoch 1 commits 10, 20, 30; epoch 2 goes on from 20 and commits 30 and, on four ranks, 40; epoch 3 never adopted.

    Real checkpoints: never changed by a test.
    """
    root = tmp_path_factory.mktemp("cli") / "llama"
    root.mkdir()
    store = LocalStore(root)
    small = root.parent / "small"
    ek.save({"w": torch.arange(6.0)}, small)
    first = begun(store, job=1)
    kept = [_committed(store, first, step, small, loss) for step, loss in ((10, 3.5), (20, 2.25), (30, math.nan))]
    second = begun(store, job=2, continued=kept[1])
    _committed(store, second, 30, small, 2.5)
    _committed(store, second, 40, four_ranks, 2.75)
    store.create("commits/epoch-3.json", encode_claim(Claim(3, by(3))))
    return root


@pytest.fixture
def llama(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole_run, tmp_path / "llama"))


def _committed(store: LocalStore, holding: Holding, step: int, source: Path, loss: float) -> AttemptId:
    """A copy of a checkpoint, as the run's at `step`."""
    attempt = complete(open_attempt(store, holding, step=step))
    folder = Path(shutil.copytree(source, path_in(store, attempt.folder)))
    manifest = decode_manifest((folder / "checkpoint.json").read_bytes(), path="checkpoint.json")
    data = encode_manifest(replace(manifest, step=step))
    (folder / "checkpoint.json").write_bytes(data)
    register = commit_of(attempt, digest=file_digest(data), nbytes=1000 + step, metrics=(("loss", loss),))
    assert complete(decide(store, register)) == register
    return attempt


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Json]]:
    """Runs a command with `--json`: its exit code, and its answer, which follows the command's schema. [CLI-21, CLI-32]"""

    def run(*argv: object) -> tuple[int, Json]:
        code = main([*map(str, argv), "--json"])
        out = capsys.readouterr().out
        assert out.isascii()  # [CLI-6]
        assert out.count("\n") == 1
        answer = json.loads(out)
        schema = "inspect-run" if answer["schema"] == "ckpt-convert.inspect-run/1" else str(argv[0])
        assert list(SCHEMAS[schema].iter_errors(answer)) == []
        return code, answer

    return run


def _schema(command: str) -> Draft202012Validator:
    path = Path(__file__).parents[2] / "spec" / "schemas" / f"cli-{command}.schema.json"
    schema = json.loads(path.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


SCHEMAS = {command: _schema(command) for command in ("adopt", "inspect", "inspect-run", "verify")}
