"""A checkpoint as zarr-python sees it: data types that it lacks, and a read-only store. Only here is zarr imported.

The data types reach zarr-python through the entry-point group `zarr.data_type` of the installed package, or through
`register_data_types()`. Their scalars are those of ml_dtypes; bits are never changed, whatever NaN they mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from math import inf, isnan
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, Self, overload

import ml_dtypes
import numpy as np
import zarr
from zarr import Group as Group
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from elastickpt.errors import ReadOnly, Unsupported

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON, DTypeSpec_V2, DTypeSpec_V3

_SPECIAL = {"NaN": float("nan"), "Infinity": inf, "-Infinity": -inf}
_Native = np.dtype[np.generic]


@dataclass(frozen=True, kw_only=True)
class _Float(ZDType[_Native, np.generic], HasItemSize):
    """A floating-point type of ml_dtypes; `native` is its numpy dtype."""

    native: ClassVar[_Native]

    @property
    def item_size(self) -> int:
        return self.native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: _Native) -> Self:
        if dtype != cls.native:
            raise DataTypeValidationError(f"expected {cls.native}, found {dtype}")
        return cls()

    def to_native_dtype(self) -> _Native:
        return self.native

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError(f"{cls._zarr_v3_name} is no type of zarr v2")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data not in (cls._zarr_v3_name, {"name": cls._zarr_v3_name}):
            raise DataTypeValidationError(f"expected {cls._zarr_v3_name!r}, found {data!r}")
        return cls()

    @overload
    def to_json(self, zarr_format: Literal[2]) -> DTypeSpec_V2: ...

    @overload
    def to_json(self, zarr_format: Literal[3]) -> DTypeSpec_V3: ...

    def to_json(self, zarr_format: ZarrFormat) -> DTypeSpec_V2 | DTypeSpec_V3:
        if zarr_format == 2:
            raise DataTypeValidationError(f"{self._zarr_v3_name} is no type of zarr v2")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | np.bool_ | self.native.type)

    def cast_scalar(self, data: object) -> np.generic:
        if isinstance(data, self.native.type):
            return data
        if not self._check_scalar(data):
            raise TypeError(f"expected a number for {self._zarr_v3_name}, found {data!r}")
        return self._from_bits(np.asarray(data).astype(self.native).tobytes())

    def default_scalar(self) -> np.generic:
        return self.cast_scalar(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> np.generic:
        """A number, "NaN", "Infinity", "-Infinity", or the bits: "0x7fc0", as many hex digits as the type has."""
        if isinstance(data, str) and data.startswith("0x") and len(data) == 2 + 2 * self.item_size:
            return self._from_bits(int(data, 16).to_bytes(self.item_size, "little"))
        value = _SPECIAL.get(data) if isinstance(data, str) else data
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"expected a fill value of {self._zarr_v3_name}, found {data!r}")
        found = self.cast_scalar(value)
        if isnan(float(found)) and not isnan(value):
            raise ValueError(f"{self._zarr_v3_name} has no {data!r}")
        return found

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> JSON:
        scalar = self.cast_scalar(data)
        bits, value = scalar.tobytes(), float(scalar)
        if isnan(value):
            canonical = self.cast_scalar(_SPECIAL["NaN"]).tobytes()
            return "NaN" if bits == canonical else "0x" + bits[::-1].hex()
        return next((name for name, special in _SPECIAL.items() if value == special), value)

    def _from_bits(self, little_endian: bytes) -> np.generic:
        scalar: np.generic = np.frombuffer(little_endian, dtype=self.native)[0]
        return scalar


def _native(scalar: type) -> _Native:
    return np.dtype(scalar)


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Float, HasEndianness):
    native = _native(ml_dtypes.bfloat16)
    dtype_cls = type(native)
    _zarr_v3_name = "bfloat16"

    def to_native_dtype(self) -> _Native:
        if self.endianness != "little":
            raise Unsupported("array of bfloat16: expected the codec `bytes` with endian 'little', found 'big'")
        return self.native


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_Float):
    native = _native(ml_dtypes.float8_e4m3fn)
    dtype_cls = type(native)
    _zarr_v3_name = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(_Float):
    native = _native(ml_dtypes.float8_e4m3fnuz)
    dtype_cls = type(native)
    _zarr_v3_name = "float8_e4m3fnuz"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_Float):
    native = _native(ml_dtypes.float8_e5m2)
    dtype_cls = type(native)
    _zarr_v3_name = "float8_e5m2"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(_Float):
    native = _native(ml_dtypes.float8_e5m2fnuz)
    dtype_cls = type(native)
    _zarr_v3_name = "float8_e5m2fnuz"


@dataclass(frozen=True, kw_only=True)
class Float8E8M0FNU(_Float):
    native = _native(ml_dtypes.float8_e8m0fnu)
    dtype_cls = type(native)
    _zarr_v3_name = "float8_e8m0fnu"

    def default_scalar(self) -> np.generic:
        return self.cast_scalar(1)  # it has no zero


_DATA_TYPES = (BFloat16, Float8E4M3FN, Float8E4M3FNUZ, Float8E5M2, Float8E5M2FNUZ, Float8E8M0FNU)


def register_data_types() -> None:
    """zarr-python knows these types from now on, also where the package is not installed with its entry points."""
    for cls in _DATA_TYPES:
        data_type_registry.register(cls._zarr_v3_name, cls)


BytesLike = bytes | bytearray | memoryview
_DOCUMENT = "zarr.json"
_OTHER_FORMATS = frozenset({".zarray", ".zattrs", ".zgroup", ".zmetadata"})  # what zarr-python asks for to find a v2 tree


def open_group(
    documents: Callable[[str], bytes | None],
    chunk: Callable[[str], BytesLike],
    *,
    names: Callable[[str], Iterable[str]],
) -> Group:
    """The group at the top of `read_only_store`, which see."""
    return zarr.open_group(read_only_store(documents, chunk, names=names), mode="r", zarr_format=3)


def read_only_store(
    documents: Callable[[str], bytes | None],
    chunk: Callable[[str], BytesLike],
    *,
    names: Callable[[str], Iterable[str]],
) -> Store:
    """A zarr store that shows a tree without any file: `zarr.open_group(read_only_store(...), mode="r")`.

    documents   of "a/b/zarr.json": that document, or None where no node is
    chunk       of "a/b/c.0": its stored bytes, whole. Raises MissingFile for one that is not there, since to return
                would be a silent fill. Called in worker threads, several at once.
    names       of "a" ("" is the top): what stands below it, directories with "/" at the end, as ["b/", "zarr.json"]

    What these three raise reaches the caller of zarr as it is. The data types above are registered.
    """
    register_data_types()
    return _ReadOnlyStore(documents, chunk, names)


class _ReadOnlyStore(Store):
    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        documents: Callable[[str], bytes | None],
        chunk: Callable[[str], BytesLike],
        names: Callable[[str], Iterable[str]],
    ) -> None:
        super().__init__(read_only=True)
        self._documents = documents
        self._chunk = chunk
        self._names = names

    def __eq__(self, value: object) -> bool:
        return self is value

    __hash__ = object.__hash__

    def with_read_only(self, read_only: bool = False) -> Store:
        return self if read_only else self._refuse()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        name = key.rpartition("/")[2]
        data: BytesLike | None
        if name in _OTHER_FORMATS:
            return None
        if name == _DOCUMENT:
            data = self._documents(key)
        else:
            data = await asyncio.to_thread(self._chunk, key)
        return None if data is None else prototype.buffer.from_bytes(memoryview(data)[_slice(byte_range)])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        parent, _, name = key.rpartition("/")
        if name == _DOCUMENT:
            return self._documents(key) is not None
        return name in self._names(parent)

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._below(prefix.rpartition("/")[0]):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in self._names(prefix.strip("/")):
            yield name.rstrip("/")

    def _below(self, directory: str) -> Iterable[str]:
        """All keys below, not recursive in Python: trees are as deep as whoever wrote them liked."""
        waiting = [directory]
        while waiting:
            top = waiting.pop()
            for name in self._names(top):
                path = f"{top}/{name}" if top else name
                if name.endswith("/"):
                    waiting.append(path.rstrip("/"))
                else:
                    yield path

    def _refuse(self) -> NoReturn:
        raise ReadOnly("a checkpoint that was opened to be read cannot be written through zarr")

    async def set(self, key: str, value: Buffer) -> None:
        self._refuse()

    async def delete(self, key: str) -> None:
        self._refuse()


def _slice(byte_range: ByteRequest | None) -> slice:
    match byte_range:
        case None:
            return slice(None)
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(0):
            return slice(0, 0)
        case SuffixByteRequest(suffix):
            return slice(-suffix, None)
