"""Phases of saves as a trace that Perfetto and Chrome open: an array of trace events, complete after every one.

One file a process: tracks of one host join by `jq -s add trace-*.json`, as they share a clock; those of several hosts do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

from elastickpt.errors import Refused
from elastickpt.runs.events import Phase, ProcessKind
from elastickpt.storage.opening import local_path
from elastickpt.storage.store import naming

_THREADS: dict[ProcessKind, int] = {"trainer": 1, "writer": 2}
_HEAD, _TAIL = b"[", b"\n]\n"


class TraceFile:
    """A new file at `path` that is whole JSON after every `add`, so that one of a process that was killed loads too; a kill
    inside the write itself, if that crosses a page, may cut the last phase.

    A rank is a process of the trace, its trainer and writer are threads. From any thread; blocks for a write to the page cache,
    and is not synced. Raises PathOccupied, StorageFailed kinds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        with naming("create", self._path):
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            os.pwrite(self._descriptor, _HEAD + _TAIL, 0)
        self._end = len(_HEAD)
        self._lock = threading.Lock()
        self._named: set[tuple[int, ProcessKind | None]] = set()

    def add(self, phase: Phase) -> None:
        """The phase is in the file. Raises Refused for one that ends before it begins, StorageFailed kinds: then it is not."""
        if not phase.begin_s <= phase.end_s:
            raise Refused(f"phase {phase.name}: expected an end from its begin {phase.begin_s} on, found {phase.end_s}")
        event: dict[str, object] = {
            "name": phase.name,
            "cat": "elastickpt",
            "ph": "X",
            "ts": round(phase.begin_s * 1e6, 3),
            "dur": round((phase.end_s - phase.begin_s) * 1e6, 3),
            "pid": phase.rank,
            "tid": _THREADS[phase.process],
            "args": {} if phase.step is None else {"step": phase.step},
        }
        with self._lock:
            self._append([*self._names(phase), event])
            self._named |= {(phase.rank, None), (phase.rank, phase.process)}

    def close(self) -> None:
        """The file is given up as it is. The second call does nothing."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names(self, phase: Phase) -> list[dict[str, object]]:
        """What a rank and its process are called, before their first phase."""
        of_rank: dict[str, object] = {"ph": "M", "pid": phase.rank}
        found: list[dict[str, object]] = []
        if (phase.rank, None) not in self._named:
            found.append({**of_rank, "name": "process_name", "args": {"name": f"rank {phase.rank}"}})
            found.append({**of_rank, "name": "process_sort_index", "args": {"sort_index": phase.rank}})
        if (phase.rank, phase.process) not in self._named:
            tid = _THREADS[phase.process]
            found.append({**of_rank, "tid": tid, "name": "thread_name", "args": {"name": phase.process}})
        return found

    def _append(self, events: list[dict[str, object]]) -> None:
        """One write from the closing bracket on, which puts it anew."""
        lines = [json.dumps(event, allow_nan=False, separators=(",", ":")) for event in events]
        before = "\n" if self._end == len(_HEAD) else ",\n"
        data = (before + ",\n".join(lines)).encode("ascii")
        with naming("write", self._path):
            try:
                self._write(data + _TAIL)
            except OSError:
                with contextlib.suppress(OSError):
                    os.pwrite(self._descriptor, _TAIL, self._end)
                    os.ftruncate(self._descriptor, self._end + len(_TAIL))
                raise
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], self._end + done)


def trace_in(folder: str, *, rank: int) -> TraceFile | None:
    """This rank's file in a folder, which is made if need be; None where none is asked for."""
    if not folder:
        return None
    traces = Path(local_path(folder))
    traces.mkdir(parents=True, exist_ok=True)
    return TraceFile(traces / f"trace-{os.getpid()}-rank{rank:05d}.json")
