"""What the ranks of each kind of job do, in which order. Every function here runs on all ranks in lock step.

Within a repeat the contestants take turns (round robin), each with a fresh path, and the disk comes to rest between
them. Trees of earlier repeats are emptied, and go at the end of the run (`session.discard`).
The first round is a warm-up for everyone: untimed, and its loads are checked element by element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist

from . import caches
from .beside import BesideTraining, make_beside
from .family import Peak, family_nbytes
from .plan import Job, Kind
from .records import FLOORS, PAST_CACHE, Cache, Case, Finish, Memory, Setting
from .session import Progress, Sample, Session, trim_memory
from .state import clear, fill, local_nbytes, wrong_pieces
from .training import Training

SAVES_OF_MEMORY = 3

_SAVE_LOAD: Mapping[Kind, tuple[Case, Case]] = MappingProxyType(
    {"same": ("save", "load"), "small": ("small save", "small load")}
)


def run(session: Session) -> None:
    """Carry out the session's job."""
    _KINDS[session.job.kind](session)


def _save_and_load(session: Session) -> None:
    """Save, cold load, warm load of one layout by everyone, then the copy in memory."""
    job = session.job
    save_case, load_case = _SAVE_LOAD[job.kind]
    session.enter_libraries()
    session.enter_floors()
    for repeat in _rounds(session):
        for name in session.order(repeat):
            path = session.folder / name.replace(" ", "-")
            contestant = session.contestants[name]
            session.make_room(path)
            saved = session.timed(
                _setting(session, save_case, "none"),
                name,
                lambda c=contestant, p=path: c.save(session.state, p),  # type: ignore[misc]
            )
            if saved and job.loads:
                _load(session, load_case, name, path)
            session.remove(path)
        if job.kind == "small":
            continue
        copy = _setting(session, "copy", "none")
        session.timed(copy, "memcpy", lambda: session.memory_copy.save(session.state, session.folder))


def _async(session: Session) -> None:
    """Beside training, each in a save of its own: how long the call takes, how long until it is saved, and how far steps are
    slowed down until then. One after the other."""
    stall, whole = _setting(session, "stall", "none"), _setting(session, "async save", "none")
    names_of = dict.fromkeys("tc" if name == "tc+fsync" else name for name in session.job.contestants)
    beside = {each.name: each for name in names_of for each in make_beside(name)}
    session.enter_floors()
    floors = dict(session.contestants)
    path, training = session.folder / "beside", Training()
    for repeat in _rounds(session):
        names = list(beside)
        for name in names[repeat % max(len(names), 1) :] + names[: repeat % max(len(names), 1)]:
            finish: list[Finish] = []

            def begin(name: str = name, finish: list[Finish] = finish) -> None:
                finish.append(beside[name].begin(session.state, path))

            session.make_room(path)
            done = session.timed(stall, name, begin)
            if done:
                done = session.timed(None, name, finish.pop())
            session.make_room(path)
            done = done and _slow_down(session, name, beside[name], path, training)
            session.make_room(path)
            if not (done and session.timed(whole, name, lambda begin=begin, finish=finish: (begin(), finish.pop()())[1])):  # type: ignore[misc]
                beside.pop(name)
        for name, floor in floors.items():
            session.make_room(path)
            session.timed(whole, name, lambda floor=floor: floor.save(session.state, path))  # type: ignore[misc]
        session.timed(stall, "memcpy", lambda: session.memory_copy.save(session.state, path))
    session.remove(path)
    for each in beside.values():
        each.close()


def _slow_down(session: Session, name: str, beside: BesideTraining, path: Path, training: Training) -> bool:
    """What a save takes from training in all, the call included; False if it failed on any rank."""
    session.make_room(path)
    lost_s: list[float] = []

    def train() -> None:
        usual_s = training.usual_s()
        begun = time.perf_counter()
        finish = beside.begin(session.state, path)
        lost_s.append(training.slowed_s(finish, begun=begun, usual_s=usual_s))

    done = session.timed(None, name, train)
    if done and not session.silent:
        session.send(Sample(_setting(session, "slow-down", "none"), name, lost_s[0], 0, 0, None))
    return done


def _prepare(session: Session) -> None:
    """Save once by every library, for ranks at another layout to load."""
    session.enter_libraries()
    for name in session.order(0):
        path = session.folder / name
        session.make_room(path)
        session.silent = True
        setting = _setting(session, "save", "none")
        session.timed(setting, name, lambda c=session.contestants[name], p=path: c.save(session.state, p))  # type: ignore[misc]


def _reshard(session: Session) -> None:
    """Load what other ranks saved. The floor reads, at this layout, files that it wrote at this layout."""
    session.enter_libraries()
    libraries = set(session.contestants)
    session.enter_floors()
    for name in session.order(0):
        if name not in libraries:
            path = session.folder / name.replace(" ", "-")
            session.make_room(path)
            session.contestants[name].save(session.state, path)
    for repeat in _rounds(session):
        for name in session.order(repeat):
            _load(session, "reshard", name, session.folder / name.replace(" ", "-"))


def _memory(session: Session) -> None:
    """Growth of this process over its state in a first and in a later save, with nobody else in the process."""
    job = session.job
    session.enter_libraries()
    (name,) = job.contestants
    path = session.folder / name
    trim_memory()
    baseline = caches.resident_nbytes()
    growth: list[int] = []
    measurable = session.any_rank(int(not caches.reset_peak_memory())) == 0
    for turn in range(SAVES_OF_MEMORY):
        session.make_room(path)
        trim_memory()
        caches.reset_peak_memory()
        session.silent = True
        if not session.timed(
            _setting(session, "save", "none"), name, lambda: session.contestants[name].save(session.state, path)
        ):
            break
        growth.append(session.any_rank(max(0, caches.peak_resident_nbytes() - baseline)))
        session.send(Progress(turn + 1, SAVES_OF_MEMORY))
    trim_memory()
    kept = session.any_rank(max(0, caches.resident_nbytes() - baseline))
    session.remove(path)
    own = session.any_rank(local_nbytes(session.state))
    if growth and measurable:
        session.send(Memory(name, job.place.name, job.ranks, own, growth[0], max(growth[1:], default=growth[0]), kept))
    for beside in make_beside(name):
        _memory_beside(session, beside, own)


def _memory_beside(session: Session, beside: BesideTraining, own: int) -> None:
    """The same of saves beside training, with the processes that write them; each ends before the next begins."""
    job, path = session.job, session.folder / "beside"
    trim_memory()
    baseline = family_nbytes()
    growth: list[int] = []
    for _ in range(SAVES_OF_MEMORY):
        session.make_room(path)

        def save(peak: Peak) -> None:
            with peak:
                beside.begin(session.state, path)()

        peak = Peak()
        if not session.timed(None, beside.name, lambda save=save, peak=peak: save(peak)):  # type: ignore[misc]
            break
        growth.append(session.any_rank(max(0, peak.nbytes - baseline)))
    trim_memory()
    kept = session.any_rank(max(0, family_nbytes() - baseline))
    session.remove(path)
    beside.close()
    if growth:
        name = f"{beside.name}, beside"
        session.send(Memory(name, job.place.name, job.ranks, own, growth[0], max(growth[1:], default=growth[0]), kept))


def _load(session: Session, case: Case, name: str, path: Path) -> None:
    """Load cold where there is a device, then warm. O_DIRECT reads bypass the cache, so they are no warm floor."""
    contestant = session.contestants[name]
    states: list[Cache] = ["cold"] if session.job.place.has_device and case != "small load" else []
    if name not in PAST_CACHE:
        states.append("warm")
    for cache in states:
        session.on_first_rank(lambda cache=cache: caches.evict(path) if cache == "cold" else caches.warm(path))  # type: ignore[misc]
        checked = session.silent and name not in FLOORS and cache == states[0]
        if checked:
            clear(session.state)
        setting = _setting(session, case, cache)
        done = session.timed(setting, name, lambda: contestant.load(session.state, path))
        wrong = session.any_rank(wrong_pieces(session.state)) if checked else 0
        if wrong:
            fill(session.state)
            if done:
                session.withdraw(setting, name, f"{wrong} tensors of a rank differ from what was saved")
        if wrong or not done:
            return


def _rounds(session: Session) -> list[int] | _Rounds:
    return _Rounds(session)


class _Rounds:
    """0 (the silent warm-up), 1, ..., repeats; reports progress after each."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __iter__(self) -> _Rounds:
        self._next = 0
        return self

    def __next__(self) -> int:
        session, repeat = self._session, self._next
        if repeat:
            session.send(Progress(repeat, session.job.repeats + 1))
        if repeat > session.job.repeats:
            raise StopIteration
        session.silent = repeat == 0
        self._next += 1
        dist.barrier()
        return repeat


def _setting(session: Session, case: Case, cache: Cache) -> Setting:
    job: Job = session.job
    return Setting(case, cache, job.place.name, job.ranks, job.from_ranks, session.nbytes, session.tensors)


_KINDS: Mapping[Kind, Callable[[Session], None]] = MappingProxyType(
    {
        "same": _save_and_load,
        "small": _save_and_load,
        "async": _async,
        "prepare": _prepare,
        "reshard": _reshard,
        "memory": _memory,
    }
)
