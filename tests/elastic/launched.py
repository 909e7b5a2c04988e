"""Jobs of the tests: `elastickpt-run` as a process, whose workers sleep instead of training and are forked without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SLEEPER = Path(__file__).parent / "sleeper.py"
_CODE = (
    "import sys; import elastickpt.elastic.agent as agent; agent.PRELOADED = ('elastickpt.elastic.joining',); "
    "from elastickpt.cli.launch import main; sys.exit(main())"
)
LIMIT_S = 240.0


class Launched:
    """One launcher, with the marks of its workers in `folder`."""

    def __init__(
        self, folder: Path, *arguments: object, script: tuple[object, ...] = (SLEEPER, 3, 0.01), token: str = ""
    ) -> None:
        self.folder = folder
        self.events_file = folder / "events.jsonl"
        self.stderr_file = folder / f"stderr-{time.monotonic_ns()}"
        events = [] if "--join" in arguments else ["--events", self.events_file]
        if not {"--join", "--heartbeat"} & set(arguments):
            events += ["--heartbeat", 60]  # however busy the machine is, nobody counts as silent
        command = [sys.executable, "-c", _CODE, *events, *arguments, *script]
        environment = {**os.environ, "SLEEPER_MARKS": str(folder), "PYTHONPATH": ""}
        if token:
            environment["ELASTICKPT_TOKEN"] = token
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [str(one) for one in command], stdout=stderr, stderr=stderr, env=environment, start_new_session=True
            )

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        try:
            lines = self.events_file.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines if line.endswith("}\n")]  # the last one may be half there
        return [one for one in found if kind in ("", one["event"])]

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        """What `holds` gives once it is true."""
        end = time.monotonic() + LIMIT_S
        while not (found := holds()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{what}: not seen; launcher {self.process.poll()}\n{self.stderr}\n{self.events()}")
            time.sleep(0.01)
        return found

    def pid_of(self, stage: int) -> int:
        """Of the process that holds the stage, waited for."""

        def holder() -> int | None:
            held = [one for one in self.events("member") if one["place"] and one["place"]["stage"] == stage]
            return held[-1]["pid"] if held else None

        return int(self.until(holder, f"a process at stage {stage}"))

    def code(self) -> int:
        """The exit code, waited for."""
        return self.process.wait(LIMIT_S)

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@contextmanager
def launched(folder: Path, *arguments: object, **options: Any) -> Iterator[Launched]:
    """A job, of which nothing is left at the end of the block."""
    job = Launched(folder, *arguments, **options)
    known: dict[int, psutil.Process] = {}
    try:
        yield job
        known = {one.pid: one for one in job.children()}
    finally:
        if job.process.poll() is None:
            known |= {one.pid: one for one in job.children()}
            job.process.kill()
            job.process.wait()
        for event in job.events("member"):
            with suppress(psutil.Error, ProcessLookupError):  # it has ended
                one = psutil.Process(event["pid"])
                if "SLEEPER_MARKS" in one.environ():
                    known[one.pid] = one
        for one in known.values():
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that have not ended, a zombie being one that has."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found
