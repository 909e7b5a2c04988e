"""Power cuts: saves onto a real ext4 on a logged disk, then every state in which a power cut may leave that disk, loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from elastickpt.errors import CheckpointError
from tools.gloo_ranks import run_ranks

from .blockfile import logged_file
from .blocklog import CrashState, Request, crash_states, images, requests
from .entrants import Entrant
from .events import Event, Watcher
from .job import Saves, look, train_and_save
from .judge import Judgement, Promised, judge, promised
from .mounts import SCRATCH, CannotMount, make_file_system, mounted
from .records import Case

DISK_NBYTES = 32 << 20
JOB_LIMIT_S = 120.0
READER_LIMIT_S = 30.0
_TOP = "checkpoints"


@dataclass(frozen=True, slots=True)
class Recording:
    """What the disk was asked for while a job saved, and when rank 0 was told what."""

    log: bytes
    events: tuple[Event, ...]

    @property
    def start(self) -> int:
        """Where the log was when the first step was acknowledged: from there on an earlier checkpoint stands beside."""
        return min(event.position for event in self.events if event.kind == "acknowledged" and event.rank == 0)

    def promise(self, position: int, keeps: int) -> Promised:
        """What must hold if power fails when the log is that long."""
        until = [event for event in self.events if event.position <= position]
        begun = [event.step for event in until if event.kind == "begun"]
        return promised(begun, [event.step for event in until if event.kind == "acknowledged" and event.rank == 0], keeps)


def record(entrant: Entrant, *, ranks: int, saves: int, pause_s: float = 0.0) -> Recording:
    """Saves that many steps after a first one, on an ext4 of its own. Raises what a save raises, OSError without root."""
    with _scratch() as folder:
        disk, log, point, pipe = (folder / name for name in ("disk", "log", "mount", "pipe"))
        disk.touch()
        point.mkdir()
        watcher = Watcher(pipe)
        try:
            with logged_file(disk, log, DISK_NBYTES):
                make_file_system(disk)
                with mounted(disk, point):
                    (point / _TOP).mkdir()
                    steps = tuple(range(1, saves + 2))
                    plan = Saves(entrant.name, str(point / _TOP), steps, str(pipe), str(log), pause_s=pause_s)
                    failures = run_ranks(train_and_save, ranks, plan, timeout_s=JOB_LIMIT_S)
                    watcher.take()
        finally:
            watcher.close()
        if any(failures):
            raise RuntimeError(f"{entrant.name} cannot save here: {next(filter(None, failures))}")
        return Recording(log.read_bytes(), tuple(watcher.seen))


def replay(
    entrant: Entrant,
    recording: Recording,
    states: Sequence[CrashState],
    numbers: Sequence[int],
    advance: Callable[[int], None] = lambda number: None,
) -> list[Case]:
    """The states of these numbers: each one's disk mounted, and all checkpoints on it loaded by a fresh process.

    `states` are in order of position, as `drawn_states` gives them. Blocks: about 0.15 s a state.
    """
    log, wanted = requests(recording.log), set(numbers)
    found = []
    with _scratch() as folder:
        image, point = folder / "image", folder / "mount"
        point.mkdir()
        for number, (state, content) in enumerate(zip(states, images(log, states, DISK_NBYTES), strict=True)):
            if number not in wanted:
                continue
            advance(number)
            image.unlink(missing_ok=True)  # a loop device that lingers keeps the old one
            image.write_bytes(content)
            judgement = _judge(entrant, recording.promise(state.position, entrant.keeps), image, point)
            found.append(Case(number, state.loss, _how(log, state), judgement.outcome, judgement.detail))
    return found


def drawn_states(recording: Recording, count: int, seed: int) -> list[CrashState]:
    """The states that `replay` looks at, `count` of them."""
    return crash_states(requests(recording.log), recording.start, count, seed)


def keep(recording: Recording, folder: Path) -> None:
    """Leave the recording in a folder, for `kept`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blocks.log").write_bytes(recording.log)
    (folder / "events.json").write_text(json.dumps([asdict(event) for event in recording.events]))


def kept(folder: Path) -> Recording:
    """The recording that `keep` left. Raises OSError where there is none."""
    events = json.loads((folder / "events.json").read_text())
    return Recording((folder / "blocks.log").read_bytes(), tuple(Event(**event) for event in events))


def _judge(entrant: Entrant, promise: Promised, image: Path, point: Path) -> Judgement:
    try:
        with mounted(image, point):
            try:
                (seen,) = run_ranks(look, 1, entrant.name, str(point / _TOP), 1, timeout_s=READER_LIMIT_S)
            except CheckpointError as error:  # the reader hung, or died
                return Judgement("hang", error.message[-600:])
            return judge(seen, promise)
    except CannotMount as error:
        return Judgement("does not mount", str(error))


def _how(log: Sequence[Request], state: CrashState) -> str:
    unflushed = [request for request in log[state.durable :] if request.end <= state.position and request.kind == "write"]
    torn = sum(nbytes < len(log[number].data) for number, nbytes in state.kept)
    return f"cut at {state.position}: of {len(unflushed)} unflushed writes {len(state.kept)} are kept, {torn} of them torn"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory where the machine has such a place: nothing here needs to last."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix=SCRATCH) as folder:
        yield Path(folder)
