"""Carries out conversions: array by array, each read once, at most one with its parts in memory. [CONV-40]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from elastickpt.convert.files import Delivery, FilesTarget, words_of
from elastickpt.convert.job import Job
from elastickpt.convert.nodes import Node, leaves, nbytes_of
from elastickpt.convert.saved_forms import Form
from elastickpt.convert.universal import UniversalTarget

Progress = Callable[[int, int], None]
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
    reading = job.source.reading
    try:
        return _files(job, job.form, progress) if job.form is not None else _universal(job, progress)
    finally:
        reading.close()


def _universal(job: Job, progress: Progress) -> Done:
    arrays = job.contents.arrays
    total, done = job.nbytes, 0
    reading = job.source.reading
    with UniversalTarget(job.options.out, job.contents) as target:
        for unit in units([(identity, array.node) for identity, array in arrays.items()]):
            reading.expect([node for _, node in unit])
            for identity, node in unit:
                target.put(identity, reading.words(node))
                done += nbytes_of(node)
                progress(done, total)
        target.commit()
    return Done(len(arrays), total, tuple(reading.notes))


def _files(job: Job, form: Form, progress: Progress) -> Done:
    reading = job.source.reading
    total, done = job.nbytes, 0
    nodes: dict[int, list[Delivery]] = {}
    for delivery in form.deliveries:
        nodes.setdefault(id(delivery.node), []).append(delivery)
    with FilesTarget(job.options.out, form.plans, single=form.single) as target:
        for unit in units([(some, some[0].node) for some in nodes.values()]):
            reading.expect([node for _, node in unit])
            for deliveries, node in unit:
                words = reading.words(node)
                for delivery in deliveries:
                    target.put(delivery.key, words_of(delivery, words))
                    done += delivery.nbytes
                progress(done, total)
        target.commit()
    return Done(len(form.deliveries), total, tuple(reading.notes))


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
        for _, node in groups[first]:
            for leaf in leaves(node):
                owner[id(leaf)] = first
    return [groups[key] for key in sorted(groups)]
