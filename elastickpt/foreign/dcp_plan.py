"""A folder of `torch.distributed.checkpoint` that is to be written: `.metadata` and one `.distcp` file. [FOR-67..69]"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from elastickpt.errors import StructureConflict, ValueNotCarried
from elastickpt.foreign.dcp import METADATA
from elastickpt.foreign.file_plans import ByteFrame, FileChecksums, FilePlan, NewTensor, constant_file
from elastickpt.foreign.nested import Path
from elastickpt.foreign.pickle_emitter import emit_pickle
from elastickpt.foreign.pickle_values import ElementType, Instance
from elastickpt.foreign.torch_archive import plan_torch_archive
from elastickpt.format.values import ArrayValue

FILE = "__0_0.distcp"
_MODULE = "torch.distributed.checkpoint"
_VERSION = "1.0.0"  # of `.metadata`, as torch 2.13 states it


@dataclass(frozen=True, slots=True)
class _Item:
    key: str
    path: Path
    value: object
    offset: int
    archive: FilePlan


def plan_dcp(value: Mapping[str, object]) -> tuple[FilePlan, ...]:
    """The files for a nested value with a `NewTensor` for each tensor, as `dcp.save` flattens it.

    Each tensor is one chunk. Raises StructureConflict where two places have one dotted key.
    """
    items = list(_items(value))
    doubled = next((key for key, count in Counter(item.key for item in items).items() if count > 1), None)
    if doubled is not None:
        raise StructureConflict(f"{doubled}: two tensors or values have this key")
    data = FilePlan(
        FILE,
        items[-1].offset + items[-1].archive.nbytes if items else 0,
        tuple(slot for item in items for slot in item.archive.slots),
        lambda checksums: _frames(items, checksums),
    )
    return (data, constant_file(METADATA, emit_pickle(_metadata(items), _no_tensor)))


def _frames(items: Iterable[_Item], checksums: FileChecksums) -> Iterator[ByteFrame]:
    for item in items:
        yield from item.archive.frames(checksums)


def _items(value: Mapping[str, object]) -> Iterator[_Item]:
    at = 0
    for path, leaf in _leaves((), value):
        archive = plan_torch_archive(FILE, leaf, start=at)
        yield _Item(".".join(map(str, path)), path, leaf, at, archive)
        at += archive.nbytes


def _leaves(path: Path, value: object) -> Iterator[tuple[Path, object]]:
    """What torch makes items of: mappings are cut apart, and lists with tensors or mappings in them."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves((*path, str(key)), one)
    elif isinstance(value, list) and any(_is_cut(one) for one in value):
        for k, one in enumerate(value):
            yield from _leaves((*path, k), one)
    else:
        yield path, value


def _is_cut(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_is_cut, value))
    return isinstance(value, Mapping | NewTensor)


def _object(name: str, **state: object) -> Instance:
    return Instance(f"{_MODULE}.{name}", (), state)


def _size(sizes: tuple[int, ...]) -> Instance:
    return Instance("torch.Size", (sizes,))


def _metadata(items: Iterable[_Item]) -> Instance:
    described: dict[object, object] = {}
    places: dict[object, object] = {}
    paths: dict[object, object] = {}
    for item in items:
        tensor = item.value
        is_tensor = isinstance(tensor, NewTensor | ArrayValue)
        described[item.key] = _described(tensor) if is_tensor else Instance(f"{_MODULE}.metadata.BytesStorageMetadata")
        at = _at(item.key, (0,) * len(tensor.shape)) if isinstance(tensor, NewTensor | ArrayValue) else _at(item.key, None)
        places[at] = _object("filesystem._StorageInfo", relative_path=FILE, offset=item.offset, length=item.archive.nbytes)
        paths[item.key] = item.path
    return _object(
        "metadata.Metadata",
        state_dict_metadata=described,
        planner_data=paths,
        storage_data=places,
        storage_meta=_object("metadata.StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        version=_VERSION,
    )


def _at(key: str, offset: tuple[int, ...] | None) -> Instance:
    """torch's own index: for a value neither offset nor index."""
    if offset is None:
        return _object("metadata.MetadataIndex", fqn=key, index=None)
    return _object("metadata.MetadataIndex", fqn=key, index=0, offset=_size(offset))


def _described(tensor: object) -> Instance:
    if not isinstance(tensor, NewTensor | ArrayValue):
        raise ValueNotCarried("a value is described as a tensor")
    chunk = _object("metadata.ChunkStorageMetadata", offsets=_size((0,) * len(tensor.shape)), sizes=_size(tensor.shape))
    layout = Instance("torch.layout", ("torch.strided",))
    contiguous = Instance(f"{_MODULE}.metadata._MEM_FORMAT_ENCODING", (0,))
    state = (ElementType(tensor.dtype), layout, False, contiguous, False)
    properties = Instance(f"{_MODULE}.metadata.TensorProperties", (), state)
    return _object("metadata.TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=[chunk])


def _no_tensor(_: object) -> str:
    raise ValueNotCarried(f"{METADATA}: it holds no tensors")
