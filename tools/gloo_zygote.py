"""The process that `gloo_ranks` forks ranks from: it has imported torch once, and has started no threads.

Started by `gloo_ranks` with one end of a socket pair; ends, and ends what it forked, when the other end closes.
A rank is not reaped before its parent asks, so that a pid known to the parent is never another process.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import pkgutil
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import elastickpt

WATCHDOG_EXTRA_S = 30.0  # a rank whose parent is gone ends itself this long after its limit


@dataclass(frozen=True, slots=True)
class FunctionName:
    """Where a module-level function is found: its module's name and file, and its name there."""

    module: str
    file: str
    name: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Fork `world_size` ranks that run `function(rank, world_size, *args)`; `args` is what `encode` made of them."""

    function: FunctionName
    args: bytes
    world_size: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reap:
    """Wait for these ranks, which have ended or are about to."""

    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rank reports: the result, or the exception with its traceback as text; `at` is monotonic time."""

    value: Any
    error: BaseException | None
    traceback: str
    at: float


class _Whole(ForkingPickler):
    """Sends tensors whole: torch's reducers send a descriptor of shared memory, which dies with its process."""

    _extra_reducers: ClassVar[dict[type, Callable[[Any], Any]]] = {}


def encode(value: object) -> bytes:
    """`value` as it crosses processes; tensors by their contents."""
    return bytes(_Whole.dumps(value))


def decode(data: bytes) -> Any:
    """What `encode` was given, in the process that started the other one."""
    return ForkingPickler.loads(data)


def serve(descriptor: int) -> None:
    """Answers on the socket until it is closed: pids or a traceback for a Launch, wait statuses for a Reap."""
    _preload()
    gc.collect()
    gc.freeze()  # what is shared with the ranks stays shared: their collections do not touch these objects
    control: Any = Connection(os.dup(descriptor))
    with socket.socket(fileno=descriptor) as sock:
        alive: set[int] = set()
        try:
            while True:
                request = control.recv()
                if isinstance(request, Launch):
                    control.send(_launch(request, sock, alive))
                else:
                    control.send([os.waitpid(pid, 0)[1] for pid in request.pids])
                    alive.difference_update(request.pids)
        except (EOFError, ConnectionError):
            pass
        finally:
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _preload() -> None:
    """What ranks use, so that none of them imports it anew; of the package all, as it is imported where it is needed first."""
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining", "numpy.ma"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(elastickpt.__path__, "elastickpt."):
        if not module.name.startswith("elastickpt.testing") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _launch(request: Launch, sock: socket.socket, alive: set[int]) -> list[int] | str:
    # Per rank one end of a pipe for its answer and one file for its output; last the listening socket of the store.
    _, descriptors, _, _ = socket.recv_fds(sock, 1, 2 * request.world_size + 1)
    *pairs, listener = descriptors
    pids = []
    try:
        try:
            function = _function(request.function)
        except BaseException:
            return traceback.format_exc()
        for rank in range(request.world_size):
            pid = os.fork()
            if pid == 0:
                own = (pairs[2 * rank], pairs[2 * rank + 1], listener)
                _run_rank(request, function, rank, own, [fd for fd in descriptors if fd not in own])
            pids.append(pid)
            alive.add(pid)
    finally:
        for fd in descriptors:
            os.close(fd)
    return pids


def _function(where: FunctionName) -> Callable[..., object]:
    module = sys.modules.get(where.module)
    if module is None:
        spec = importlib.util.spec_from_file_location(where.module, where.file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{where.file} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[where.module] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[where.module]
            raise
    found: Callable[..., object] = getattr(module, where.name)
    return found


def _run_rank(
    request: Launch, function: Callable[..., object], rank: int, own: tuple[int, int, int], others: list[int]
) -> None:
    """The whole life of a rank; never returns."""
    status = 1
    try:
        answers, output, listener = own
        for fd in others:
            os.close(fd)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(2)
        faulthandler.dump_traceback_later(request.timeout_s + WATCHDOG_EXTRA_S, exit=True, file=2)
        connection: Any = Connection(answers)
        status = _send(connection, _answer(request, function, rank, listener))
        if status == 0:
            # Ranks leave together: one that leaves early closes its sockets under a peer's last collective.
            with suppress(EOFError, OSError):
                connection.recv_bytes()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _answer(request: Launch, function: Callable[..., object], rank: int, listener: int) -> Answer:
    try:
        _init(request, rank, listener)
        return Answer(function(rank, request.world_size, *decode(request.args)), None, "", time.monotonic())
    except BaseException as error:
        return Answer(None, error, traceback.format_exc(), time.monotonic())


def _init(request: Launch, rank: int, listener: int) -> None:
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import TCPStore

    if request.world_size > 1:
        torch.set_num_threads(1)
    timeout = timedelta(seconds=request.timeout_s)
    with socket.socket(fileno=os.dup(listener)) as sock:
        port = sock.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        request.world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener if rank == 0 else None,
    )
    if rank != 0:
        os.close(listener)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=request.world_size, timeout=timeout)


def _send(connection: Any, answer: Answer) -> int:
    """Tells the parent, and returns the exit status that goes with it."""
    try:
        data = encode(answer)
    except BaseException:  # what cannot cross processes is told as text
        text = answer.traceback or f"the result {type(answer.value).__name__} cannot be sent:\n{traceback.format_exc()}"
        answer = Answer(None, None, text, answer.at)
        data = encode(answer)
    with suppress(OSError):  # nobody listens any more
        connection.send_bytes(data)
    return int(bool(answer.traceback))
