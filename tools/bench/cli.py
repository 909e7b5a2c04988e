"""`python -m tools.bench`: options in, table on stdout, talk and progress on stderr, files beside."""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from tools.interrupts import sigterm_interrupts

from . import chart, machine, plan
from .caches import COLD_BY
from .conduct import Conductor
from .contestants import LIBRARIES, USUAL, entrant, is_known
from .ranks import ForkedRanks
from .records import Entrant, Report, from_json, to_json
from .table import print_report

RESULTS = Path(__file__).with_name("results")
WHERE = ("disk", "tmpfs")
EXAMPLES = """examples:
  python -m tools.bench                                  the usual set, in at most twenty-five minutes on two cores
  python -m tools.bench --full                           0.1 and 1.8 GB, everything, some hours
  python -m tools.bench --only save,load --ranks 2 --sizes 1.8 --where disk
  python -m tools.bench --show tools/bench/results/FILE.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when measured or shown, 1 when nothing could be measured, 2 for wrong usage, 130 when interrupted."""
    parsed = parser().parse_args(arguments)
    console, talk = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True)
    if parsed.show:
        print_report(from_json(Path(parsed.show).read_text()), console)
        return 0
    places = machine.usual_places(parsed.where or WHERE)
    if parsed.path:
        places = tuple(machine.place_at(Path(folder)) for folder in parsed.path)
    talk.print("importing torch and the libraries ...")
    beside = ("tc",) if "tc+fsync" in parsed.contestants else ()  # as which it saves beside training
    entrants = tuple(entrant(name) for name in dict.fromkeys((*parsed.contestants, *beside)))
    present = tuple(entry.name for entry in entrants if entry.absent_because is None and entry.name in parsed.contestants)
    options = _options(parsed, present, tuple(place.name for place in places))
    conductor = Conductor(ForkedRanks(), talk, minutes=options.minutes)
    interrupted = _carry_out(conductor, plan.jobs(options, places), places)
    if conductor.measures or conductor.memories:
        report = _report(options.repeats, places, entrants, conductor)
        print_report(report, console)
        if not interrupted:
            _leave_files(report, talk)
            return 0
    talk.print("interrupted: no files were left" if interrupted else "nothing was measured")
    return 130 if interrupted else 1


def _carry_out(conductor: Conductor, jobs: Sequence[plan.Job], places: Sequence[plan.Place]) -> bool:
    """Run the jobs and remove what they left; whether SIGINT or SIGTERM ended them early."""
    try:
        with sigterm_interrupts():
            conductor.carry_out(jobs)
    except KeyboardInterrupt:
        return True
    finally:
        for place in places:
            shutil.rmtree(place.folder, ignore_errors=True)
    return False


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Measure checkpoint libraries side by side, with this machine's floors.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--full", action="store_true", help="all topics at 0.1 and 1.8 GB, 1, 2 and 4 ranks")
    found.add_argument("--only", type=_words(plan.TOPICS), metavar="LIST", help=",".join(plan.TOPICS))
    found.add_argument("--sizes", type=_sizes, metavar="GB,GB", help="state sizes over all ranks; default 0.1")
    found.add_argument("--ranks", type=_counts, metavar="N,N", help="default 1,2,4")
    found.add_argument(
        "--repeats", type=int, metavar="N", help="timed repeats, after one warm-up; default 5, of the usual set 3"
    )
    found.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help=f"begin no job after so many; default none, of the usual set {plan.USUAL_MINUTES}",
    )
    found.add_argument("--where", type=_words(WHERE), metavar="LIST", help=",".join(WHERE))
    found.add_argument("--path", action="append", metavar="FOLDER", help="measure in this folder instead; may be repeated")
    found.add_argument(
        "--contestants",
        type=_contestants,
        default=USUAL,
        metavar="LIST",
        help=f"of {','.join(LIBRARIES)}; default {','.join(USUAL)}; dcp:4 is dcp with four threads",
    )
    found.add_argument("--show", metavar="FILE", help="print the table of an earlier run and end")
    return found


def _options(parsed: argparse.Namespace, contestants: tuple[str, ...], places: tuple[str, ...]) -> plan.Options:
    """The usual set, unless the words say what to measure."""
    if not (parsed.full or parsed.only or parsed.sizes or parsed.ranks or parsed.where or parsed.path):
        return plan.Options(plan.USUAL, parsed.repeats or 3, contestants, parsed.minutes or plan.USUAL_MINUTES)
    sizes = parsed.sizes or ((plan.SMALL, plan.LARGE) if parsed.full else (plan.SMALL,))
    part = plan.Part(parsed.only or plan.TOPICS, sizes, parsed.ranks or (1, 2, 4), places)
    return plan.Options((part,), parsed.repeats or 5, contestants, parsed.minutes)


def _report(repeats: int, places: Sequence[plan.Place], entrants: tuple[Entrant, ...], conductor: Conductor) -> Report:
    return Report(
        date=datetime.date.today().isoformat(),
        repeats=repeats,
        cold_by=COLD_BY,
        machine=machine.describe(places),
        entrants=entrants,
        measures=conductor.measures,
        memories=tuple(conductor.memories),
        notes=tuple(conductor.notes),
    )


def _leave_files(report: Report, talk: Console) -> None:
    RESULTS.mkdir(exist_ok=True)
    stem = machine.free_stem(RESULTS, f"{report.date}-{machine.in_words(report.machine)}")
    record = RESULTS / f"{stem}.json"
    record.write_text(to_json(report))
    talk.print(f"record: {record.relative_to(machine.REPOSITORY)}")
    picture = machine.OUTPUT / f"{stem}.png"
    try:
        chart.draw(report, picture)
    except ImportError as problem:
        talk.print(f"no chart: {problem}")
    else:
        talk.print(f"chart: {picture.relative_to(machine.REPOSITORY)}")


def _words(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for word in found:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(allowed)}")
        return found

    return words


def _contestants(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    for name in found:
        if not is_known(name):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(LIBRARIES)}")
    return found


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(round(float(word) * 1e9) for word in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
