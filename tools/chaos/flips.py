"""One bit of one file of a small checkpoint is flipped, a fresh process loads the checkpoint, and the bit is put back.

A flip is drawn from (seed, number): every fourth one picks a file first, so that small files get their share, the others a byte
of all. The same number draws the same flip of files of the same names and lengths.
"""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from elastickpt.errors import DeadlineExceeded, RankLost
from tools.gloo_ranks import run_ranks

from .entrants import Entrant
from .events import Watcher
from .job import Saves, look, train_and_save
from .judge import Judgement, Seen, judge_flipped
from .processes import stack_of
from .records import Case

STEP = 1
FILE_FIRST = 4  # of so many flips one
JOB_LIMIT_S = 120.0
READER_LIMIT_S = 30.0
READER_NBYTES = 4 << 30  # what a reader may map beside what it has: a flipped length must not take the machine's memory

Aim = Literal["a byte of all", "a byte of a file drawn first"]


@dataclass(frozen=True, slots=True)
class FlipSetting:
    """`folder`: where is saved to. `scale`: of the state."""

    folder: Path
    ranks: int
    seed: int
    scale: int = 1

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.ranks} ranks, {self.scale * 1.1:.1f} MB, loaded by one process"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint. `path`: below the folder that is saved to."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of one file."""

    number: int
    aim: Aim
    path: str
    offset: int
    bit: int

    def __str__(self) -> str:
        return f"bit {self.bit} of byte {self.offset} of {self.path}"


def draw(files: Sequence[StoredFile], seed: int, number: int) -> Flip:
    """The flip of that number. `files` are in order, and not all empty."""
    chance = random.Random(f"{seed}/{number}")
    filled = [file for file in files if file.nbytes]
    if number % FILE_FIRST == 0:
        aim: Aim = "a byte of a file drawn first"
        file = chance.choice(filled)
    else:
        aim = "a byte of all"
        (file,) = chance.choices(filled, weights=[file.nbytes for file in filled])
    return Flip(number, aim, file.path, chance.randrange(file.nbytes), chance.randrange(8))


def stored_files(folder: Path) -> tuple[StoredFile, ...]:
    """All files below `folder`, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return tuple(StoredFile(str(path.relative_to(folder)), path.stat().st_size) for path in paths)


@contextmanager
def flipped(path: Path, offset: int, bit: int) -> Iterator[None]:
    """Inside of it that bit of the file is the other one."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
        try:
            yield
        finally:
            file.seek(offset)
            file.write(bytes([byte]))


def flip_each(
    entrant: Entrant, setting: FlipSetting, numbers: Sequence[int], advance: Callable[[int], None] = lambda number: None
) -> tuple[list[Case], tuple[StoredFile, ...]]:
    """The flips of these numbers, one after the other, each in the same checkpoint; and its files. Blocks: 0.2 s a flip.

    Raises RuntimeError where the contestant cannot save, or what it saved does not load with nothing flipped, before or behind.
    """
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="flips-") as top:
        folder = Path(top, "checkpoints")
        folder.mkdir()
        _save(entrant, setting, folder, Path(top, "pipe"))
        files = stored_files(folder)
        _require_whole(entrant, setting, folder)
        cases = []
        for done, number in enumerate(numbers):
            advance(done)
            flip = draw(files, setting.seed, number)
            with flipped(folder / flip.path, flip.offset, flip.bit):
                judgement = _looked(entrant, setting, folder)
            cases.append(Case(number, flip.aim, str(flip), judgement.outcome, judgement.detail))
        _require_whole(entrant, setting, folder)
    return cases, files


def look_within_limits(rank: int, world_size: int, contestant_name: str, folder: str, scale: int) -> tuple[Seen, ...]:
    """`look`, by a process whose memory is bounded."""
    mapped: int = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + READER_NBYTES, mapped + READER_NBYTES))
    return look(rank, world_size, contestant_name, folder, scale)


def _save(entrant: Entrant, setting: FlipSetting, folder: Path, pipe: Path) -> None:
    watcher = Watcher(pipe)
    try:
        plan = Saves(entrant.name, str(folder), (STEP,), str(pipe), scale=setting.scale)
        failures = run_ranks(train_and_save, setting.ranks, plan, timeout_s=JOB_LIMIT_S)
    finally:
        watcher.close()
    if any(failures):
        raise RuntimeError(f"{entrant.name} cannot save here: {next(filter(None, failures))}")


def _looked(entrant: Entrant, setting: FlipSetting, folder: Path) -> Judgement:
    arguments = (entrant.name, str(folder), setting.scale)
    try:
        (seen,) = run_ranks(look_within_limits, 1, *arguments, timeout_s=READER_LIMIT_S)
    except DeadlineExceeded as error:
        return Judgement("hang", f"the reader stood at {stack_of(error.message, 'look')}")
    except RankLost as error:
        return Judgement("crash", f"the reader died at {stack_of(error.message, 'look')}")
    return judge_flipped(seen, STEP)


def _require_whole(entrant: Entrant, setting: FlipSetting, folder: Path) -> None:
    found = _looked(entrant, setting, folder)
    if found.outcome != "harmless":
        raise RuntimeError(f"{entrant.name}, nothing flipped: {found.outcome}: {found.detail}")
