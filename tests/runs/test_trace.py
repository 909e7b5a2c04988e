"""A trace is whole JSON after every phase, in the form of trace events."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import elastickpt
from elastickpt.errors import NoSpace, PathOccupied, Refused
from elastickpt.runs.events import Phase
from elastickpt.runs.trace import TraceFile

ENDLESS = """
import sys
from elastickpt.runs.events import Phase
from elastickpt.runs.trace import TraceFile
trace = TraceFile(sys.argv[1])
for n in range(10**9):
    trace.add(Phase("write", n % 7, "writer", n, n + 1, n))
    if n == 100:
        print(flush=True)
"""


def test_phases_are_complete_events_on_named_tracks(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        assert json.loads(path.read_text()) == []
        trace.add(Phase("stage", 3, "trainer", 12.0, 12.5, 900))
        assert len(json.loads(path.read_text())) == 4
        trace.add(Phase('write "名"', 3, "writer", 12.25, 12.250001))
        trace.add(Phase("stage", 4, "trainer", 12.0, 12.0, 900))
    events = json.loads(path.read_text())
    spans = [event for event in events if event["ph"] == "X"]
    assert [(one["name"], one["pid"], one["tid"], one["ts"], one["dur"], one["args"]) for one in spans] == [
        ("stage", 3, 1, 12e6, 500_000, {"step": 900}),
        ('write "名"', 3, 2, 12.25e6, 1, {}),
        ("stage", 4, 1, 12e6, 0, {"step": 900}),
    ]
    names = [(one["pid"], one.get("tid"), one["args"]) for one in events if one["name"] in ("process_name", "thread_name")]
    assert names == [
        (3, None, {"name": "rank 3"}),
        (3, 1, {"name": "trainer"}),
        (3, 2, {"name": "writer"}),
        (4, None, {"name": "rank 4"}),
        (4, 1, {"name": "trainer"}),
    ]


def test_a_process_that_is_killed_leaves_a_file_that_loads(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(elastickpt.__file__).parents[1])}
    for k in range(3):
        path = tmp_path / f"{k}.json"
        with subprocess.Popen([sys.executable, "-c", ENDLESS, path], env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
        spans = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
        assert [event["args"]["step"] for event in spans] == list(range(len(spans)))
        assert len(spans) > 100


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_full_disk_loses_the_phase_and_nothing_else(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        trace.add(Phase("stage", 0, "trainer", 1.0, 2.0, 1))
        before = path.read_bytes()
        pwrite, room = os.pwrite, [written]

        def full(descriptor: int, data: bytes, offset: int) -> int:
            if data == b"\n]\n":
                return pwrite(descriptor, data, offset)
            part = data[: room.pop()] if room else b""
            if not part:
                raise OSError(errno.ENOSPC, "full")
            return pwrite(descriptor, part, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(NoSpace):
                trace.add(Phase("write", 0, "writer", 2.0, 3.0, 1))
        assert path.read_bytes() == before
        trace.add(Phase("write", 0, "writer", 2.0, 3.0, 2))
    spans = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
    assert [event["args"]["step"] for event in spans] == [1, 2]
    assert len(json.loads(path.read_text())) == 6  # the writer's track has its name


def test_phases_of_several_threads_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: trace.add(Phase("write", n % 3, "writer", n, n + 1, n)), range(200)))
    events = json.loads(path.read_text())
    assert sorted(event["args"]["step"] for event in events if event["ph"] == "X") == list(range(200))


def test_what_is_no_phase_or_no_new_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        with pytest.raises(Refused, match="expected an end"):
            trace.add(Phase("stage", 0, "trainer", 2.0, 1.0))
        with pytest.raises(Refused):
            trace.add(Phase("stage", 0, "trainer", float("nan"), 1.0))
        with pytest.raises(PathOccupied):
            TraceFile(path)
    trace.close()
    assert json.loads(path.read_text()) == []
