"""Carries out conversions: array by array, each read once; what is read is written while the next is read.

With several workers each decides the same conversion and does its share; worker 0 commits what all have written. What an
interrupted one has done is not done again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from numpy.typing import NDArray

from elastickpt.commit.draft import Draft
from elastickpt.convert.buffers import SPARE_NBYTES, Buffers
from elastickpt.convert.conversion import Conversion, require_unchanged
from elastickpt.convert.conversion_draft import ConversionDraft
from elastickpt.convert.described import description_of
from elastickpt.convert.files import FilesTarget
from elastickpt.convert.nodes import Node, leaves, nbytes_of, working_nbytes
from elastickpt.convert.sections import regions
from elastickpt.convert.universal import UniversalTarget
from elastickpt.convert.words import Words
from elastickpt.convert.workers import helpers, shares
from elastickpt.ranks.threads import Pool

THREADS = 3  # that write: one copies and hashes while others wait for the device
Progress = Callable[[int, int], None]
TellBytes = Callable[[int], None]
Notes = tuple[str, ...]
_K = TypeVar("_K")


class Target(Protocol):
    """What is written, as tasks: of each the node that is evaluated for it, the bytes that it writes, and those that it leaves
    to the journal."""

    nodes: tuple[Node, ...]
    nbytes: tuple[int, ...]
    left: tuple[int, ...]

    def prepare(self, out: ConversionDraft) -> None: ...

    def open(self, out: ConversionDraft, buffers: Buffers, *, worker: int) -> None: ...

    def close(self) -> None: ...

    def phase(self, task: int) -> int: ...

    def beside(self, task: int) -> int: ...

    def put(self, task: int, words: NDArray[Any]) -> bytes: ...

    def adopt(self, task: int, left: bytes) -> None: ...

    def written(self) -> Any: ...

    def commit(self, answers: Sequence[Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did. `notes`: what differed between ranks and was let pass. `resumed`: arrays that an interrupted one
    had done; `said`: what was found of one."""

    arrays: int
    nbytes: int
    notes: Notes
    resumed: int = 0
    said: Notes = ()


def carry_out(
    conversion: Conversion, *, progress: Progress = lambda done, total: None, say: Callable[[str], None] = lambda text: None
) -> Converted:
    """Reads, maps and writes; on return the output exists, whole and durable. Blocking. `say` is told at once what was found of
    an interrupted conversion.

    After an error nothing stands at OUT. After an interrupt, or the end of a worker, neither; the draft stays beside it, and
    the same conversion goes on from there.
    """
    target = target_of(conversion)
    try:
        with ConversionDraft(conversion.options.out, description_of(conversion, target.describe()), target.left) as out:
            target.prepare(out)
            for text in out.said:
                say(text)
            for task, left in out.done.items():
                target.adopt(task, left)
            tell = _Teller(progress, total=sum(n for task, n in enumerate(target.nbytes) if task not in out.done))
            with helpers(partial(_help, conversion, out.draft, out.done), conversion.options.workers - 1, tell) as others:

                def told(nbytes: int) -> None:
                    others.require()
                    tell(nbytes)

                written, notes = _work(conversion, target, out, 0, out.done, told)
                answers = others.answers()
            require_unchanged(conversion.source)
            target.commit([written, *(one for one, _ in answers)])
    finally:
        conversion.source.reading.close()
    every = (*notes, *(note for _, some in answers for note in some))
    return Converted(conversion.arrays, conversion.nbytes, every, len(out.done), tuple(out.said))


def target_of(conversion: Conversion) -> UniversalTarget | FilesTarget:
    """What a conversion writes, nothing of it begun."""
    return UniversalTarget(conversion.contents) if conversion.form is None else FilesTarget(conversion.form)


def _help(conversion: Conversion, draft: Draft, done: Collection[int], worker: int, tell: TellBytes) -> tuple[Any, Notes]:
    """What one helper does, in a process of its own."""
    target = target_of(conversion)
    return _work(conversion, target, ConversionDraft.joined(conversion.options.out, draft, target.left), worker, done, tell)


def _work(
    conversion: Conversion, target: Target, out: ConversionDraft, worker: int, done: Collection[int], tell: TellBytes
) -> tuple[Any, Notes]:
    """Does a worker's share of what is not done: what it has written, durable; and notes."""
    reading = conversion.source.reading
    buffers = reading.buffers
    tasks = [(task, node) for task, node in enumerate(target.nodes) if task not in done]
    buffers.limit_nbytes = 2 * max((nbytes_of(node) for node in target.nodes), default=0) + SPARE_NBYTES
    target.open(out, buffers, worker=worker)
    try:
        with _Behind(buffers.limit_nbytes) as behind:
            for unit in _share(units(tasks), conversion.options.workers, worker):
                reading.expect([node for _, node in unit])
                for task, node in unit:
                    behind.make_room(working_nbytes(node))
                    said = len(reading.notes)
                    words = reading.words(node, target.phase(task))
                    noted = out if len(reading.notes) == said else None  # what says something is done, and said, anew
                    finish = partial(_finish, target, noted, buffers, task, words, tell)
                    behind.give(nbytes_of(node) + target.beside(task), finish)
        return target.written(), tuple(reading.notes)
    finally:
        target.close()


def _finish(target: Target, noted: ConversionDraft | None, buffers: Buffers, task: int, words: Words, tell: TellBytes) -> None:
    """Writes what was read."""
    left = target.put(task, words)
    buffers.give_back(words)
    if noted is not None:
        noted.note(task, left)
    tell(target.nbytes[task])


class _Teller:
    """Tells how far the work is, of all workers together."""

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


class _Behind:
    """Work that threads do while the next arrays are read, as long as all together needs no more than so many bytes."""

    def __init__(self, limit_nbytes: int) -> None:
        self._pool = Pool("elastickpt-convert", THREADS)
        self._limit_nbytes = limit_nbytes
        self._under_way: dict[Future[None], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.make_room(self._limit_nbytes)
        finally:
            self._pool.abandon()

    def make_room(self, nbytes: int) -> None:
        """Waits until so many more bytes fit, or nothing is under way. Raises what the work raised."""
        while True:
            for one in [one for one in self._under_way if one.done()]:
                del self._under_way[one]
                one.result()
            if not self._under_way or sum(self._under_way.values()) + nbytes <= self._limit_nbytes:
                return
            wait(self._under_way, return_when=FIRST_COMPLETED)

    def give(self, nbytes: int, work: Callable[[], None]) -> None:
        """Begins work that needs so many bytes until it is done."""
        self._under_way[self._pool.begin(work)] = nbytes


def _share(units_: Sequence[list[tuple[_K, Node]]], workers: int, worker: int) -> list[list[tuple[_K, Node]]]:
    """The units of one worker."""
    sizes = [sum(nbytes_of(node) for _, node in unit) for unit in units_]
    return [units_[number] for number in shares(sizes, workers)[worker]]


def units(tasks: Sequence[tuple[_K, Node]]) -> list[list[tuple[_K, Node]]]:
    """The tasks in groups that share no array and no byte of the source, each group in the given order."""
    of_task = [[id(leaf) for leaf in leaves(node)] for _, node in tasks]
    every = tuple({id(leaf): leaf for _, node in tasks for leaf in leaves(node)}.values())
    head = {id(leaf): id(leaf) for leaf in every}

    def first(leaf: int) -> int:
        while head[leaf] != leaf:
            head[leaf] = head[head[leaf]]
            leaf = head[leaf]
        return leaf

    together = (*of_task, *([id(every[number]) for number in region.leaves] for region in regions(every)))
    for some in together:
        for leaf in some[1:]:
            head[first(leaf)] = first(some[0])
    groups: dict[int, list[tuple[_K, Node]]] = {}
    for number, (task, some) in enumerate(zip(tasks, of_task, strict=True)):
        groups.setdefault(first(some[0]) if some else -number - 1, []).append(task)
    return list(groups.values())
