"""A coordinator in a thread of the test's process, whose workers are threads that join through its socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastickpt.elastic.calling import connected
from elastickpt.elastic.conductor import Conductor
from elastickpt.elastic.coordinator import Coordinator, Listening
from elastickpt.elastic.duties import LadderOf
from elastickpt.elastic.enlisting import FromLauncher
from elastickpt.elastic.event_log import EventLog
from elastickpt.elastic.job import JobPhase
from elastickpt.elastic.joining import Job
from elastickpt.elastic.ladder import ladder_of
from elastickpt.elastic.limits import Limits
from elastickpt.elastic.messages import End, Join
from elastickpt.elastic.replacing import Replacing
from elastickpt.ranks.addresses import listen

TOKEN = "of the test"


class NoAgent:
    """Starts nobody: the test's threads join by themselves."""

    waits = False

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()

    def fileno(self) -> int:
        return self._ours.fileno()

    def flush(self) -> None:
        return None

    def receive(self) -> Iterator[FromLauncher]:
        return iter(())

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Inside:
    """One job; `address` is where its coordinator listens."""

    def __init__(self, folder: Path, stages: int, limits: Limits, of: LadderOf) -> None:
        near, self.address = listen(host=None)
        self.conductor = Conductor(stages, limits, Replacing(0, 0), clock_offset=time.time() - time.monotonic())
        self._log = EventLog(folder / "events.jsonl")
        self._file = folder / "events.jsonl"
        door = Listening((near,), TOKEN)
        self.coordinator = Coordinator(self.conductor, NoAgent(), door, of, self._log)  # type: ignore[arg-type]
        self.ended: list[End] = []
        self._thread = threading.Thread(target=lambda: self.ended.append(self.coordinator.run()))
        self._thread.start()

    def join(self, uid: str, *, pid: int = 1) -> Job:
        """A member, with a thread of its own for its line."""
        job = Job(connected(self.address, TOKEN), Join(uid, pid, "host", "zone"))
        job.wait_until_in()
        return job

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [one for line in self._file.read_text().split("\n")[:-1] if (one := json.loads(line))["event"] == kind]

    def wait(self) -> End:
        self._thread.join(240)
        (end,) = self.ended
        return end

    def stop(self) -> None:
        if self._thread.is_alive() and self.conductor.job.phase is not JobPhase.ENDED:
            self.coordinator.signalled(2)
        self._thread.join(240)
        self._log.close()
        assert not self._thread.is_alive()


@contextmanager
def inside(folder: Path, stages: int, limits: Limits | None = None, *, of: LadderOf = ladder_of) -> Iterator[Inside]:
    job = Inside(folder, stages, limits or Limits(heartbeat_s=60.0), of)
    try:
        yield job
    finally:
        job.stop()
