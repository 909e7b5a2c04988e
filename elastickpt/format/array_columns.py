"""What an index says of arrays, in columns: an object of its own only for an array that somebody asks for. [UCF-64]

A load of 10,000 small tensors asks for none of them: names, shapes and element types are compared in columns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np

from elastickpt.format.arrays import ArrayId, ArraySpec, Section, dtype_named
from elastickpt.format.piece_columns import starts
from elastickpt.format.records import ArrayRecord
from elastickpt.format.strict_reading import IntColumn
from elastickpt.format.values import Value


class ArrayTemplate(NamedTuple):
    """What many arrays share: `itemsize` in bytes; a layout by its number in the manifest, None for a plain tensor."""

    dtype: str
    itemsize: int
    chunk_shape: tuple[int, ...]
    layout: int | None
    attributes: tuple[tuple[str, Value], ...]


class ArrayNames(NamedTuple):
    """What `ArrayId`s say, one entry an array."""

    section: Sequence[Section]
    item: Sequence[str]
    name: Sequence[str]
    state: Sequence[str]


class ArrayColumns(Sequence[ArrayRecord]):
    """Arrays in the order of their keys, one entry an array in every column. As a sequence it is their records.

    `template` and `writers` are numbers among `templates` and `writer_sets`. `shape` is flat: the axes of array a are
    `shape[axis_start[a]:axis_start[a + 1]]`.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        names: ArrayNames,
        templates: Sequence[ArrayTemplate],
        template: IntColumn,
        shape: IntColumn,
        writer_sets: Sequence[tuple[int, ...]],
        writers: IntColumn,
    ) -> None:
        self.keys, self.names = keys, names
        self.templates, self.template = templates, template
        self.writer_sets, self.writers = writer_sets, writers
        self.shape = shape
        self.ndims = _column(len(one.chunk_shape) for one in templates)[template]
        self.axis_start = starts(self.ndims)

    @classmethod
    def of(cls, records: Sequence[ArrayRecord]) -> ArrayColumns:
        """The columns of records, which stand in the order of their keys."""
        if isinstance(records, ArrayColumns):
            return records
        known: dict[tuple[object, ...], int] = {}
        templates: list[ArrayTemplate] = []
        template = []
        for record in records:
            spec = record.spec
            like = (spec.dtype, record.chunk_shape, record.layout, id(record.attributes))
            if (number := known.setdefault(like, len(templates))) == len(templates):
                size = dtype_named(spec.dtype).itemsize
                templates.append(ArrayTemplate(spec.dtype, size, record.chunk_shape, record.layout, record.attributes))
            template.append(number)
        ids = [record.spec.id for record in records]
        sets = list(dict.fromkeys(record.writers for record in records))
        place = {writers: k for k, writers in enumerate(sets)}
        made = cls(
            tuple(record.key for record in records),
            ArrayNames([i.section for i in ids], [i.item for i in ids], [i.name for i in ids], [i.state for i in ids]),
            templates,
            _column(template),
            _column(extent for record in records for extent in record.spec.shape),
            sets,
            _column(place[record.writers] for record in records),
        )
        made.records = tuple(records)
        return made

    @classmethod
    def together(cls, parts: Sequence[ArrayColumns]) -> ArrayColumns:
        """The arrays of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls.of(tuple(record for part in parts for record in part))

    # -- records -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[ArrayRecord]:
        return iter(self.records)

    @overload
    def __getitem__(self, place: int) -> ArrayRecord: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ArrayRecord]: ...

    def __getitem__(self, place: int | slice) -> ArrayRecord | Sequence[ArrayRecord]:
        return self.records[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.records == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def records(self) -> tuple[ArrayRecord, ...]:
        """All of them as objects."""
        return tuple(map(self.record, range(len(self.keys))))

    def record(self, place: int) -> ArrayRecord:
        """One of them; the others are not made."""
        like = self.templates[self.template[place]]
        spec = ArraySpec(self.id(place), self.shapes[place], like.dtype)
        writers = self.writer_sets[self.writers[place]]
        return ArrayRecord(spec, self.keys[place], like.chunk_shape, like.layout, writers, like.attributes)

    # -- questions -----------------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """The shape of each array."""
        flat = self.shape.tolist()
        return [tuple(flat[first:stop]) for first, stop in pairwise(self.axis_start.tolist())]

    @cached_property
    def by_id(self) -> Mapping[tuple[str, str, str, str], int]:
        """The place of each array by what its id says; the last one of those that have one id."""
        return dict(zip(zip(*self.names, strict=True), range(len(self.keys)), strict=True))

    @property
    def are_distinct(self) -> bool:
        """Whether no two of them have one id; distinct keys do not say so."""
        return len(self.by_id) == len(self.keys)

    def id(self, place: int) -> ArrayId:
        """The id of one of them."""
        section, item, name, state = self.names
        return ArrayId(section[place], item[place], name[place], state[place])

    @cached_property
    def bare_dtypes(self) -> Sequence[str | None]:
        """The element type of each array of which nothing is said but that and a shape; None for another one."""
        types = [None if one.attributes else one.dtype for one in self.templates]
        return list(map(types.__getitem__, self.template.tolist()))

    @cached_property
    def itemsize(self) -> IntColumn:
        """Bytes of an element of each array."""
        return _column(one.itemsize for one in self.templates)[self.template]

    @cached_property
    def plain(self) -> Mapping[str, Mapping[str, int]]:
        """Of section `extra` what nothing but a shape and an element type is said of: item -> name -> place."""
        section, item, name, _ = self.names
        if len(set(item)) == 1 and set(section) == {"extra"} and not any(one.attributes for one in self.templates):
            return {item[0]: dict(zip(name, range(len(name)), strict=True))}
        bare = np.array([not one.attributes for one in self.templates], dtype=np.bool_)[self.template]
        found: dict[str, dict[str, int]] = {}
        for place in np.flatnonzero(bare).tolist():
            if section[place] == "extra":
                found.setdefault(item[place], {})[name[place]] = place
        return found

    def alike(
        self, item: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str | None]
    ) -> list[int] | None:
        """The places of those of `plain` that have these names, where all are there and of these shapes and element types."""
        known = self.plain.get(item, {})
        places = [known.get(name, -1) for name in names]
        if -1 in places or shapes != [self.shapes[place] for place in places]:
            return None
        types = [one.dtype for one in self.templates]
        return places if dtypes == [types[number] for number in self.template[places].tolist()] else None

    def places_of(self, keys: Sequence[str]) -> IntColumn:
        """The place of each key, -1 for one that no array has."""
        if tuple(keys) == self.keys:
            return np.arange(len(self.keys))
        known = self._places
        return _column(known.get(key, -1) for key in keys)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {key: place for place, key in enumerate(self.keys)}

    def lists(self, writer: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Of each array whether this writer holds pieces of it."""
        among = [(at := bisect_left(one, writer)) < len(one) and one[at] == writer for one in self.writer_sets]
        return np.array(among, dtype=np.bool_)[self.writers]

    def nbytes(self, places: IntColumn) -> IntColumn:
        """Bytes of some arrays; their shapes are those of memory, so that no product overflows."""
        found = self.itemsize[places]
        ndims = self.ndims[places]
        for ndim in set(ndims.tolist()):
            mine = ndims == ndim
            found[mine] *= self.shape[self.axis_start[places[mine]][:, None] + np.arange(ndim)].prod(axis=1)
        return found

    def flat_axes(self, places: IntColumn) -> IntColumn:
        """Where in `shape` the axes of some arrays stand, one array after the other."""
        ndims = self.ndims[places]
        first = np.repeat(self.axis_start[places] - starts(ndims)[:-1], ndims)
        return first + np.arange(len(first))

    def axes(self, places: IntColumn, ndim: int) -> tuple[IntColumn, IntColumn]:
        """Shape and chunk shape of some arrays of so many axes, a row each."""
        chunks = [one.chunk_shape if len(one.chunk_shape) == ndim else (1,) * ndim for one in self.templates]
        own = np.array(chunks, dtype=np.int64).reshape(len(chunks), ndim)[self.template[places]]
        return self.shape[self.axis_start[places][:, None] + np.arange(ndim)], own


def _column(values: Iterable[int]) -> IntColumn:
    return np.fromiter(values, dtype=np.int64)
