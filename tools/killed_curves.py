"""What 10 kills in 1,000 steps cost in loss: held-out loss after the last step, beside the same run without a failure.

    python -m tools.killed_curves --record FOLDER           curves.png, table.md and record.json; by the defaults below
    python -m tools.killed_curves --steps 90 --kills 3 --seeds 1 --twice          whether a seed gives the same curve again

Six stages, one layer each of a small language model, real text, a save every 10 steps. For each seed 10 steps from 50 to 900,
and a stage for each, are drawn before anything runs; the stage kills itself there, in the first forward of that step. Runs:
without failures; each seed under the default policy; the swapped order alone; each seed with that and the rungs `partner` and
`checkfree` only. The held-out loss is `evaluate` on 64 sequences that no step sees. The same seed gives the same curve.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tools.bench import machine

STAGES, LAYERS, DIM, CONTEXT = 6, 6, 32, 32
SEQUENCES, MICROBATCHES, HELD_OUT = 32, 4, 2  # of a step; of the evaluation, in batches
FIRST, LAST, KILLS, EVERY = 50, 900, 10, 10
ALONE = "swapped order alone"
LAUNCH = "import sys; from elastickpt.cli.launch import main; sys.exit(main())"
EXAMPLES = machine.REPOSITORY / "examples"

Trace = tuple[tuple[int, int], ...]  # completed steps, stage


@dataclass(frozen=True, slots=True)
class Curve:
    """One run. `losses` by step; `rebuilt`: the rungs of its recoveries, in order."""

    name: str
    seed: int | None
    trace: Trace
    losses: list[float] = field(default_factory=list)
    held_out: float = float("nan")
    rebuilt: tuple[str, ...] = ()


def traced(seed: int, kills: int, last: int) -> Trace:
    """The kills of a seed."""
    drawn = random.Random(seed)
    return tuple((step, drawn.randrange(STAGES)) for step in sorted(drawn.sample(range(FIRST, last + 1), kills)))


def carried_out(name: str, seed: int | None, trace: Trace, steps: int, *, swap: str) -> Curve:
    """Blocking. Raises SystemExit for a job that does not come to its end."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        events = folder / "events.jsonl"
        flags = ["--stages", STAGES, "--spares", 1, "--max-replacements", len(trace), "--events", events]
        script = [__file__, "--member", folder, steps, swap, json.dumps(trace)]
        command = [str(one) for one in (sys.executable, "-c", LAUNCH, *flags, *script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, _PATHS))}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{name}: ended with {done.returncode}\n{done.stderr[-4000:]}")
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        losses = {one["step"]: one["loss"] for one in told if "step" in one}
        happened = [json.loads(line) for line in events.read_text().splitlines()]
    rebuilt = tuple(one["rung"] for one in happened if one["event"] == "recovery")
    in_order = [losses[step] for step in range(1, steps + 1)]
    return Curve(name, seed, trace, in_order, next(one["held out"] for one in told if "held out" in one), rebuilt)


def curves(steps: int, seeds: Sequence[int], kills: int) -> Iterator[Curve]:
    """All runs, one after the other."""
    traces = {seed: traced(seed, kills, min(LAST, steps - 10)) for seed in seeds}
    wanted: list[tuple[str, int | None, Trace, str]] = []
    for alone, killed, swap in (("without failures", "default policy", ""), (ALONE, "partner and checkfree", "microbatch")):
        wanted += [(alone, None, (), swap), *((killed, seed, traces[seed], swap) for seed in seeds)]
    for name, seed, trace, swap in wanted:
        yield carried_out(name, seed, trace, steps, swap=swap)


def table(found: Sequence[Curve]) -> str:
    """As Markdown: held-out losses, beside the run of the same order without failures."""
    rows = ["| run | seed | kills | rebuilt by | held-out loss | over the run without failures |", "|---|---|---|---|---|---|"]
    alone = next((one for one in found if one.name == ALONE), found[0])
    for one in found:
        beside = found[0] if one.name in (found[0].name, "default policy") else alone
        over = "" if one is beside else f"{100 * (one.held_out / beside.held_out - 1):+.2f} %"
        rungs = ", ".join(f"{one.rebuilt.count(rung)} {rung}" for rung in dict.fromkeys(one.rebuilt))
        seed = "" if one.seed is None else one.seed
        rows.append(f"| {one.name} | {seed} | {len(one.trace)} | {rungs} | {one.held_out:.4f} | {over} |")
    return "\n".join(rows) + "\n"


def draw(found: Sequence[Curve], path: Path) -> None:
    """Losses, each the mean of 20 steps, of both orders; kills as marks on the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    for axes, names in zip(
        figure.subplots(1, 2, sharey=True),
        (("without failures", "default policy"), (ALONE, "partner and checkfree")),
        strict=True,
    ):
        for number, one in enumerate(curve for curve in found if curve.name in names):
            smooth = [sum(part) / len(part) for part in (one.losses[max(0, k - 19) : k + 1] for k in range(len(one.losses)))]
            colour = "#9AA4AF" if not one.trace else f"C{number - 1}"
            label = one.name if one.seed is None else f"{one.name}, seed {one.seed}"
            axes.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=1.0, label=label)
            axes.plot([step for step, _ in one.trace], [smooth[step - 1] for step, _ in one.trace], "o", color=colour, ms=3)
        axes.set(xlabel="completed steps", yscale="log")
        if axes.lines:  # not yet, in a record of the first runs
            axes.legend(frameon=False)
    figure.axes[0].set(ylabel="loss, nats per byte, mean of 20 steps")
    figure.savefig(path)


# -- a member


def member(folder: Path, steps: int, swap: str, trace: Trace) -> None:
    """Trains one stage, and kills itself where the trace says so, once."""
    import torch
    from llama import Config
    from lose_a_stage import Corpus, Part, stage_of

    import elastickpt as ek

    torch.set_num_threads(1)
    config = Config(dim=DIM, layers=LAYERS, heads=4, kv_heads=2, hidden=3 * DIM, context=CONTEXT)
    hidden = torch.empty(SEQUENCES // MICROBATCHES, CONTEXT, DIM, device="meta")
    text = Corpus(CONTEXT).text

    class Text:
        def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            generator = torch.Generator().manual_seed(step)
            starts = torch.randint(len(text) - CONTEXT, (SEQUENCES, 1), generator=generator)
            rows = text[starts + torch.arange(CONTEXT + 1)].long()
            return rows[:, :-1], rows[:, 1:]

    def build(place: ek.elastic.Place) -> ek.elastic.Stage:
        part = Part(config, stage=place.stage, stages=place.stages, copies=2 if swap else 1)

        def struck(*_: object) -> None:
            if part.training and torch.is_grad_enabled() and (trainer.step, place.stage) in trace:
                mark = folder / f"killed-{trainer.step}"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        part.body.register_forward_pre_hook(struck)
        return stage_of(part, hidden)

    policy = ek.elastic.Policy(rungs=("partner", "checkfree")) if swap else ek.elastic.Policy()
    run = ek.Run(str(folder / "run"), options=ek.RunOptions(due=ek.Every(steps=EVERY)))
    order: Literal["microbatch"] | None = "microbatch" if swap == "microbatch" else None
    with ek.elastic.join() as job:
        trainer = ek.elastic.PipelineTrainer(
            *(job, build),
            loader=Text(),
            microbatches=MICROBATCHES,
            schedule="gpipe",
            swap=order,
            clip=1.0,
            run=run,
            policy=policy,
        )
        for report in trainer.steps(steps):
            if report.saved is not None:
                report.saved.exception()  # whether it is committed when the next stage is killed is not left to chance
            if job.rank == 0:
                print(json.dumps({"step": report.step, "loss": report.loss}), flush=True)
        loss = trainer.evaluate([Text().batch(10_000_000 + number) for number in range(HELD_OUT)])
        if job.rank == 0:
            print(json.dumps({"held out": loss}), flush=True)


_PATHS = (machine.REPOSITORY, EXAMPLES)


def main() -> None:
    if sys.argv[1:2] == ["--member"]:
        folder, steps, swap, trace = sys.argv[2:]
        member(Path(folder), int(steps), swap, tuple((step, stage) for step, stage in json.loads(trace)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--twice", action="store_true", help="each run is made twice, and has to give the same curve")
    parser.add_argument("--record", type=Path, help="a folder")
    told = parser.parse_args()
    found: list[Curve] = []
    for one in curves(told.steps, told.seeds, told.kills):
        found.append(one)
        if told.twice:
            swap = "microbatch" if one.name in (ALONE, "partner and checkfree") else ""
            again = carried_out(one.name, one.seed, one.trace, told.steps, swap=swap)
            if (again.losses, again.held_out) != (one.losses, one.held_out):
                raise SystemExit(f"{one.name}, seed {one.seed}: another curve the second time")
        print(f"{one.name}{'' if one.seed is None else f', seed {one.seed}'}: {one.held_out:.4f}", file=sys.stderr, flush=True)
        if told.record:
            keep(found, told.record)
    print(table(found), end="")
    if told.twice:
        print("each run was made twice, and gave the same losses to the last bit")


def keep(found: Sequence[Curve], folder: Path) -> None:
    """What there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / "curves.png")
    (folder / "table.md").write_text(table(found))
    record = {"machine": asdict(machine.describe(())), "runs": [asdict(one) for one in found]}
    (folder / "record.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
