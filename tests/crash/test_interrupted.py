"""System calls that signals interrupt, and that transfer less than was asked: saves and loads go on as if nothing was."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint

import elastickpt as ek
from elastickpt.saving.async_save import close_all
from elastickpt.storage import kernel
from elastickpt.storage.kernel import direct_alignment
from elastickpt.storage.local import LocalStore

LIMIT_S = 120.0
LIBC = ctypes.CDLL(None, use_errno=True)
THREAD, PROCESS = ek.AsyncOptions(executor="thread"), ek.AsyncOptions()
State = dict[str, object]
Save = Callable[[State, Path], object]

SAVES: dict[str, Save] = {
    "save": ek.save,
    "async_save by a thread": lambda state, path: ek.async_save(state, path, options=THREAD).result(LIMIT_S),
    "async_save by a process": lambda state, path: ek.async_save(state, path, options=PROCESS).result(LIMIT_S),
}


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_all()


def job(seed: int) -> State:
    """A tensor that goes past the page cache, one with odd ends that does, small ones, and values."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(7, 5)
    return {"large": torch.randn(1 << 19), "odd": torch.randn(300_001), "model": model, "note": f"seed {seed}"}


def require_saved(path: Path) -> None:
    """It verifies, reads, and loads bit by bit, from the device where it can."""
    for file in (file for file in path.rglob("c*") if file.is_file()):
        drop_from_cache(file)
    assert ek.open(path).verify().problems == ()
    for file in (file for file in path.rglob("c*") if file.is_file()):
        drop_from_cache(file)
    into = job(2)
    ek.load(into, path)
    assert fingerprint(into) == fingerprint(job(1))


def drop_from_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


# -- signals -------------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted() -> Iterator[Callable[[], int]]:
    """Every thread of this process gets a signal over and over; yields how often the handler ran so far.

    The handler does nothing, and system calls are not restarted behind it. It runs in the main thread, whoever was interrupted.
    """
    ran, ended = [0], threading.Event()

    def handler(number: int, frame: object) -> None:
        ran[0] += 1

    def pester() -> None:
        own = threading.get_native_id()
        while not ended.wait(0.0003):
            for thread in map(int, os.listdir("/proc/self/task")):
                if thread != own:
                    LIBC.tgkill(os.getpid(), thread, signal.SIGUSR2)  # one that has ended is no error

    before = signal.signal(signal.SIGUSR2, handler)
    pestering = threading.Thread(target=pester)
    pestering.start()
    try:
        yield lambda: ran[0]
    finally:
        ended.set()
        pestering.join()
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # drops those that have not arrived yet
        signal.signal(signal.SIGUSR2, before)


def test_the_signals_interrupt_system_calls_in_every_thread() -> None:
    """One that nobody repeats ends with EINTR, long before its time."""
    found: list[tuple[int, int]] = []

    def wait() -> None:
        found.append((LIBC.poll(None, 0, 60_000), ctypes.get_errno()))

    with interrupted():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        wait()
    assert found == [(-1, errno.EINTR)] * 2


@pytest.mark.parametrize("name", SAVES)
def test_saves_and_loads_go_on_through_signals(tmp_path: Path, name: str) -> None:
    with interrupted() as ran:
        for number in range(2):
            while True:
                SAVES[name](job(1), tmp_path / str(number))
                require_saved(tmp_path / str(number))
                if ran() >= 50 * (number + 1):
                    break
                LocalStore(tmp_path).remove_tree(str(number))
    assert ek.open(tmp_path / "1").verify().sound


def test_a_run_goes_on_through_signals(tmp_path: Path) -> None:
    state = job(1)
    with interrupted() as ran, ek.Run(tmp_path / "run", state, keep=ek.Keep(last=2)) as run:
        run.restore()
        step = 0
        while step < 4 or ran() < 100:
            step += 1
            run.save(step).result(LIMIT_S)
    into = job(2)
    with interrupted(), ek.Run(tmp_path / "run", into) as run:
        assert run.restore().step == step
    assert fingerprint(into) == fingerprint(state)


class Interrupting:
    """libc, of which the first three calls are interrupted before they are done."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: object) -> int:
            self.calls += 1
            if self.calls <= 3:
                ctypes.set_errno(errno.EINTR)
                return -1
            done: int = getattr(LIBC, name)(*args)
            return done

        return call


def test_calls_that_python_does_not_repeat_are_repeated_or_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `kernel`, which go to libc directly. A sync is neither: it fails, and is not tried again. [SAVE-2]"""
    name, descriptor, libc = kernel.file_system(str(tmp_path)), os.open(tmp_path, os.O_RDONLY), Interrupting()
    monkeypatch.setattr(kernel, "_libc", lambda: libc)
    assert (kernel.file_system(str(tmp_path)), libc.calls) == (name, 4)
    libc.calls = 0
    assert kernel.direct_alignment(descriptor) == kernel.PAGE
    assert kernel.cached_pages(descriptor, 0, 1) is None
    assert not kernel.make_spread(str(tmp_path / "made"))
    assert os.listdir(tmp_path) == []
    libc.calls = 0
    with pytest.raises(InterruptedError):
        kernel.sync_file_system(descriptor)
    assert libc.calls == 1
    os.close(descriptor)


# -- short transfers -----------------------------------------------------------------------------------------------------


class Short:
    """`os.pwrite` and `os.preadv` of which every call on a file transfers at most so many bytes, direct ones whole blocks."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self.pwrites = self.preadvs = self.directs = 0
        self._pwrite, self._preadv = os.pwrite, os.preadv

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self.pwrites += 1
        return self._pwrite(descriptor, data[: self._limit(descriptor)], offset)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.preadvs += 1
        (buffer,) = buffers
        return self._preadv(descriptor, [buffer[: self._limit(descriptor)]], offset)

    def _limit(self, descriptor: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:"):
            return 1 << 62  # memory, not storage
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return self.at_most
        self.directs += 1
        alignment = direct_alignment(descriptor)
        return max(self.at_most // alignment, 1) * alignment


@pytest.mark.parametrize("name", ["save", "async_save by a thread"])
@pytest.mark.parametrize("at_most", [251, 4097, 65_537, 1_000_003])
def test_every_write_and_read_transfers_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_most: int) -> None:
    short = Short(at_most)
    monkeypatch.setattr(os, "pwrite", short.pwrite)
    monkeypatch.setattr(os, "preadv", short.preadv)
    SAVES[name](job(1), tmp_path / "c")
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert short.pwrites > written // max(at_most, 4096)
    require_saved(tmp_path / "c")
    assert short.preadvs > 2 * (written // max(at_most, 4096))
    if LocalStore(tmp_path).capabilities.past_cache and alignment_at(tmp_path):
        assert short.directs > 0


def alignment_at(folder: Path) -> int:
    with open(folder / "probe", "wb") as file:
        return direct_alignment(file.fileno())
