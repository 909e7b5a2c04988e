"""How fast conversions are, and what memory they take: `python -m tools.convert_speed FOLDER [GB...]`.

For each size a model of Megatron's names becomes a universal checkpoint, then, by `ckpt-convert`, Megatron's files at tp=4,
with one and two workers, beside `cp` and `sync` of the same bytes. Start-up is a conversion of a tiny model; it is taken off.
A line a run on stdout: seconds, seconds of processors, peak memory of the greatest process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HIDDEN = 1024
PER_LAYER = HIDDEN * (HIDDEN + 3 * HIDDEN + 3 * 4 * HIDDEN) * 4  # bytes of one layer in float32
CONVERT = [sys.executable, "-m", "elastickpt", "convert", "--quiet"]
MAKE = "make"


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
    """A universal checkpoint of about so many bytes; the constants that it needs."""
    layers, file = layers_of(nbytes), folder.with_suffix(".pt")
    timed([sys.executable, "-m", "tools.convert_speed", MAKE, str(file), str(layers)])
    timed([*CONVERT, str(file), str(folder)])
    file.unlink()
    constants = {"num_layers": layers, "num_attention_heads": 16, "kv_channels": 64, "padded_vocab_size": 512, "swiglu": 1}
    return [word for key, value in constants.items() for word in ("--set", f"{key}={value}")]


def timed(command: list[str]) -> tuple[float, float, int]:
    """(seconds, seconds of processors, peak RSS in bytes of the greatest process) of a command."""
    begun = time.perf_counter()
    pid = os.spawnvp(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main(root: Path, sizes: list[float]) -> None:
    convert = [*CONVERT, "--to", "megatron", "--mesh", "tp=4"]
    constants = universal(root / "tiny", 0.0)
    start_up, cpu, _ = timed([*convert, str(root / "tiny"), str(root / "tiny-out"), *constants])
    print(f"start-up and a tiny model: {start_up:.2f} s, {cpu:.2f} s of processors")
    for size in sizes:
        constants = universal(root / "source", size * 1e9)
        nbytes = sum(path.stat().st_size for path in (root / "source").rglob("*") if path.is_file())
        subprocess.run(["sync", "-f", str(root)], check=True)
        copied, _, _ = timed(["sh", "-c", f"cp -r {root}/source {root}/copy && sync -f {root}"])
        shutil.rmtree(root / "copy")
        for workers in (1, 2):
            command = [*convert, str(root / "source"), str(root / "out"), "--workers", str(workers), *constants]
            seconds, cpu, peak = timed(command)
            shutil.rmtree(root / "out")
            rate = copied / (seconds - start_up) if seconds > start_up else float("nan")
            told = f"{nbytes / 1e9:.2f} GB, {workers} workers: {seconds:.2f} s, {cpu:.2f} of processors"
            print(f"{told}; cp and sync {copied:.2f} s, ratio {rate:.2f}; peak RSS {peak / 1e6:.0f} MB", flush=True)
        shutil.rmtree(root / "source")


if __name__ == "__main__":
    if sys.argv[1] == MAKE:
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), [float(word) for word in sys.argv[2:]] or [0.1, 0.5, 2.0])
