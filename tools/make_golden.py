"""Wrote tests/golden/v1-by-0.1.0: `python -m tools.make_golden`; and v1-packed-by-0.1.0: `python -m tools.make_golden packed`.
It refuses a folder that is there: see tests/golden/README.md.

Four gloo ranks (TP2 × FSDP2) save the state of `tools.golden_job` with the real `elastickpt.save`; the truth beside it is
made from the whole tensors, not read from the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import xxhash

from elastickpt.format.version import RELEASE
from elastickpt.saving.request import PlacementChoice
from tools import golden_job
from tools.gloo_ranks import run_ranks

FOLDER = Path(__file__).parent.parent / "tests" / "golden"


def truth() -> dict[str, dict[str, object]]:
    """By item, name and state: element type, shape, xxh3-128 of the little-endian bytes in C order."""
    found: dict[str, dict[str, object]] = {}
    for name, tensor in golden_job.truth():
        dtype = str(tensor.dtype).removeprefix("torch.")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = {"dtype": dtype, "shape": list(tensor.shape), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    return found


def main(placement: PlacementChoice = "plain") -> int:
    name = f"v1-by-{RELEASE}" if placement == "plain" else f"v1-{placement}-by-{RELEASE}"
    if (FOLDER / name).exists():
        print(f"{FOLDER / name} is there: a golden checkpoint is never made again", file=sys.stderr)
        return 1
    run_ranks(golden_job.save_rank, golden_job.WORLD, str(FOLDER / name), placement)
    (FOLDER / f"{name}.truth.json").write_text(json.dumps(truth(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main("packed" if sys.argv[1:] == ["packed"] else "plain"))
