"""`elastickpt-run`: starts the workers of a job, and goes on when some of them die. [CLI-90..94]"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from elastickpt.cli.exitcodes import FAILED, INTERRUPTED
from elastickpt.elastic.agent import WorkerProgram
from elastickpt.elastic.environment import TOKEN
from elastickpt.elastic.launcher import Here, Launch, join, launch
from elastickpt.elastic.limits import HEARTBEAT_S, Limits
from elastickpt.elastic.stream import new_token
from elastickpt.errors import CheckpointError, RecoveryFailed, Refused

_EXAMPLES = """\
examples:
  elastickpt-run --stages 6 --spares 1 train.py --lr 3e-4
  elastickpt-run --stages 6 --coordinator 10.0.0.1:29600 --workers 4 train.py
  elastickpt-run --join 10.0.0.1:29600 --workers 3 --host b --zone east train.py

exit codes: 0 done; 1 failed; 2 usage; 75 start again, it goes on at the newest checkpoint; 76 do not, a newer job has the run;
130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one command line; the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if options.limits and options.script is None:
            _print_limits(_limits(options))
            return 0
        _require_consistent(parser, options)
    except SystemExit as end:  # of argparse: 0 after --help, 2 for bad usage
        return end.code if isinstance(end.code, int) else FAILED
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="elastickpt-run: %(message)s")
    try:
        return _run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except CheckpointError as error:
        print(f"elastickpt-run: {error}", file=sys.stderr)
        return error.code if isinstance(error, RecoveryFailed) else FAILED


def _run(options: argparse.Namespace) -> int:
    log_dir = None if options.log_dir is None else Path(options.log_dir).absolute()
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"--log-dir {log_dir}: cannot be made: {error.strerror}") from error
    program = WorkerProgram((options.script, *options.args), log_dir)
    host = options.host or socket.gethostname()
    token = os.environ.get(TOKEN) or new_token()
    if options.join:
        end = join(Here(program, options.workers or 1, host, options.zone), options.join, token)
    else:
        from elastickpt.elastic.ladder import ladder_of

        spares = options.spares or 0
        workers = options.stages + spares if options.workers is None else options.workers
        events = None if options.events is None else Path(options.events).absolute()
        job = Launch(
            Here(program, workers, host, options.zone),
            options.stages,
            token,
            options.max_replacements or 0,
            _limits(options),
            events,
            options.coordinator,
        )
        end = launch(job, ladder_of)
    return end.code


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(HEARTBEAT_S if options.heartbeat is None else options.heartbeat, options.spare_wait)


def _print_limits(limits: Limits) -> None:
    rows = [("limit", "value", "set by", "what it bounds")]
    rows += [(one.name, one.value, one.flag or "-", one.bounds) for one in limits.table()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))


def _require_consistent(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with 2 where flags contradict each other, naming both."""
    if options.script is None:
        parser.error("the following arguments are required: SCRIPT")
    if not Path(options.script).is_file():
        parser.error(f"SCRIPT {options.script}: there is no such file")
    if options.join:
        given = {
            "--stages": options.stages,
            "--spares": options.spares,
            "--coordinator": options.coordinator,
            "--max-replacements": options.max_replacements,
            "--heartbeat": options.heartbeat,
            "--spare-wait": options.spare_wait,
            "--events": options.events,
        }
        for flag, value in given.items():
            if value not in (None, ""):
                parser.error(f"--join and {flag} contradict each other: the coordinator has said that already")
    elif options.stages is None:
        parser.error("the following arguments are required: --stages (or --join)")
    if options.workers is not None and not (options.join or options.coordinator):
        parser.error("--workers needs --join or --coordinator: on one machine, --stages and --spares say how many")
    if options.workers is not None and options.spares is not None:
        parser.error("--workers and --spares contradict each other: of a job's workers, those beyond its stages are spares")
    if (options.join or options.coordinator) and not os.environ.get(TOKEN):
        parser.error(f"{'--join' if options.join else '--coordinator'} needs a token in ${TOKEN}, the same on all machines")


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="elastickpt-run",
        usage="elastickpt-run --stages N [options] SCRIPT [ARGS ...]",
        description="Start the workers of a job, one process for each pipeline stage, and go on when some of them die.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--stages", type=_positive, metavar="N", help="pipeline stages, one process each")
    found.add_argument("--spares", type=_count, metavar="K", help="processes that wait to take a lost place (0)")
    found.add_argument(
        "--max-replacements",
        type=_count,
        metavar="M",
        help="how many processes are started anew over the job, to keep the spares filled or in a lost place (0)",
    )
    found.add_argument("--heartbeat", type=_seconds, metavar="S", help="silence after which a worker is lost (5)")
    found.add_argument("--spare-wait", type=_seconds, metavar="S", help="how long an empty place waits (Policy.spare_wait_s)")
    found.add_argument("--events", metavar="FILE", help="append what happens, as JSON lines")
    found.add_argument("--log-dir", metavar="DIR", help="the output of each worker, in files of their own")
    found.add_argument("--limits", action="store_true", help="print all limits, without SCRIPT")
    found.add_argument("--coordinator", type=_address, metavar="HOST:PORT", help="where further machines find this one")
    found.add_argument("--join", type=_address, metavar="HOST:PORT", help="start workers for the job there")
    found.add_argument("--workers", type=_positive, metavar="K", help="how many workers this machine starts")
    found.add_argument("--host", default="", metavar="NAME", help="what this machine is called (its host name)")
    found.add_argument("--zone", default="", metavar="NAME", help="with what it may be lost at once")
    found.add_argument("script", nargs="?", metavar="SCRIPT")
    found.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS")
    return found


def _positive(text: str) -> int:
    return _number(text, 1)


def _count(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least {least}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds above 0")
    return found


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT")
    return text
