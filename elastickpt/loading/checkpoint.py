"""A checkpoint to read from, as `ek.open` gives it. Imports no torch, writes nothing, runs no code of the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import gt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastickpt.errors import MissingFile, Refused
from elastickpt.format.arrays import ArrayId, Box, Mesh
from elastickpt.format.documents import documents
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, Item, Manifest, OptimizerTable
from elastickpt.format.values import Value
from elastickpt.loading.fetch import fetch
from elastickpt.loading.opened import Opened
from elastickpt.loading.plan import require_stored
from elastickpt.loading.targets import Bytes, Wanted
from elastickpt.loading.verify import VerifyReport, verify
from elastickpt.storage.opening import path_in

if TYPE_CHECKING:
    from elastickpt.storage.arrays import Group

_WORDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter (or buffer) and its states; `states` maps `value`, `exp_avg`, ... to their arrays."""

    item: str
    name: str
    states: Mapping[str, ArrayRecord]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its value; of its first state where a checkpoint has no value of it."""
        record = self.states.get("value") or next(iter(self.states.values()))
        return record.spec.shape


class Checkpoint:
    """A committed checkpoint, read-only, as `open` gives it. Records are read when they are asked for, arrays never before.

    Examples:
        >>> ckpt = ek.open("out/step-1000")
        >>> [item.name for item in ckpt.items]
        ['model', 'optimizer']
        >>> ckpt.arrays["params/model/layers.0.weight/value"][:].shape
        (4, 4)
        >>> weight = ckpt.parameters["model", "layers.0.weight"].states["value"].spec.id
        >>> ckpt.read(weight).dtype
        dtype('float32')
        >>> dict(ckpt.per_rank(0)), [len(one.pieces.nbytes) for one in ckpt.fragments()]
        ({}, [2])
        >>> ckpt.verify().problems
        ()
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    @property
    def path(self) -> str:
        """Where it is, as people write it."""
        return path_in(self._opened.store, self._opened.name)

    @property
    def manifest(self) -> Manifest:
        """The record that makes it a checkpoint."""
        return self._opened.manifest

    @property
    def step(self) -> int | None:
        """Number of completed optimizer steps, as the writer said."""
        return self.manifest.step

    @property
    def items(self) -> tuple[Item, ...]:
        """The keys of the state that was saved, and what stood under them."""
        return self.manifest.items

    @property
    def meshes(self) -> tuple[Mesh, ...]:
        """The meshes of ranks over which its arrays lay when they were saved."""
        return self.manifest.meshes

    @property
    def values(self) -> Mapping[str, Value]:
        """The replicated plain values, by JSON pointer."""
        values = self.manifest.values
        return MappingProxyType(values if isinstance(values, dict) else {})

    @cached_property
    def tables(self) -> tuple[OptimizerTable, ...]:
        """What optimizers hold per parameter beside arrays: hyper-parameters, step counts."""
        return self._opened.tables

    @property
    def records(self) -> Mapping[ArrayId, ArrayRecord]:
        """Every array's record, by id. Raises Damaged kinds if the index is not what was written."""
        return self._opened.records

    @cached_property
    def parameters(self) -> Mapping[tuple[str, str], Parameter]:
        """(item, FQN) → parameter, in the order of keys."""
        states: dict[tuple[str, str], dict[str, ArrayRecord]] = {}
        for identity, record in self.records.items():
            if identity.section == "params":
                states.setdefault((identity.item, identity.name), {})[identity.state] = record
        return MappingProxyType({key: Parameter(*key, MappingProxyType(of)) for key, of in states.items()})

    def fragments(self) -> Iterator[FragmentColumns]:
        """Every writer's fragment map. Blocking, one file after the other.

        Yields:
            They come in the order of writers: which pieces it stored, where, and with which checksums.

        Raises:
            Damaged: A file is not what was written; the message names it.
        """
        return self._opened.all_fragments()

    def per_rank(self, writer: int) -> Mapping[str, Value]:
        """The values that are one rank's own.

        Args:
            writer: The number of the rank that saved.

        Returns:
            JSON pointer → value.

        Raises:
            Damaged: They are not what was written.
        """
        return self._opened.per_rank(writer)

    def read(self, array: ArrayId, *, box: Box | None = None) -> NDArray[Any]:
        """The elements of an array, or of a box of it, verified. Blocking.

        Args:
            array: Which one, a key of `records`.
            box: A box inside it, in its global coordinates; by default all of it.

        Returns:
            The elements, of numpy's type, or ml_dtypes' where numpy has none.

        Raises:
            KeyError: No array has this id.
            Refused: The box lies beyond the array.
            Damaged: It is not what was written.
        """
        record = self.records[array]
        shape = record.spec.shape
        box = Box.whole(shape) if box is None else box
        if len(box.stop) != len(shape) or any(map(gt, box.stop, shape)):
            raise Refused(f"array {array}: expected a box inside its shape {shape}, found {box}")
        if box.count:
            require_stored(self._opened, record, box)  # before memory is taken for what a forged index says
        words = np.empty(box.shape, dtype=_WORDS[record.spec.type.itemsize])
        self.read_into(array, box, words)
        return words.view(_numpy_type(record.spec.dtype))

    def read_into(self, array: ArrayId, box: Box, words: NDArray[Any]) -> None:
        """Fills memory with a box of an array, verified. Blocking.

        Args:
            array: Which one, a key of `records`.
            box: A box that lies in the array, in its global coordinates.
            words: Of the box's shape, with elements of the array's element size.

        Raises:
            KeyError: No array has this id.
            Damaged: It is not what was written.

        Examples:
            >>> from elastickpt.format.arrays import Box
            >>> ckpt = ek.open("out/step-1000")
            >>> weight = ckpt.parameters["model", "layers.0.weight"].states["value"].spec.id
            >>> two_rows = torch.empty(2, 4)
            >>> ckpt.read_into(weight, Box((1, 0), (3, 4)), two_rows.numpy().view("u4"))
            >>> torch.equal(two_rows, model.layers[0].weight[1:3])
            True
        """
        fetch(self._opened, [Wanted(self.records[array], box, words)])

    def tree(self, item: str, *, arrays: Literal["numpy", "torch"] = "numpy", rank: int | None = None) -> object:
        """What stood in `state` under a key, all of it verified: an entry that was a dict, a list, a tensor or a value, or the
        state dict of an object. Blocking.

        Args:
            item: The key of `state`.
            arrays: "numpy", without torch (types that numpy lacks are ml_dtypes', and torch's dtypes and devices are
                texts), or "torch"; what was numpy's is so in both.
            rank: Chooses among values that are each rank's own.

        Returns:
            Plain containers, values, and arrays of host memory. A named tuple comes back with its fields, and a class of
            its own.

        Raises:
            NotACheckpoint: Nothing stood under this key.
            Refused: A module, an optimizer or its schedulers, whose states stand by parameter.
            StateMismatch: A tensor that only its class can put together.
            Damaged: It is not what was written.

        Examples:
            >>> info = ek.save({"config": {"lr": 0.1, "mask": torch.ones(2)}}, "out/config")
            >>> ek.open("out/config").tree("config")
            {'lr': 0.1, 'mask': array([1., 1.], dtype=float32)}
        """
        from elastickpt.loading.trees import tree_of

        return tree_of(self, item, arrays=arrays, rank=rank)

    @cached_property
    def arrays(self) -> Group:
        """The tree as a `zarr.Group`; chunks are served through stored pieces, their blocks verified, and never filled."""
        from elastickpt.storage.arrays import open_group

        tree = _Tree(self._opened)
        return open_group(tree.document, tree.chunk, names=tree.names)

    def verify(self, *, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
        """Looks at every byte: checksums, coverage, names, stray files. Blocking; damage is in the report, not raised.

        Args:
            progress: Is called with bytes done and bytes in all, from several threads.

        Returns:
            What was looked at, and every problem.

        Raises:
            StorageFailed: The store does not answer.
        """
        return verify(self._opened, progress=progress)


def _numpy_type(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        named: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return named


class _Tree:
    """The zarr tree of a checkpoint without its files: documents from the index, chunks from stored pieces."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    @cached_property
    def _documents(self) -> Mapping[str, bytes]:
        return dict(documents(self._opened.parts))

    @cached_property
    def _children(self) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = {"": set()}
        for path in self._documents:
            parts = path.split("/")
            for depth in range(len(parts)):
                name = parts[depth] + ("" if depth == len(parts) - 1 else "/")
                found.setdefault("/".join(parts[:depth]), set()).add(name)
        return found

    def document(self, path: str) -> bytes | None:
        return self._documents.get(path)

    def names(self, directory: str) -> list[str]:
        return sorted(self._children.get(directory, ()))

    def chunk(self, path: str) -> bytes:
        """The bytes of a chunk, pads as zeros. Raises MissingFile for what is no chunk, Damaged kinds for a bad one."""
        key, _, name = path.rpartition("/")
        record = self._opened.by_key.get(key)
        if record is None or not name.startswith("c"):
            raise MissingFile(f"{path}: no chunk of this checkpoint")
        place = tuple(int(index) for index in name.split(".")[1:])
        start = tuple(index * extent for index, extent in zip(place, record.chunk_shape, strict=True))
        stop = tuple(min(low + n, end) for low, n, end in zip(start, record.chunk_shape, record.spec.shape, strict=True))
        box = Box(start, stop)
        whole = np.zeros(record.chunk_shape, dtype=_WORDS[record.spec.type.itemsize])
        part = np.empty(box.shape, dtype=whole.dtype)
        fetch(self._opened, [Wanted(record, box, part)])
        whole[tuple(slice(0, extent) for extent in box.shape)] = part
        data: Bytes = whole.reshape(-1).view(np.uint8)
        return data.tobytes()
