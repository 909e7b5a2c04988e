"""A rank of a real torchrun job is killed, torchrun starts all of them again: the run goes on from a whole step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elastickpt as ek
from elastickpt.ledger.branch import history

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
BOUND_S = 240.0


def events(root: Path, rank: int) -> list[dict[str, object]]:
    path = root / f"log-{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_a_job_into_the_same_run(tmp_path: Path, victim: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(TRAIN), "--root", str(tmp_path), "--layout", "fsdp2", "--steps", "24", "--save-every", "3"]
    # torchrun's agent hands one store to every life of the job, in which gloo of torch 2.13 finds addresses of dead ranks
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "output.txt", "wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
    try:
        until = time.monotonic() + BOUND_S
        while not any(event["event"] == "step" and int(str(event["step"])) >= 10 for event in events(tmp_path, 0)):
            assert time.monotonic() < until, (tmp_path / "output.txt").read_text()[-3000:]
            assert job.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
            time.sleep(0.02)
        pid = next(int(str(event["pid"])) for event in events(tmp_path, victim) if event["event"] == "start")
        os.kill(pid, signal.SIGKILL)
        assert job.wait(BOUND_S) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(30)
    loaded = [event["step"] for event in events(tmp_path, 0) if event["event"] == "load"]
    assert loaded in ([6], [9], [12])  # committed before the kill, or adopted after it
    live = [entry.step for entry in history(tmp_path) if entry.state == "live"]
    assert live == list(range(24, 0, -3))
    for step in live:
        assert ek.open(tmp_path, step=step).verify().problems == ()
