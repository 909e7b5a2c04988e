"""A training run that loses a rank and changes its layout three times, beside one that never stops.

1. four ranks, PP2 x FSDP2(2); one is killed   2. two ranks, TP2   3. three ranks, FSDP2(3)   4. one process

At each seam what was loaded is saved again at once, and compared with what had been saved, bit for bit. Writes
out/demo/loss.png. Exits with 1 if a bit differs, or a loss by more than 1e-4 (relative) from the run that never stops.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs import Event, Job
from plot import Segment, draw
from rich import box
from rich.console import Console
from rich.table import Table
from seams import Comparison, compare

OUT = Path("out/demo")
RUN, SEAMS = OUT / "run", OUT / "seams"
STEPS, SAVE_EVERY = 80, 10
KILL_AFTER, VICTIM = 25, 3  # step and rank
TOLERANCE = 1e-4  # of a loss, relative: layouts add in different orders
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass
class Phase:
    """One launch: its layout and last step as planned, then what was seen of it. Times in seconds."""

    layout: str
    title: str
    ranks: int
    until: int
    first: int = 0  # the step whose checkpoint it loaded
    losses: dict[int, float] = field(default_factory=dict)
    stalls: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    load: float | None = None
    loaded: str = ""
    took: float = 0.0
    killed: bool = False
    seam: Comparison | None = None


class Reference:
    """The run that never stops: one process at work beside the others."""

    def __init__(self) -> None:
        self.job = Job("reference", OUT, OUT / "reference", ranks=1, options=[f"--steps={STEPS}", f"--save-every={STEPS}"])
        self.losses: dict[int, float] = {}
        self.waiting: list[tuple[int, float]] = []

    def show(self, step: int, loss: float) -> None:
        """Print `loss` beside the reference's, now or when that is known."""
        self.waiting.append((step, loss))
        self.show_known()

    def show_known(self) -> None:
        self.losses |= {event.step: event.loss for event in self.job.events() if event.event == "step"}
        while self.waiting and self.waiting[0][0] in self.losses:
            step, loss = self.waiting.pop(0)
            expected = self.losses[step]
            apart = "equal" if loss == expected else f"{relative(loss, expected):.0e} apart"
            console.print(f"   step {step:2d}   loss {loss:.6f}   reference {expected:.6f}   [dim]{apart}[/]")

    def catch_up(self) -> None:
        """Return when all that waits is printed."""
        while self.waiting:
            ended = self.job.process.poll() is not None
            self.show_known()
            if ended and self.waiting:
                raise SystemExit(f"the reference run ended before step {self.waiting[0][0]}:\n{self.job.tail()}")
            time.sleep(0.05)


def relative(loss: float, expected: float) -> float:
    return abs(loss - expected) / expected


def run(number: int, phase: Phase, reference: Reference) -> None:
    """Launch the phase and see it to its end; in the first one, kill a rank on the way."""
    options = [f"--layout={phase.layout}", f"--steps={STEPS}", f"--until={phase.until}"]
    options += [f"--save-every={SAVE_EVERY}", f"--seam={SEAMS}"]
    job = Job(f"phase-{number}", OUT, RUN, ranks=phase.ranks, options=options)
    try:
        reference.catch_up()  # of the phase before, while this one starts
        console.print(f"\n[bold]{number}. {phase.title}[/], {phase.ranks} rank{'s' if phase.ranks > 1 else ''}")
        with console.status("starting") as status:
            for event in job.watch():
                note(phase, event, reference)
                status.update(f"step {event.step} of {phase.until}")
                if number == 1 and event.event == "step" and event.step == KILL_AFTER:
                    pid = job.kill(VICTIM)
                    phase.killed = True
                    console.print(f"   [bold red]✗ SIGKILL[/] to rank {VICTIM} (process {pid}) after step {event.step}")
    finally:
        job.stop()
    phase.took = time.time() - job.launched
    if phase.killed:
        console.print(f"   torchrun ended the other ranks; the newest checkpoint is {(RUN / 'latest').resolve().name}")
    if (job.process.returncode != 0) != phase.killed:
        raise SystemExit(f"{phase.title} ended with exit code {job.process.returncode}:\n{job.tail()}")


def note(phase: Phase, event: Event, reference: Reference) -> None:
    """Keep what rank 0 logged, and print what is worth it: a seam, the first step after it, and every fifth step."""
    match event.event:
        case "load":
            phase.first, phase.load, phase.loaded = event.step, event.seconds, event.folder
        case "seam":
            phase.seam = compare(Path(phase.loaded), SEAMS / f"step-{event.step:04d}")
            console.print(f"   {verdict_on(phase.seam)} the checkpoint of step {event.step}")
        case "save":
            phase.stalls.append(event.seconds)
            phase.saves.append(event.durable)
        case "step":
            phase.losses[event.step] = event.loss
            if event.step % 5 == 0 or event.step == phase.first + 1:
                reference.show(event.step, event.loss)


def verdict_on(seam: Comparison) -> str:
    if seam.differences:
        return f"[bold red]✗ differs[/]: {'; '.join(seam.differences[:4])} from"
    state = f"{seam.arrays} arrays ({seam.nbytes / 1e6:.1f} MB) and {seam.values} other values"
    return f"[green]✓ bit for bit[/]: {state} are those of"


def worst(phase: Phase, reference: Reference) -> float:
    return max(relative(loss, reference.losses[step]) for step, loss in phase.losses.items())


def table(phases: list[Phase], reference: Reference) -> Table:
    nbytes = next(phase.seam.nbytes for phase in phases if phase.seam)
    result = Table(
        box=box.SIMPLE_HEAD, title=f"\nOne run of {STEPS} steps, {nbytes / 1e6:.1f} MB of state", title_justify="left"
    )
    for name in ("layout", "ranks", "steps", "loss", "reference", "apart", "seam", "stall", "durable", "load", "in all"):
        result.add_column(name, justify="left" if name in ("layout", "seam") else "right", no_wrap=True)
    for phase in phases:
        last = max(phase.losses)
        result.add_row(
            phase.title,
            str(phase.ranks),
            f"{phase.first + 1}–{last}" + (" [red]✗[/]" if phase.killed else ""),
            f"{phase.losses[last]:.4f}",
            f"{reference.losses[last]:.4f}",
            f"{worst(phase, reference):.1e}",
            "–" if phase.seam is None else "[red]differs[/]" if phase.seam.differences else "[green]bitwise[/]",
            f"{statistics.median(phase.stalls) * 1000:.0f} ms",
            rate(nbytes, statistics.median(phase.saves)),
            "–" if phase.load is None else rate(nbytes, phase.load),
            f"{phase.took:.0f} s",
        )
    return result


def rate(nbytes: int, seconds: float) -> str:
    return f"{seconds:.2f} s\n[dim]{nbytes / seconds / 1e9:.2f} GB/s[/]"


def faults(phases: list[Phase], reference: Reference) -> list[str]:
    """What is not as promised, in words."""
    found = []
    for phase in phases:
        if phase.first and (phase.seam is None or phase.seam.differences):
            found.append(f"{phase.title}: the state after loading is not bitwise the saved one")
        if not phase.first and phase is not phases[0]:
            found.append(f"{phase.title}: began anew instead of resuming")
        if worst(phase, reference) > TOLERANCE:
            found.append(f"{phase.title}: a loss is {worst(phase, reference):.1e} from the reference, allowed {TOLERANCE:.0e}")
    return found


def main() -> int:
    begin = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    phases = [
        Phase("pp2.fsdp2", "PP2 × FSDP2(2)", ranks=4, until=STEPS),  # it will not get there
        Phase("tp2", "TP2", ranks=2, until=40),
        Phase("fsdp3", "FSDP2(3)", ranks=3, until=60),
        Phase("single", "one process", ranks=1, until=STEPS),
    ]
    reference = Reference()
    console.print(f"{STEPS} steps, saved every {SAVE_EVERY}, beside a run in one process that never stops")
    try:
        for number, phase in enumerate(phases, 1):
            run(number, phase, reference)
        reference.catch_up()
    finally:
        reference.job.stop()
    console.print(table(phases, reference))
    segments = [
        Segment(
            phase.title,
            phase.ranks,
            phase.first,
            phase.losses,
            "differs" if phase.seam and phase.seam.differences else "loaded bit for bit",
        )
        for phase in phases
    ]
    draw(segments, reference.losses, OUT / "loss.png", tolerance=TOLERANCE)
    found = faults(phases, reference)
    for fault in found:
        console.print(f"[bold red]✗[/] {fault}")
    if not found:
        apart = max(worst(phase, reference) for phase in phases)
        console.print(f"[green]✓[/] All state was loaded bit for bit. Losses are at most {apart:.1e} (relative) apart.")
    console.print(f"The curve is in {OUT / 'loss.png'}. Took {time.time() - begin:.0f} s.")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
