"""`python -m tools.clients [--only TEXT] [--out FILE]`: the table of what resumes bit for bit."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.clients.case import Row
from tools.clients.table import markdown

LIBRARIES = (
    *("torch", "pytorch-optimizer", "torch-optimizer", "schedulefree", "bitsandbytes", "torchao"),
    *("torchmetrics", "torch-ema", "timm", "torchdata"),
    *("accelerate", "peft", "lightning", "transformers", "pytorch-ignite", "skorch"),
)


def rows_of(library: str, only: str) -> Iterator[Row]:
    """Rows as they are made; one that says so where the library cannot be imported."""
    command = [sys.executable, "-m", "tools.clients.lives", library, only]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield Row(**json.loads(line))
    if process.returncode:
        yield Row(library, "all of it", 1, "not tried", "it cannot be imported here")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.clients", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose library and name, with a space between, have this text")
    parser.add_argument("--package", action="append", choices=LIBRARIES, help="these libraries only")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args()
    rows: list[Row] = []
    for library in options.package or LIBRARIES:
        for one in rows_of(library, options.only):
            rows.append(one)
            print(f"{one.package:18} {one.name:28} {one.processes}  {one.verdict:12} {one.why}", file=sys.stderr, flush=True)
    text = markdown(rows)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
