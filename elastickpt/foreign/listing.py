"""What an importer yields: which tensors a foreign checkpoint holds, where their bytes lie, and its plain values.

Files come in two families. Where the files say of each piece where it lies in the whole (DCP, safetensors, one-process
torch files) there are `wholes`; where they hold what each rank had, under local names (Megatron), there are `ranks`, and
only a program of the language says how the whole is made of them. No tensor is read to make a listing. [FOR-1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeAlias

from elastickpt.errors import LimitExceeded, Malformed
from elastickpt.format.arrays import DTYPES, Box
from elastickpt.format.version import MAX_DIM, MAX_NDIM, MIB

MAX_REPEATED_NBYTES = 1024 * MIB  # of a tensor that has more elements than its storage (strides of 0)

Format: TypeAlias = Literal[
    "universal", "dcp", "safetensors", "torch", "megatron-legacy", "megatron-dist", "deepspeed", "deepspeed-universal", "fsdp1"
]
FileConstant: TypeAlias = int | float | bool | str | tuple["FileConstant", ...] | None
LocalName: TypeAlias = str | int  # an int is an optimizer's index, of which only an order says whose it is


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes of one file in which tensors lie; tensors with one storage share memory when they are loaded."""

    file: str  # relative to the source's folder, POSIX
    start: int  # bytes from the file's begin
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the elements of a tensor lie: element `index` begins at `start + sum(index * strides) * itemsize`.

    Every element lies within its storage: that is checked here, so no reader can leave the record. [FOR-2]
    """

    storage: Storage
    offset: int  # elements from the storage's begin to element [0, ..., 0]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    dtype: str  # a name of `format.arrays`

    def __post_init__(self) -> None:
        where = f"{self.storage.file}: a tensor of shape {self.shape} and strides {self.strides}"
        if len(self.shape) != len(self.strides):
            raise Malformed(f"{where}: expected one stride for each dimension")
        if self.offset < 0 or min(self.shape, default=0) < 0 or min(self.strides, default=0) < 0:
            raise Malformed(f"{where} at offset {self.offset}: expected no negative number")
        if len(self.shape) > MAX_NDIM or max(self.shape, default=0) > MAX_DIM:
            raise LimitExceeded(f"{where}: at most {MAX_NDIM} dimensions of at most {MAX_DIM}")
        if self.reach * self.itemsize > self.storage.nbytes:
            raise Malformed(
                f"{where} at offset {self.offset} reaches {self.reach * self.itemsize} bytes into its storage,"
                f" which has {self.storage.nbytes}"
            )

        if self.nbytes > max(self.storage.nbytes, MAX_REPEATED_NBYTES):
            raise LimitExceeded(f"{where} stands for {self.nbytes} bytes, its storage has {self.storage.nbytes}")

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def start(self) -> int:
        """Bytes from the file's begin to element [0, ..., 0]."""
        return self.storage.start + self.offset * self.itemsize

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements once they lie one after the other."""
        return self.count * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in C order."""
        return in_order(self.shape, self.strides)

    @property
    def reach(self) -> int:
        """Elements of the storage up to and with the last one that the tensor names; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these strides are those of a C array without gaps; a stride along an axis of one element does not matter."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One tensor of one rank, under the name that the rank gives it.

    `item` is the container of the file ("model", "optimizer"), `state` is "value", "master" or the optimizer's own name.
    `chunk` counts the model chunks of a rank that has several stages of a pipeline; it is 0 for an optimizer.
    """

    item: str
    name: LocalName
    state: str
    stored: StoredTensor
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class StateScalar:
    """A state of a parameter that is a plain value and no tensor: the `step` of some optimizers."""

    item: str
    name: LocalName
    state: str
    value: object


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """One param group of an optimizer: its members in order, and its options as the file has them."""

    item: str
    members: tuple[LocalName, ...]
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class NotCarried:
    """Something of the source that no conversion takes along, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RankListing:
    """What one rank had. `coordinate` gives its place on each axis that names of files tell, slowest axis first.

    `tensors` stand in the order of the file: for "model" that is the order of the module tree. `values` are the plain
    values by JSON pointer ("/iteration"); `empty` names the entries of "model" that hold no tensor (None, no bytes).
    """

    coordinate: tuple[tuple[str, int], ...]
    file: str
    tensors: tuple[LocalTensor, ...]
    groups: tuple[ParamGroup, ...]
    values: Mapping[str, object]
    scalars: tuple[StateScalar, ...] = ()
    empty: tuple[str, ...] = ()

    def at(self, axis: str) -> int:
        """Its place on an axis. KeyError for an axis that the files do not know."""
        return dict(self.coordinate)[axis]


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A box of a whole array, and where its elements lie; `stored.shape` is the box's."""

    box: Box
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """One array of which the files say how it is made up: the pieces cover it, each element once. [FOR-3]

    `state` is "" for a tensor that is no state of a parameter: `item` is then the top key of the file's value and `name` the
    JSON pointer below it without its first slash, as in an `ArrayId` of section `extra`.
    """

    item: str
    name: LocalName
    state: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[FilePiece, ...]


@dataclass(frozen=True, slots=True)
class TiedName:
    """`alias` is one tensor with `name`, both in the model that is `item`."""

    item: str
    alias: str
    name: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ForeignCheckpoint:
    """All that an importer found. `folder` opens the files: `open_store(folder)`; `said` is what a user is told about it.

    `constants` are the plain numbers and words of `args` or `config.json`, under the file's own names. `tied` says of a name
    that it is one tensor with another one, which stands in `wholes`. `values` are plain values by JSON pointer.
    """

    format: Format
    folder: str
    files: tuple[SourceFile, ...]
    step: int | None = None
    ranks: tuple[RankListing, ...] = ()
    wholes: tuple[WholeTensor, ...] = ()
    scalars: tuple[StateScalar, ...] = ()
    groups: tuple[ParamGroup, ...] = ()
    tied: tuple[TiedName, ...] = ()
    constants: Mapping[str, FileConstant] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    not_carried: tuple[NotCarried, ...] = ()
    said: tuple[str, ...] = ()
