"""Training jobs as processes of their own, watched through their logs. Only what was started here is ever killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SCRIPT = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Event:
    """One line of a rank's log: `start`, `load`, `seam`, `step` or `save`. `seconds` that training stood still for a load or a
    save, `durable` until the checkpoint existed; `loss` of a step."""

    event: str
    layout: str
    time: float
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    durable: float = 0.0
    folder: str = ""
    pid: int = 0


class Job:
    """One launch of train.py, under torchrun where there are several ranks. What it prints goes to `out`/`name`.txt."""

    def __init__(self, name: str, out: Path, root: Path, *, ranks: int, options: list[str]) -> None:
        self.name, self.root, self.output = name, root, out / f"{name}.txt"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, str(SCRIPT), "--root", str(root), *options]
        self.seen_nbytes = {rank: nbytes_of(self.log(rank)) for rank in range(ranks)}
        self.launched = time.time()
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def log(self, rank: int) -> Path:
        return self.root / f"log-{rank}.jsonl"

    def events(self, rank: int = 0) -> list[Event]:
        """What `rank` logged since the last call."""
        path = self.log(rank)
        if not path.exists():
            return []
        with open(path, "rb") as file:
            file.seek(self.seen_nbytes[rank])
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self.seen_nbytes[rank] += len(whole)
        return [Event(**json.loads(line)) for line in whole.splitlines()]

    def watch(self) -> Iterator[Event]:
        """What rank 0 logs, as it comes, until the job has ended."""
        ended = False
        while not ended:
            ended = self.process.poll() is not None
            yield from self.events()
            time.sleep(0.0 if ended else 0.05)

    def kill(self, rank: int) -> int:
        """Send SIGKILL to `rank`, whose pid is in its log and must be that of a child of this job; returns the pid."""
        pid = next(event.pid for event in self.events(rank) if event.event == "start")
        if psutil.Process(pid).ppid() != self.process.pid:
            raise RuntimeError(f"process {pid} is not a rank of job {self.name}")
        os.kill(pid, signal.SIGKILL)
        return pid

    def tail(self) -> str:
        """The end of what the job printed."""
        return self.output.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """End the job if it still runs; torchrun ends its ranks."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()


def nbytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
