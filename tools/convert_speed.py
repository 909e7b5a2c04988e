"""How fast conversions are, and what memory they take: `python -m tools.convert_speed FOLDER [--gb 0.1 2] [--rounds 5]`.

For each size a model of Megatron's names becomes a universal checkpoint; then, in rounds, that is copied by `cp` and `sync`,
and converted by `ckpt-convert` to Megatron's files at tp=4, with one and two workers. A conversion of a tiny model in the same
round is start-up, and is taken off. All that a round compares was measured within it, as machines have good and bad minutes;
what is told is the median of the rounds. A table on stdout; `--record FILE` keeps every round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

HIDDEN = 1024
PER_LAYER = HIDDEN * (HIDDEN + 3 * HIDDEN + 3 * 4 * HIDDEN) * 4  # bytes of one layer in float32
CONVERT = [sys.executable, "-m", "elastickpt", "convert", "--quiet"]
MAKE = "make"
WORKERS = (1, 2)


@dataclass(frozen=True, slots=True)
class Run:
    """One command: seconds, seconds of processors, peak RSS of its greatest process."""

    seconds: float
    cpu_seconds: float
    peak_nbytes: int


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured one after the other. `copy` is `cp` and `sync`, `converted` by number of workers."""

    nbytes: int
    copy: Run
    start_up: Run
    converted: dict[int, Run]

    def ratio(self, workers: int) -> float:
        """How fast the conversion was, as a part of the copy's speed; start-up apart."""
        seconds = self.converted[workers].seconds - self.start_up.seconds
        return self.copy.seconds / seconds if seconds > 0 else float("nan")


def layers_of(nbytes: float) -> int:
    return max(1, round(nbytes / PER_LAYER))


def make(path: Path, layers: int) -> None:
    """A file of torch.save, from a process of its own: memory of this one would count as its children's."""
    import torch

    tensors = {"embedding.word_embeddings.weight": torch.randn(512, HIDDEN), "output_layer.weight": torch.randn(512, HIDDEN)}
    tensors["decoder.final_layernorm.weight"] = torch.randn(HIDDEN)
    for k in range(layers):
        name = f"decoder.layers.{k}"
        tensors[f"{name}.self_attention.linear_proj.weight"] = torch.randn(HIDDEN, HIDDEN)
        tensors[f"{name}.self_attention.linear_qkv.weight"] = torch.randn(3 * HIDDEN, HIDDEN)
        tensors[f"{name}.mlp.linear_fc1.weight"] = torch.randn(2 * 4 * HIDDEN, HIDDEN)
        tensors[f"{name}.mlp.linear_fc2.weight"] = torch.randn(HIDDEN, 4 * HIDDEN)
    torch.save({"model": tensors, "step": 1}, path)


def universal(folder: Path, nbytes: float) -> list[str]:
    """Makes a universal checkpoint of about so many bytes; the constants that it needs."""
    layers, file = layers_of(nbytes), folder.with_suffix(".pt")
    timed([sys.executable, "-m", "tools.convert_speed", MAKE, str(file), str(layers)])
    timed([*CONVERT, str(file), str(folder)])
    file.unlink()
    constants = {"num_layers": layers, "num_attention_heads": 16, "kv_channels": 64, "padded_vocab_size": 512, "swiglu": 1}
    return [word for key, value in constants.items() for word in ("--set", f"{key}={value}")]


def timed(command: list[str]) -> Run:
    """Runs a command to its end."""
    begun = time.perf_counter()
    pid = os.spawnvp(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def rounds(root: Path, size: float, count: int) -> Iterator[Round]:
    """Each round from disks that have nothing left to write."""
    convert = [*CONVERT, "--to", "megatron", "--mesh", "tp=4"]
    small = universal(root / "tiny", 0.0)
    constants = universal(root / "source", size * 1e9)
    nbytes = sum(path.stat().st_size for path in (root / "source").rglob("*") if path.is_file())

    def alone(command: list[str], made: str) -> Run:
        subprocess.run(["sync", "-f", str(root)], check=True)
        found = timed(command)
        shutil.rmtree(root / made)
        return found

    for _ in range(count):
        copy = alone(["sh", "-c", f"cp -r {root}/source {root}/copy && sync -f {root}"], "copy")
        start_up = alone([*convert, str(root / "tiny"), str(root / "out"), *small], "out")
        converted = {
            workers: alone([*convert, str(root / "source"), str(root / "out"), "--workers", str(workers), *constants], "out")
            for workers in WORKERS
        }
        yield Round(nbytes, copy, start_up, converted)
    shutil.rmtree(root / "source")
    shutil.rmtree(root / "tiny")


def row(size: float, found: list[Round], workers: int) -> str:
    """A row of the table: medians, and the greatest memory."""
    runs = [one.converted[workers] for one in found]
    less = [one.converted[workers].seconds - one.start_up.seconds for one in found]
    cpu = [one.converted[workers].cpu_seconds - one.start_up.cpu_seconds for one in found]
    cells = (
        f"{size:g} GB",
        str(workers),
        f"{median(one.copy.seconds for one in found):.2f}",
        f"{median(run.seconds for run in runs):.2f}",
        f"{median(less):.2f}",
        f"{median(cpu):.2f}",
        f"{median(one.ratio(workers) for one in found):.2f}",
        f"{max(run.peak_nbytes for run in runs) / 1e6:.0f} MB",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 0.5, 2.0, 8.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print("| size | workers | cp and sync, s | convert, s | without start-up, s | of processors, s | ratio | peak RSS |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    every: dict[str, list[Round]] = {}
    for size in given.gb:
        every[f"{size:g}"] = found = list(rounds(given.folder, size, given.rounds))
        for workers in WORKERS:
            print(row(size, found, workers), flush=True)
    if given.record is not None:
        record = {size: [asdict(one) for one in some] for size, some in every.items()}
        given.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [MAKE]:
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
