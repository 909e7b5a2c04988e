"""Carries out a plan job by job, collects what the ranks report, and shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import session
from .compare import gather, title
from .machine import lacking_space
from .plan import Job
from .ranks import JobFailed, Launcher
from .records import Measure, Memory


class Conductor:
    """Runs jobs through a launcher. A job that fails or does not fit becomes a note; the others go on."""

    def __init__(self, launch: Launcher, talk: Console, *, minutes: float | None = None) -> None:
        self._launch = launch
        self._talk = talk
        self._minutes = minutes
        self._samples: list[session.Sample] = []
        self.memories: list[Memory] = []
        self.notes: list[str] = []

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured so far."""
        return gather(
            (each.setting, each.contestant, each.seconds, each.requested_nbytes, each.device_nbytes, each.error)
            for each in self._samples
        )

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """Run all jobs in order; blocks. Contestants that could not save are left out of the load that follows, and jobs that
        would begin when the minutes are over become notes."""
        withdrawn: set[str] = set()
        begun = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._talk, disable=not self._talk.is_terminal) as bar:
            task = bar.add_task("", total=len(jobs))
            for at, job in enumerate(jobs):
                if job.kind == "reshard":
                    job = replace(job, contestants=tuple(name for name in job.contestants if name not in withdrawn))
                if self._minutes is not None and time.monotonic() > begun + self._minutes * 60:
                    self._note(f"left out: {job.title}: {self._minutes:g} minutes are over")
                    continue
                bar.update(task, description=job.title)
                if not self._talk.is_terminal:
                    self._talk.print(f"[{at + 1}/{len(jobs)}] {job.title}")

                def advance(share: float, at: int = at) -> None:
                    bar.update(task, completed=at + share)

                withdrawn = self._carry_out_one(job, advance)
                bar.update(task, completed=at + 1)

    def _carry_out_one(self, job: Job, advance: Callable[[float], None]) -> set[str]:
        """Names of contestants that failed in this job."""
        if (lack := lacking_space(job)) is not None:
            self._note(f"left out: {job.title}: {lack}")
            return set(job.contestants)
        failed: set[str] = set()

        def on_message(message: session.Message) -> None:
            if isinstance(message, session.Sample):
                self._samples.append(message)
                if message.error is not None:
                    failed.add(message.contestant)
                    self._note(f"{message.contestant} withdrawn from {title(message.setting)}: {message.error}")
            elif isinstance(message, Memory):
                self.memories.append(message)
            elif isinstance(message, session.Progress):
                advance(message.done / message.total)

        try:
            self._launch(job, on_message)
        except JobFailed as problem:
            self._note(f"cut short: {job.title}: {problem}")
        return failed

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._talk.print(text, style="yellow", markup=False, highlight=False)
