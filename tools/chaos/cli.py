"""`python -m tools.chaos power|save|flips|recovery`: options in, tables on stdout, talk on stderr, a record beside."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tools.bench import machine
from tools.interrupts import sigterm_interrupts

from . import conduct, recovery_report
from .entrants import FLIPPED, KILLED, POWER, is_known
from .mounts import lacking, private_mounts
from .records import Kind, Report, from_json, to_json
from .table import render

RESULTS = Path(__file__).with_name("results")
OUTPUT = machine.REPOSITORY / "out" / "chaos"
EPILOG = """examples:
  python -m tools.chaos power                            500 states each of ours and two peers' disks, a quarter of an hour
  python -m tools.chaos power --contestant elastickpt --states 5000 --seed 7
  python -m tools.chaos save                             20 kills each; those that start processes take half a minute a kill
  python -m tools.chaos save --kills 100 --contestant elastickpt,dcp,dcp-overwrite
  python -m tools.chaos save --contestant tc --seed 1 --only 3
  python -m tools.chaos flips                            200 bits each of ours and two peers' checkpoints, three minutes
  python -m tools.chaos recovery                         stages of a pipeline are lost; all forms, half an hour
  python -m tools.chaos recovery --form matrix --seed 7
  python -m tools.chaos show tools/chaos/results/FILE.json

A contestant is one of those listed, or module:attribute, where an Entrant stands. Exit codes: 0 nothing of ours was found
bad, 1 something was, 2 wrong usage, 4 not possible here, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing of elastickpt's was found bad; 1: something was; 2, 4, 130: see `EPILOG`."""
    parsed = parser().parse_args(arguments)
    console, talk = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True)
    if parsed.command == "show":
        text = Path(parsed.file).read_text()
        is_of_recoveries = json.loads(text).get("kind") == "recovery"
        shown = recovery_report.render(*recovery_report.from_json(text)) if is_of_recoveries else render(from_json(text))
        console.print(shown)
        return 0
    if parsed.command == "recovery":
        return _recovery(parsed, console, talk)
    if parsed.command == "power" and (why := lacking()):
        talk.print(f"power cuts cannot be replayed here: {why}", markup=False)
        return 4
    if parsed.command == "power":
        private_mounts()
    try:
        with sigterm_interrupts(), _progress(talk) as advance:
            report = _run(parsed, advance)
    except (KeyboardInterrupt, OSError, EOFError) as error:
        if not (isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)):
            raise
        talk.print("interrupted: nothing was left")  # what it was waiting for may have been interrupted too
        return 130
    if parsed.json:
        print(to_json(report), end="")
    else:
        console.print(render(report))
    if parsed.only is None:
        _leave(report, talk)
    clean = all(one.is_clean for one in report.tallies if one.contestant.startswith("elastickpt"))
    return 0 if clean else 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description="Cut saves off or flip bits, ours and the peers', and load what is left.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = found.add_subparsers(dest="command", required=True, metavar="power|save|flips|recovery|show")
    power = commands.add_parser("power", help="power cuts on a real ext4, every block write logged")
    _common(power, POWER)
    power.add_argument("--states", type=int, default=500, metavar="N", help="states of each contestant's disk; default 500")
    power.add_argument("--saves", type=int, default=3, metavar="N", help="saves after a first one; default 3")
    power.add_argument("--pause", type=float, default=0.0, metavar="S", help="between saves; ext4 syncs by itself every 5 s")
    power.add_argument("--recording", metavar="FOLDER", help="use the recordings there; those that lack are left there")
    save = commands.add_parser("save", help="one of several processes is killed in a save")
    _common(save, KILLED)
    save.add_argument("--kills", type=int, default=20, metavar="N", help="kills of each contestant; default 20")
    save.add_argument("--limit", type=float, default=20.0, metavar="S", help="in which survivors must return; default 20")
    save.add_argument("--scale", type=int, default=8, metavar="N", help="size of the state in units of 1.1 MB; default 8")
    save.add_argument("--where", metavar="FOLDER", help="save there; default: on the disk that holds the repository")
    flips = commands.add_parser("flips", help="one bit of a checkpoint is flipped")
    _common(flips, FLIPPED)
    flips.add_argument("--flips", type=int, default=200, metavar="N", help="flips of each contestant; default 200")
    flips.add_argument("--scale", type=int, default=1, metavar="N", help="size of the state in units of 1.1 MB; default 1")
    flips.add_argument("--where", metavar="FOLDER", help="save there; default: on the disk that holds the repository")
    recovery = commands.add_parser("recovery", help="stages of a pipeline are lost, and training goes on")
    recovery.add_argument("--seed", type=int, default=1, metavar="S", help="of all that is drawn; default 1")
    forms = tuple(recovery_report.FORMS)
    recovery.add_argument(
        "--form", action="append", choices=forms, help=f"of {', '.join(forms)}; default: all but short; may be repeated"
    )
    recovery.add_argument("--count", type=int, default=200, metavar="N", help="random faults; default 200")
    recovery.add_argument("--limit", type=float, default=120.0, metavar="S", help="for one job; default 120")
    recovery.add_argument("--only", type=int, metavar="K", help="the job of this number alone; leaves no record")
    show = commands.add_parser("show", help="print the tables of an earlier run")
    show.add_argument("file")
    return found


def _recovery(parsed: argparse.Namespace, console: Console, talk: Console) -> int:
    found = recovery_report.plans(parsed.form or recovery_report.LONG, parsed.seed, parsed.count)
    if parsed.only is not None:
        found = found[parsed.only : parsed.only + 1]

    def tell(text: str) -> None:
        talk.print(text, markup=False, highlight=False, soft_wrap=True)

    with sigterm_interrupts():
        verdicts = recovery_report.carry_out_all(found, parsed.limit, OUTPUT / "recovery", tell)
    console.print(recovery_report.render(verdicts, parsed.seed))
    if parsed.only is None:
        date = datetime.date.today().isoformat()
        record = RESULTS / f"{machine.free_stem(RESULTS, f'{date}-recovery')}.json"
        record.write_text(recovery_report.to_json(verdicts, parsed.seed, date))
        talk.print(f"record: {record.relative_to(machine.REPOSITORY)}")
    return 1 if any(one.bad for one in verdicts) else 0


def _common(found: argparse.ArgumentParser, contestants: Sequence[str]) -> None:
    found.add_argument("--seed", type=int, default=1, metavar="S", help="of all that is drawn; default 1")
    found.add_argument("--ranks", type=int, default=2, metavar="R", help="that save together; default 2")
    found.add_argument(
        "--contestant", type=_contestants, default=tuple(contestants), metavar="LIST", help=f"default: {','.join(contestants)}"
    )
    found.add_argument("--only", type=int, metavar="K", help="this state, kill or flip alone; leaves no record")
    found.add_argument("--json", action="store_true", help="the record on stdout instead of tables")


def _contestants(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    for name in found:
        if not is_known(name):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(dict.fromkeys((*POWER, *KILLED, *FLIPPED)))}")
    return found


def _run(parsed: argparse.Namespace, advance: conduct.Advance) -> Report:
    names: tuple[str, ...] = parsed.contestant
    if parsed.command == "power":
        recordings = Path(parsed.recording) if parsed.recording else None
        cuts = conduct.Cuts(
            parsed.states, parsed.seed, parsed.ranks, parsed.saves, parsed.pause, only=parsed.only, recordings=recordings
        )
        return _report("power", str(cuts), conduct.power_cuts(names, cuts, advance))
    top = Path(parsed.where) if parsed.where else OUTPUT
    top.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=top, prefix=f"{parsed.command}-") as folder:
        if parsed.command == "flips":
            return _flips(parsed, Path(folder), advance)
        setting = conduct.Setting(Path(folder), parsed.ranks, parsed.seed, parsed.scale, parsed.limit)
        numbers = range(parsed.kills) if parsed.only is None else (parsed.only,)
        return _report("save", f"{len(numbers)} kills, {setting}", conduct.kill_matrix(names, setting, numbers, advance), top)


def _flips(parsed: argparse.Namespace, folder: Path, advance: conduct.Advance) -> Report:
    setting = conduct.FlipSetting(folder, parsed.ranks, parsed.seed, parsed.scale)
    numbers = range(parsed.flips) if parsed.only is None else (parsed.only,)
    found = conduct.flip_matrix(parsed.contestant, setting, numbers, advance)
    return _report("flips", f"{len(numbers)} flips, {setting}", found, folder.parent)


def _report(kind: Kind, options: str, found: conduct.Found, place: Path | None = None) -> Report:
    where = (machine.place_at(place),) if place else ()
    today = datetime.date.today().isoformat()
    return Report(kind, today, options, machine.describe(where), found.tallies, found.absent)


def _leave(report: Report, talk: Console) -> None:
    RESULTS.mkdir(exist_ok=True)
    record = RESULTS / f"{machine.free_stem(RESULTS, f'{report.date}-{report.kind}')}.json"
    record.write_text(to_json(report))
    talk.print(f"record: {record.relative_to(machine.REPOSITORY)}")


@contextmanager
def _progress(talk: Console) -> Iterator[conduct.Advance]:
    """A bar on a terminal, else a line at each tenth."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=talk, disable=not talk.is_terminal) as bar:
        task = bar.add_task("", total=1)

        def advance(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)
            if not talk.is_terminal and done % max(1, total // 10) == 0:
                talk.print(f"{text}: {done} of {total}", markup=False, highlight=False)

        yield advance
