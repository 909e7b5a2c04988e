"""All cases of one library, in a process that imports it once: `python -m tools.clients.lives LIBRARY [TEXT]`.

Each life of a case is a process of its own, forked from this one, which trains nothing itself. Prints a row a line, as JSON.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it in its first step: once, and not in each life

import elastickpt as ek
from tools.clients import frameworks, modules, optimizers
from tools.clients.case import KILLED, Case, Life, Row, digest

LIMIT_S = 240.0
IMPORTED = (ek.save, ek.load)  # once, and not in each life


@dataclass(frozen=True, slots=True)
class _Ended:
    code: int
    last: str


def cases_of(library: str) -> Iterator[Case]:
    """All cases with objects of one library; only that one is imported."""
    for module in (optimizers, modules, frameworks):
        yield from module.cases(library)


def row(case: Case, processes: int) -> Row:
    """What becomes of one case on this many processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "checkpoint")
        whole, again = (_lived(case, Life("whole", path, processes)) for _ in range(2))
        if whole.code != 0:
            return _row(case, processes, "not tried", f"does not train here: {_told(whole)}")
        if again.last != whole.last:
            return _row(case, processes, "not tried", "two runs of it without a stop differ")
        killed = _lived(case, Life("killed", path, processes))
        if killed.code != KILLED:
            return _row(case, processes, _refused_or_failed(killed), f"save: {_told(killed)}")
        resumed = _lived(case, Life("resumed", path, processes))
        if resumed.code != 0:
            return _row(case, processes, _refused_or_failed(resumed), f"load: {_told(resumed)}")
        return _row(case, processes, "bit for bit" if resumed.last == whole.last else "differs", "")


def _row(case: Case, processes: int, verdict: str, why: str) -> Row:
    return Row(case.package, case.name, processes, verdict, why)


def _lived(case: Case, life: Life) -> _Ended:
    """Rank 0's end; the others run beside it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = [_forked(case, life, rank, port) for rank in range(life.processes)]
    first, *_ = [_awaited(pid, pipe) for pid, pipe in running]
    return first


def _forked(case: Case, life: Life, rank: int, port: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        torch.set_num_threads(1)  # threads of OpenMP that this process may have are not in its child, which would wait for them
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        if life.processes > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(life.processes), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            torch.distributed.init_process_group("gloo")
        os.write(writing, digest(case.run(life)).encode())
        code = 0
    except Exception as error:  # whatever a library raises is a row of the table
        told = {"error": type(error).__name__, "kind": getattr(error, "kind", ""), "message": str(error)[:400]}
        os.write(writing, json.dumps(told).encode())
    finally:
        os._exit(code)


def _awaited(pid: int, pipe: int) -> _Ended:
    """The end of a life, at the latest after LIMIT_S."""
    said, until = b"", time.monotonic() + LIMIT_S
    while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        said += part
    else:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        said = json.dumps({"error": "TimeoutError", "kind": "", "message": f"no end in {LIMIT_S:.0f} s"}).encode()
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    return _Ended(os.waitstatus_to_exitcode(status), said.decode())


def _said(ended: _Ended) -> dict[str, str]:
    try:
        found = json.loads(ended.last)
    except ValueError:
        return {"error": "ended", "kind": "", "message": f"with code {ended.code}"}
    return found if isinstance(found, dict) else {"error": "", "kind": "", "message": ended.last}


def _refused_or_failed(ended: _Ended) -> str:
    return "refused" if _said(ended)["kind"] else "fails"


def _told(ended: _Ended) -> str:
    said = _said(ended)
    return f"{said['error']}: {' '.join(said['message'].split())[:160]}".replace("|", "/")


def main(library: str, only: str = "") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in cases_of(library):
        if only.lower() in f"{case.package} {case.name}".lower():
            for processes in case.processes:
                print(json.dumps(asdict(row(case, processes))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
