"""`python -m tools.step_times`: how much CPU each step of a save and of a load takes, for each of many small tensors.

In memory, so that no device is measured; CPU seconds of one process, without what other steps inside took. The first save of a
structure stands beside the later ones; each load is the first of its process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import elastickpt as ek
from tools.bench.state import SMALL_ELEMENTS

SAVE = {  # step -> functions, by where they are looked up
    "capture": ("elastickpt.saving.save:propose",),
    "structure": ("elastickpt.saving.pipeline:agree",),
    "write": ("elastickpt.saving.save:write_whole_share",),
    "map": ("elastickpt.commit.attest:encode_fragments",),
    "prove": ("elastickpt.commit.outcome:prove_draft",),
    "index": ("elastickpt.commit.record:_write_index",),
    "manifest": ("elastickpt.commit.record:encode_manifest_with",),
}
LOAD = {
    "manifest": ("elastickpt.loading.opened:decode_manifest",),
    "index": ("elastickpt.loading.opened:decode_index", "elastickpt.loading.opened:check_index"),
    "map": ("elastickpt.loading.opened:decode_columns", "elastickpt.loading.opened:fragment_problems"),
    "bind": ("elastickpt.loading.session:bind", "elastickpt.loading.session:listing_of"),
    "compare": ("elastickpt.loading.session:differences_of", "elastickpt.loading.session:joint_mismatches"),
    "plan": ("elastickpt.loading.session:plan_fetch", "elastickpt.loading.session:require_files"),
    "read": ("elastickpt.loading.session:carry_out",),
}


class Clock:
    """CPU seconds of each step, without those of steps inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inside = [0.0]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = time.process_time() - begun
            self.spent[name] = self.spent.get(name, 0.0) + whole - self._inside.pop()
            self._inside[-1] += whole


@contextmanager
def clocked(steps: Mapping[str, tuple[str, ...]], clock: Clock) -> Iterator[None]:
    """Inside, every call of a step's functions counts for it."""
    kept: list[tuple[Any, str, Any]] = []
    for step, places in steps.items():
        for place in places:
            module, name = place.split(":")
            kept.append((import_module(module), name, getattr(import_module(module), name)))
            setattr(*kept[-1][:2], _timed(clock, step, kept[-1][2]))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def _timed(clock: Clock, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*positional: Any, **named: Any) -> Any:
        with clock.step(step):
            return function(*positional, **named)

    return timed


def measured(steps: Mapping[str, tuple[str, ...]], work: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of each step of one piece of work; what no step has is "rest"."""
    clock = Clock()
    with clocked(steps, clock), clock.step("rest"):
        work()
    return clock.spent


def medians(rows: Sequence[dict[str, float]], tensors: int) -> dict[str, float]:
    """Microseconds a tensor of each step."""
    return {step: statistics.median(row.get(step, 0.0) for row in rows) * 1e6 / tensors for step in rows[0]}


def table_of(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The rows' steps side by side, and their sums."""
    steps = list(dict.fromkeys(step for row in rows.values() for step in row))
    lines = [" " * 12 + "".join(f"{step:>11}" for step in (*steps, "together"))]
    for title, row in rows.items():
        told = [f"{row[step]:11.1f}" if step in row else " " * 11 for step in steps]
        lines.append(f"{title:12}" + "".join(told) + f"{sum(row.values()):11.1f}")
    return "\n".join(lines)


def state_of(tensors: int) -> dict[str, dict[str, torch.Tensor]]:
    """A dict of so many small tensors, each of another value."""
    return {"state": {f"tensor_{k:05}": torch.full((SMALL_ELEMENTS,), float(k)) for k in range(tensors)}}


def load(folder: Path, tensors: int) -> dict[str, float]:
    """CPU seconds of the steps of a load, which nothing was loaded before."""
    state = state_of(tensors)
    empty = {"state": {name: torch.zeros(SMALL_ELEMENTS) for name in state["state"]}}
    spent = measured(LOAD, partial(ek.load, empty, folder))  # which is imported before: that is no step of a load
    if any(not torch.equal(empty["state"][name], tensor) for name, tensor in state["state"].items()):
        raise AssertionError("what was loaded is not what was saved")
    return spent


def load_afresh(folder: Path, tensors: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tools.step_times", "--tensors", str(tensors), "--load", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.step_times", description=__doc__)
    parser.add_argument("--tensors", type=int, default=10_000, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--placement", choices=("plain", "packed"), default="packed")
    parser.add_argument("--where", default="/dev/shm", metavar="FOLDER")
    parser.add_argument("--load", metavar="CHECKPOINT", help="load it once, and print the seconds of each step as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.load is not None:
        print(json.dumps(load(Path(options.load), options.tensors)))
        return 0
    state = state_of(options.tensors)
    folder = Path(tempfile.mkdtemp(dir=options.where))
    try:
        saves = [
            measured(SAVE, partial(ek.save, state, folder / str(k), placement=options.placement))
            for k in range(options.repeats + 1)
        ]
        loads = [load_afresh(folder / "0", options.tensors) for _ in range(options.repeats)]
    finally:
        shutil.rmtree(folder)
    parts = {"first save": saves[:1], "later saves": saves[1:], "loads": loads}
    print("us of CPU a tensor; loads each in a process of its own")
    print(table_of({title: medians(rows, options.tensors) for title, rows in parts.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
