"""A committed checkpoint's records, opened and checked: manifest, index, fragment maps. [UCF-1, UCF-4, UCF-5, RUN-55, RUN-63]

Whether the folder of a run's attempt is a checkpoint its register says, and no file in it. Needs no torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from elastickpt.commit.draft import is_draft
from elastickpt.errors import (
    CheckpointError,
    ChecksumMismatch,
    Malformed,
    MissingFile,
    NotACheckpoint,
    Uncommitted,
    Unsafe,
    WrongLength,
)
from elastickpt.format.agreement import check_index, fragment_problems
from elastickpt.format.array_columns import ArrayColumns
from elastickpt.format.arrays import ArrayId
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.format.encode_manifest import decode_manifest
from elastickpt.format.keys import DRAFT_TOKEN, MANIFEST
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, FileDigest, IndexPart, Manifest, OptimizerTable, StoredFile
from elastickpt.format.strict_reading import IntColumn
from elastickpt.format.values import Value
from elastickpt.format.version import CONVERTER, MAX_FRAGMENTS_NBYTES, MAX_MANIFEST_NBYTES
from elastickpt.ledger.epochs import counts
from elastickpt.ledger.names import AttemptId, parse_folder
from elastickpt.ledger.objects import Operations, complete
from elastickpt.ledger.records import AbortRegister
from elastickpt.ledger.stored import list_commits, newest_adopted, read_register
from elastickpt.storage.opening import locate, path_in
from elastickpt.storage.store import Store

_Key = TypeVar("_Key")
_Of = TypeVar("_Of", covariant=True)


def registered_digest(store: Store, name: str) -> str | None:
    """The digest of the manifest in folder `name`, as its register says; None where `name` is no attempt of a run in `store`.

    Blocking; reads small objects only. Raises Uncommitted for an attempt that does not count, Damaged kinds for objects of the
    run that are not what was written.
    """
    found = parse_folder(name)
    if found is None:
        return None
    return complete(_digest(store, found[0], where=path_in(store, name), swept=found[1] == "swept"))


def _digest(store: Store, attempt: AttemptId, *, where: str, swept: bool) -> Operations[str | None]:
    listing = yield from list_commits(store)
    if not listing.newest:
        return None  # a copy that stands outside of its run
    if swept:
        raise Uncommitted(f"{where}: a checkpoint that is being removed")
    newest = yield from newest_adopted(store, listing, before=listing.newest + 1)
    if not counts(attempt, newest):
        known = "no epoch has adopted anything" if newest is None else f"epoch {newest.epoch} is the newest one"
        raise Uncommitted(f"{where}: an attempt that does not count in its run: {known}")
    try:
        register = yield from read_register(store, attempt)
    except MissingFile:
        raise Uncommitted(f"{where}: an attempt without a register in its run: never committed, or removed") from None
    if isinstance(register, AbortRegister):
        raise Uncommitted(f"{where}: an attempt that its register calls aborted: {register.reason}")
    return register.digest


class Later(Mapping[_Key, _Of]):
    """A mapping that is made when it is first asked for anything."""

    def __init__(self, make: Callable[[], Mapping[_Key, _Of]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[_Key, _Of]:
        return self._make()

    def __getitem__(self, key: _Key) -> _Of:
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._made

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True, slots=True, eq=False)
class _Cache:
    """Fragment maps read so far, and where each array's pieces stand in them; several threads may ask."""

    lock: threading.Lock
    maps: dict[int, FragmentColumns]
    problems: dict[int, Mapping[str, Malformed]]
    places: dict[int, Mapping[str, range]]
    numbers: dict[int, tuple[IntColumn, IntColumn]]


class Opened:
    """A checkpoint whose manifest was read and checked; the rest is read, and checked, when it is asked for."""

    def __init__(self, store: Store, name: str, manifest: Manifest) -> None:
        self.store = store
        self.name = name
        self.manifest = manifest
        self._fragments = _Cache(threading.Lock(), {}, {}, {}, {})
        self._bases: dict[int, str] = {}

    def path(self, relative: str) -> str:
        """Where a file of this checkpoint stands in its store."""
        return f"{self.name}/{relative}"

    @property
    def parts(self) -> tuple[IndexPart, ...]:
        """All parts of the index. Raises Damaged kinds naming the part."""
        return self._index[0]

    @cached_property
    def arrays(self) -> ArrayColumns:
        """Every array, in the order of keys. Raises Damaged kinds if the index is not what was written."""
        arrays = self._index[1]
        if not arrays.are_distinct:
            _by_id(arrays)  # raises, and says which
        return arrays

    @cached_property
    def _index(self) -> tuple[tuple[IndexPart, ...], ArrayColumns]:
        parts = tuple(
            decode_index(self.record(entry.file, MAX_MANIFEST_NBYTES), path=entry.file.path) for entry in self.manifest.index
        )
        return parts, check_index(parts, self.manifest)

    @cached_property
    def records(self) -> Mapping[ArrayId, ArrayRecord]:
        """Every array, by id, in the order of keys."""
        return MappingProxyType(_by_id(self.arrays))

    @property
    def tables(self) -> tuple[OptimizerTable, ...]:
        """What optimizers hold per parameter beside arrays."""
        return tuple(table for part in self.parts for table in part.tables)

    @cached_property
    def by_key(self) -> Mapping[str, ArrayRecord]:
        """Every array, by its path in the tree."""
        return MappingProxyType({record.key: record for record in self.records.values()})

    def fragments(self, writer: int) -> FragmentColumns:
        """One writer's fragment map, in agreement with index and manifest; read once. Raises Damaged kinds naming the file."""
        columns = self._map(writer)
        for problem in self._fragments.problems[writer].values():
            raise problem
        return columns

    def pieces(self, writer: int, key: str) -> tuple[FragmentColumns, range]:
        """The fragment map of one writer, and where in it the pieces of one array stand, in agreement with the index.

        Raises Damaged kinds as `fragments`, of what is wrong with single arrays only for this one. [FRAG-36]
        """
        columns, known, problems = self.places(writer)
        problem = problems.get(key)
        if problem is not None:
            raise problem
        if key not in known:
            raise Malformed(f"fragment map of writer {writer}: no piece of {key}, which the index says it holds")
        return columns, known[key]

    def places(self, writer: int) -> tuple[FragmentColumns, Mapping[str, range], Mapping[str, Malformed]]:
        """The fragment map of one writer, where in it the pieces of each array stand, and what is wrong with single arrays.

        Raises Damaged kinds for what is wrong with the map.
        """
        columns = self._map(writer)
        known = self._fragments.places.get(writer)
        if known is None:
            known = self._fragments.places[writer] = columns.pieces.by_array()
        return columns, known, self._fragments.problems[writer]

    def numbers(self, writer: int) -> tuple[FragmentColumns, IntColumn, IntColumn]:
        """The fragment map of one writer; and of each array, by its place in the index, the number of its first piece there
        and how many there are: none of an array that something is wrong with. Raises Damaged kinds as `places`."""
        columns = self._map(writer)
        known = self._fragments.numbers.get(writer)
        if known is None:
            keys, problems = columns.pieces.arrays, self._fragments.problems[writer]
            ends = np.searchsorted(columns.pieces.array, np.arange(len(keys) + 1))
            first, count = np.zeros((2, len(self.arrays)), dtype=np.int64)
            places = self.arrays.places_of(keys)
            mine = np.array([key not in problems for key in keys], dtype=np.bool_) if problems else places >= 0
            first[places[mine]], count[places[mine]] = ends[:-1][mine], np.diff(ends)[mine]
            known = self._fragments.numbers[writer] = first, count
        return columns, *known

    def _map(self, writer: int) -> FragmentColumns:
        """The map, of which single arrays may be wrong; they stand in the cache."""
        with self._fragments.lock:
            known = self._fragments.maps.get(writer)
        if known is not None:
            return known
        if not 0 <= writer < len(self.manifest.fragments):
            raise Malformed(f"index: writer {writer} is not in the manifest, which has {len(self.manifest.fragments)}")
        said = self.manifest.fragments[writer]
        columns = decode_columns(self.record(said, MAX_FRAGMENTS_NBYTES), path=said.path)
        problems = fragment_problems(columns, self.arrays, manifest=self.manifest, writer=writer)
        with self._fragments.lock:
            self._fragments.problems.setdefault(writer, problems)
            return self._fragments.maps.setdefault(writer, columns)

    def stored_by(self, writer: int, items: Collection[str]) -> Iterator[ArrayId]:
        """The arrays of these items that a writer stored pieces of. Raises Damaged kinds as `pieces` for any of them."""
        columns, problems, item = self._map(writer), self._fragments.problems[writer], self.arrays.names.item
        keys = columns.pieces.arrays
        for key, place in zip(keys, self.arrays.places_of(keys).tolist(), strict=True):
            if place >= 0 and item[place] not in items:
                continue
            if key in problems or place < 0:
                raise problems[key]
            yield self.arrays.id(place)

    def where(self, file: StoredFile) -> str:
        """Where a file that pieces lie in stands in the store: in this checkpoint or in a base of it."""
        return f"{self.name if file.base == 0 else self._base(file.base)}/{file.path}"

    def _base(self, number: int) -> str:
        """The folder of a base, beside this checkpoint, whose manifest is the one meant. [UCF-84, UCF-85]"""
        base = self.manifest.bases[number - 1]
        known = self._bases.get(number)
        if known is not None:
            return known
        name = base.uri.removeprefix("../")
        if not name or "/" in name or name == base.uri or name in (".", ".."):
            raise Unsafe(f"base {base.uri!r}: expected a checkpoint beside this one ('../NAME'); others are not opened")
        found = file_digest(self.store.read(f"{name}/{MANIFEST}", MAX_MANIFEST_NBYTES))
        if found != base.digest:
            raise ChecksumMismatch(
                f"base {base.uri!r}: expected manifest digest {base.digest} (in the manifest), found {found}"
            )
        self._bases[number] = name
        return name

    def all_fragments(self) -> Iterator[FragmentColumns]:
        """Every writer's fragment map, by writer."""
        for writer in range(len(self.manifest.fragments)):
            yield self.fragments(writer)

    def per_rank(self, writer: int) -> Mapping[str, Value]:
        """One writer's own values, by JSON pointer."""
        values = self._map(writer).values
        return values if isinstance(values, dict) else {}

    def record(self, file: FileDigest, limit: int) -> bytes:
        """The bytes of a record file named by the manifest, checked against it."""
        try:
            data = self.store.read(self.path(file.path), limit)
        except MissingFile:
            raise MissingFile(f"{file.path}: expected {file.nbytes} bytes (in the manifest), found no such file") from None
        if len(data) != file.nbytes:
            raise WrongLength(f"{file.path}: expected {file.nbytes} bytes (in the manifest), found {len(data)}")
        found = file_digest(data)
        if found != file.digest:
            raise ChecksumMismatch(f"{file.path}: expected digest {file.digest} (in the manifest), found {found}")
        return data


def _by_id(arrays: ArrayColumns) -> dict[ArrayId, ArrayRecord]:
    records: dict[ArrayId, ArrayRecord] = {}
    for record in arrays:
        twin = records.setdefault(record.spec.id, record)
        if twin is not record:
            raise Malformed(f"index: array {record.spec.id} stands twice, under {twin.key!r} and {record.key!r}")
    return records


def open_records(path: str | os.PathLike[str]) -> Opened:
    """The checkpoint at `path` (a folder or a URL); reads its manifest only.

    Raises NotACheckpoint or Uncommitted when there is none, Unsupported for a version or feature unknown to this release,
    Damaged kinds if the manifest is not what was written.
    """
    store, name = locate(path)
    return open_in(store, name, digest=registered_digest(store, name))


def open_in(store: Store, name: str, *, digest: str | None = None) -> Opened:
    """The checkpoint in the folder `name` of a store; `digest`, where one is known, is that of its manifest.

    Reads the manifest only; errors as those of `open_records`.
    """
    if is_draft(name):  # whatever it holds: it may be whole, and its writer about to take it back [SAVE-23]
        raise Uncommitted(f"{store.url}/{name}: expected a checkpoint, found a draft of one that was never committed")
    try:
        data = store.read(f"{name}/{MANIFEST}", MAX_MANIFEST_NBYTES)
    except MissingFile:
        if digest is not None:
            raise MissingFile(f"{store.url}/{name}: {MANIFEST} is not there; the register of the checkpoint is") from None
        raise _absent(store, name) from None
    if store.exists(f"{name}/{DRAFT_TOKEN}"):
        raise Uncommitted(
            f"{store.url}/{name}: expected a checkpoint, found a draft of one ({DRAFT_TOKEN} is in it), never committed"
        )
    manifest = decode_manifest(data, path=MANIFEST)
    found = file_digest(data)
    if digest is not None and found != digest:  # whole, and another one than was committed here [RUN-56]
        raise ChecksumMismatch(f"{name}/{MANIFEST}: expected digest {digest} (in its register), found {found}")
    return Opened(store, name, manifest)


def _absent(store: Store, name: str) -> CheckpointError:
    """What a folder without a manifest is. [UCF-1, UCF-9, UCF-160, SAVE-23]"""
    where = f"{store.url}/{name}"
    if ".draft-" in name:
        return Uncommitted(f"{where}: expected a checkpoint, found by its name a draft of one, never committed")
    try:
        names = {entry.name for entry in store.entries(name)}
    except CheckpointError:
        return NotACheckpoint(f"{where}: expected the folder of a checkpoint, found nothing that can be opened")
    if DRAFT_TOKEN in names or ("fragments" in names and names & {"params", "packs"}):
        return Uncommitted(f"{where}: expected {MANIFEST}, found an attempt to write a checkpoint that was never committed")
    found = ", ".join(sorted(names)[:5]) or "an empty folder"
    return NotACheckpoint(f"{where}: expected {MANIFEST}, found {found}")


def is_converted(opened: Opened) -> bool:
    """Whether a conversion made the checkpoint, and no job. [UCF-120]"""
    return CONVERTER in dict(opened.manifest.versions)
