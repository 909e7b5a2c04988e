"""A job is told to end: `python -m tools.bench.notice [LAYOUT RANKS REPEATS]`, by default fsdp4 4 3.

torchrun trains `examples/train.py`, which saves nothing by itself meanwhile, and gets SIGTERM as a launcher or a spot instance
sends it: 30 seconds before SIGKILL. Measured: seconds from the signal until the last step is committed, and until no process of
the job is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
DEADLINE_S, START_LIMIT_S, STEPS_BEFORE = 30.0, 180.0, 5


def ended(root: Path, layout: str, ranks: int) -> tuple[float, float]:
    """Seconds until committed and until gone, of one job. Raises RuntimeError where it did not commit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(TRAIN)]
    command += ["--root", str(root), "--layout", layout, "--steps", "100000", "--save-every", "100000"]
    with open(root / "output.txt", "wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + START_LIMIT_S
        while not any(one["event"] == "step" and int(str(one["step"])) >= STEPS_BEFORE for one in events(root)):
            if job.poll() is not None or time.monotonic() > until:
                raise RuntimeError((root / "output.txt").read_text()[-2000:])
            time.sleep(0.05)
        told = time.time()
        job.send_signal(signal.SIGTERM)
        job.wait(2 * DEADLINE_S)
        gone = time.time()
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()
    saves = [float(str(one["time"])) for one in events(root) if one["event"] == "save"]
    if len(saves) != 1:
        raise RuntimeError(f"{len(saves)} saves: {(root / 'output.txt').read_text()[-2000:]}")
    return saves[0] - told, gone - told


def events(root: Path) -> list[dict[str, object]]:
    """What rank 0 has logged."""
    path = root / "log-0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def main() -> None:
    layout, ranks, repeats = sys.argv[1:4] if len(sys.argv) > 3 else ("fsdp4", "4", "3")
    found = []
    for _ in range(int(repeats)):
        with tempfile.TemporaryDirectory(prefix="elastickpt-notice-") as folder:
            found.append(ended(Path(folder), layout, int(ranks)))
        print(f"committed {found[-1][0]:.2f} s after SIGTERM, all processes gone after {found[-1][1]:.2f} s", flush=True)
    committed, gone = (median(one) for one in zip(*found, strict=True))
    print(f"{layout}, {ranks} ranks: median {committed:.2f} s and {gone:.2f} s, of {DEADLINE_S:g} s")


if __name__ == "__main__":
    main()
