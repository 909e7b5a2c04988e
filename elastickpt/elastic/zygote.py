"""The process that a launcher forks its workers from: it has imported torch once, and has started no threads.

    launcher   Fork    a worker, with its script, arguments and environment
    zygote     Forked  its pid
               Ended   its wait status; it has been reaped

When the launcher's end of the connection closes, workers have a stated time to leave; who has not left then is killed.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import cast

from elastickpt.elastic import environment
from elastickpt.elastic.limits import KILLED_AFTER_S
from elastickpt.elastic.stream import Closed, Stream
from elastickpt.errors import RecoveryFailed, Superseded
from elastickpt.ranks.messages import Message, decode, encode


class Fork(Message, frozen=True, tag=True):
    """`variables` are added to the environment; output goes to the file `log`, "" for where the launcher's goes."""

    uid: str
    argv: tuple[str, ...]
    variables: dict[str, str]
    log: str


class Forked(Message, frozen=True, tag=True):
    uid: str
    pid: int


class Ended(Message, frozen=True, tag=True):
    """`status` as waitpid says it."""

    pid: int
    status: int


_ANSWER = cast("type[Forked | Ended]", Forked | Ended)


def request(fork: Fork) -> bytes:
    return encode(fork)


def answer(data: bytes) -> Forked | Ended:
    return decode(data, _ANSWER)


def main(descriptor: int, preloaded: Sequence[str]) -> int:
    """The whole life of a zygote that has imported these modules, and of each worker that it forks; the exit code."""
    for name in preloaded:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared with the workers stays shared: their collections do not touch these objects
    worker = _serve(descriptor)
    return 0 if worker is None else _run(worker)


def _serve(descriptor: int) -> Fork | None:
    """Answers until the launcher is gone; None then, and in a forked worker what it is to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stream = Stream(socket.socket(fileno=descriptor))
    alive: set[int] = set()
    while True:
        select.select([stream.fileno(), reading], [stream.fileno()] if stream.waits else [], [])
        stream.flush()
        with suppress(BlockingIOError):
            os.read(reading, 4096)
        _reap(stream, alive)
        try:
            received = stream.receive()
        except Closed:
            _outlive(alive)
            return None
        for data in received:
            fork = decode(data, Fork)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                stream.close_here()
                os.close(reading)
                os.close(writing)
                return fork
            alive.add(pid)
            stream.send(encode(Forked(fork.uid, pid)))


def _reap(stream: Stream, alive: set[int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            break
        alive.discard(pid)
        stream.send(encode(Ended(pid, status)))


def _outlive(alive: set[int]) -> None:
    """The launcher is gone: nobody stays behind."""
    until = time.monotonic() + KILLED_AFTER_S
    while alive:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid:
            alive.discard(pid)
        elif time.monotonic() > until:
            for one in alive:
                os.kill(one, signal.SIGKILL)
            until = float("inf")
        else:
            time.sleep(0.02)


def _run(worker: Fork) -> int:
    """The script, as Python itself would run it; its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()  # Ctrl-C in the terminal is the launcher's
    _seed()
    environment.tell(worker.variables)
    if worker.log:
        log = os.open(worker.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what a worker has said before it is killed is not lost
    sys.argv = list(worker.argv)
    sys.path[0] = os.path.dirname(os.path.abspath(worker.argv[0]))
    try:
        runpy.run_path(worker.argv[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        if worker.log or not (environment.is_told(error) or isinstance(error, RecoveryFailed)):
            traceback.print_exception(error)
        return _code(error)
    return 0


def _code(error: BaseException) -> int:
    if isinstance(error, RecoveryFailed):
        return error.code
    return 76 if isinstance(error, Superseded) else 1


def _seed() -> None:
    """Workers draw different numbers where the script does not seed, as separate processes do."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
