"""Processes that a job has started beside its ranks, and what is left of them when the ranks are gone."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_LIBC = ctypes.CDLL(None, use_errno=True)


def helpers_of(pid: int) -> list[int]:
    """Processes below a rank that work for it; multiprocessing's own book-keeper is none."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in below if "resource_tracker" not in _command(process)]


@contextmanager
def orphans_ended(settle_s: float) -> Iterator[None]:
    """At its end no process is left that was started below this one meanwhile.

    Orphans get that long to end by themselves: a writer may outlive its trainer, and finish. Then they are killed. Until then
    this process is the one that inherits them.
    """
    before = _is_subreaper()
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    known = {process.pid for process in _below()}
    try:
        yield
    finally:
        new = [process for process in _below() if process.pid not in known]
        _, left = psutil.wait_procs(new, timeout=settle_s)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, before, 0, 0, 0)


def stack_of(output: str, function: str) -> str:
    """Where the thread that runs `function` stood, by the stacks that a process dumped: the innermost lines."""
    threads = [text for text in output.split("\n\n") if f"in {function}" in text]
    lines = [line.strip() for text in threads for line in text.splitlines() if line.lstrip().startswith("File ")]
    return " < ".join(line.rpartition("/")[2] for line in lines[:4]) or "no stack"


def _below() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(os.getpid()).children(recursive=True)
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_subreaper() -> int:
    value = ctypes.c_int()
    _LIBC.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return value.value
