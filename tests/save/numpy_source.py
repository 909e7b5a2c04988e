"""Saves arrays of numpy: a third form of a save, made of the steps from `open` on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickpt.commit.attempt import PathDestination
from elastickpt.commit.attest import DraftContents, Outline
from elastickpt.commit.outcome import commit
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.keys import array_keys
from elastickpt.format.records import ArrayRecord, Item, ManifestFrame
from elastickpt.format.typed_values import typed_values
from elastickpt.layout.grid import chunk_shape
from elastickpt.writer.arena_plan import WriterStructure, prepare
from elastickpt.writer.plans import PlannedDocument, Slice, WritePlan, documents_of, files_of
from elastickpt.writer.share import Share, write_whole_share
from elastickpt.writer.write_files import Source


class Arrays(Source):
    """The parts that one writer holds."""

    def __init__(self, plan: WritePlan, parts: list[NDArray[Any]]) -> None:
        self._plan, self._parts = plan, parts

    def take(self, at: Slice, start: int, stop: int) -> NDArray[np.uint8]:
        piece = self._plan.files[at.file].pieces[at.piece]
        part = self._parts[piece.array][tuple(map(slice, piece.local.start, piece.local.stop))]
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8)[start:stop]


def save(
    arrays: Mapping[str, NDArray[Any]], path: str, *, step: int, writers: int, values: Mapping[str, Any], layout_text: str
) -> None:
    """Each writer holds as many rows of each array as the others; all of them are this process."""
    ids = {name: ArrayId("extra", "arrays", name, "") for name in arrays}
    keys = array_keys(ids.values())
    records = []
    for name, array in arrays.items():
        spec = ArraySpec(ids[name], array.shape, str(array.dtype))
        grid = chunk_shape(spec.shape, itemsize=spec.type.itemsize)
        records.append(ArrayRecord(spec, keys[ids[name]], grid, None, (), ()))

    located = PathDestination.of(path, step).locate()
    located.require_free()
    attempt, _ = located.open({"extra"}, "power")
    attested = [
        write_whole_share(located.store, *_share(attempt, writer, writers, records, list(arrays.values())))
        for writer in range(writers)
    ]
    frame = ManifestFrame(
        world_size=writers,
        placement="plain",
        versions=(("python", platform.python_version()),),
        items=(Item("arrays", "values", "dict"), Item("note", "values", "str")),
        meshes=(),
        layouts=(),
        layout_text=layout_text,
    )
    outline = Outline(frame, tuple(sorted(records, key=lambda record: record.key)))
    commit(located.store, attempt, DraftContents(outline, typed_values(values)), attested)


def _share(
    attempt: Any, writer: int, writers: int, records: list[ArrayRecord], arrays: list[NDArray[Any]]
) -> tuple[Share, Arrays]:
    files, parts = [], []
    for number, (record, array) in enumerate(zip(records, arrays, strict=True)):
        rows = record.spec.shape[0]
        low, high = writer * rows // writers, (writer + 1) * rows // writers
        box = Box((low, *[0] * (array.ndim - 1)), (high, *array.shape[1:]))
        parts.append(array[low:high])
        files += files_of(number, record.spec, record.key, record.chunk_shape, [box], held=box)
    documents = tuple(PlannedDocument(number, heads_group=False) for number in range(len(records)) if writer == 0)
    plan = WritePlan(tuple(record.key for record in records), tuple(files), documents)
    return Share(attempt, writer, WriterStructure(prepare(plan, documents_of(plan, records)))), Arrays(plan, parts)
