"""Carries out conversions: array by array, each read once, at most one with its parts in memory.

With several workers each decides the same conversion and does its share; worker 0 commits what all have written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from numpy.typing import NDArray

from elastickpt.commit.draft import Draft
from elastickpt.convert.files import Delivery, FilesTarget, words_of
from elastickpt.convert.job import Job, open_source, prepare, require_unchanged
from elastickpt.convert.nodes import Node, leaves, nbytes_of
from elastickpt.convert.options import Options
from elastickpt.convert.saved_forms import Form
from elastickpt.convert.universal import UniversalTarget
from elastickpt.convert.workers import helpers, shares
from elastickpt.format.records import FileDigest

Progress = Callable[[int, int], None]
Tell = Callable[[int], None]
Written = tuple[FileDigest | None, dict[str, int], tuple[str, ...]]  # attestation, checksums of slots, notes
_K = TypeVar("_K")


@dataclass(frozen=True, slots=True)
class Done:
    """What a conversion did. `notes`: what differed between ranks and was let pass."""

    arrays: int
    nbytes: int
    notes: tuple[str, ...]


def carry_out(job: Job, *, progress: Progress = lambda done, total: None) -> Done:
    """Reads, maps and writes; on return the output exists, whole and durable. Blocking.

    After an error nothing stands at OUT.
    """
    total, done = job.nbytes, [0]

    def tell(nbytes: int) -> None:
        done[0] += nbytes
        progress(done[0], total)

    try:
        return _universal(job, tell) if job.form is None else _files(job, job.form, tell)
    finally:
        job.source.reading.close()


def _universal(job: Job, tell: Tell) -> Done:
    with UniversalTarget(job.options.out, job.contents) as target:
        arguments = [(job.options, worker, target.draft) for worker in range(1, job.options.workers)]
        with helpers(_help, arguments, tell) as others:
            own, notes = _arrays(job, target, 0, tell)
            answers: list[Written] = others.answers()
        require_unchanged(job.source)
        target.commit([own, *(attested for attested, _, _ in answers if attested is not None)])
    return Done(len(job.contents.arrays), job.nbytes, (*notes, *(note for _, _, some in answers for note in some)))


def _arrays(job: Job, target: UniversalTarget, worker: int, tell: Tell) -> tuple[FileDigest, tuple[str, ...]]:
    reading = job.source.reading
    tasks = units([(identity, array.node) for identity, array in job.contents.arrays.items()])
    with _Behind(1) as behind:
        for unit in _share(tasks, job, worker):
            reading.expect([node for _, node in unit])
            for identity, node in unit:
                behind.give(partial(target.put, identity, reading.words(node)))
                tell(nbytes_of(node))
    return target.attest(), tuple(reading.notes)


def _files(job: Job, form: Form, tell: Tell) -> Done:
    with FilesTarget(job.options.out, form.plans, single=form.single) as target:
        arguments = [(job.options, worker, target.draft) for worker in range(1, job.options.workers)]
        with helpers(_help, arguments, tell) as others:
            notes = _slots(job, form, target, 0, tell)
            answers: list[Written] = others.answers()
        require_unchanged(job.source)
        target.commit([checksums for _, checksums, _ in answers])
    return Done(len(form.deliveries), job.nbytes, (*notes, *(note for _, _, some in answers for note in some)))


def _slots(job: Job, form: Form, target: FilesTarget, worker: int, tell: Tell) -> tuple[str, ...]:
    reading = job.source.reading
    nodes: dict[int, list[Delivery]] = {}
    for delivery in form.deliveries:
        nodes.setdefault(id(delivery.node), []).append(delivery)
    with _Behind(1 if target.shares_files else 0) as behind:
        for unit in _share(units([(some, some[0].node) for some in nodes.values()]), job, worker):
            reading.expect([node for _, node in unit])
            for deliveries, node in unit:
                behind.give(partial(_deliver, target, deliveries, reading.words(node)))
                tell(sum(delivery.nbytes for delivery in deliveries))
    return tuple(reading.notes)


def _deliver(target: FilesTarget, deliveries: Sequence[Delivery], words: NDArray[Any]) -> None:
    for delivery in deliveries:
        target.put(delivery.key, words_of(delivery, words))


class _Behind:
    """Work that a thread does while the next array is read: one piece at a time, in order; with no threads, at once."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="elastickpt-convert") if threads else None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True)

    def give(self, work: Callable[[], None]) -> None:
        """Begins the work once all before it is done. Raises what that raised."""
        if self._pool is None:
            work()
            return
        self._settle()
        self._last = self._pool.submit(work)

    def _settle(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _help(options: Options, worker: int, draft: Draft, tell: Tell) -> Written:
    """What one helper does, in a process of its own."""
    source = open_source(options)
    job = prepare(options, source)
    try:
        if job.form is None:
            target = UniversalTarget.joined(options.out, job.contents, draft, worker)
            attested, notes = _arrays(job, target, worker, tell)
            return attested, {}, notes
        files = FilesTarget.joined(options.out, job.form.plans, draft)
        notes = _slots(job, job.form, files, worker, tell)
        return None, files.checksums(), notes
    finally:
        source.reading.close()


def _share(tasks: Sequence[list[tuple[_K, Node]]], job: Job, worker: int) -> list[list[tuple[_K, Node]]]:
    """The units of one worker."""
    sizes = [sum(nbytes_of(node) for _, node in unit) for unit in tasks]
    return [tasks[number] for number in shares(sizes, job.options.workers)[worker]]


def units(tasks: Sequence[tuple[_K, Node]]) -> list[list[tuple[_K, Node]]]:
    """The tasks in groups that share no array of the source, each group in the given order."""
    owner: dict[int, int] = {}
    groups: dict[int, list[tuple[_K, Node]]] = {}
    for number, task in enumerate(tasks):
        found = {owner[id(leaf)] for leaf in leaves(task[1]) if id(leaf) in owner}
        first = min(found, default=number)
        groups.setdefault(first, [])
        for other in sorted(found - {first}):
            groups[first].extend(groups.pop(other))
        groups[first].append(task)
        for _, node in groups[first] if len(found) > 1 else (task,):
            for leaf in leaves(node):
                owner[id(leaf)] = first
    return [groups[key] for key in sorted(groups)]
