"""safetensors files that are to be written: one, or several with the index that transformers reads. [FOR-47..49]"""

from __future__ import annotations

import json
from collections.abc import Mapping

from elastickpt.errors import Refused, ValueNotCarried
from elastickpt.foreign.file_plans import FilePlan, NewTensor, TensorSlot, constant_file
from elastickpt.foreign.safetensors_file import DTYPE_NAMES, MAX_HEADER_NBYTES
from elastickpt.format.arrays import DTYPES

DEFAULT_SHARD_NBYTES = 5_000_000_000
_NAME_OF: Mapping[str, str] = {dtype: name for name, dtype in DTYPE_NAMES.items()}


def plan_safetensors(
    tensors: Mapping[str, NewTensor],
    *,
    notes: Mapping[str, str] | None = None,
    shard_nbytes: int = DEFAULT_SHARD_NBYTES,
    stem: str = "model",
) -> tuple[FilePlan, ...]:
    """The files, in the order of `tensors`: each has at most `shard_nbytes` bytes of tensors, or one tensor alone.

    Two names of one tensor (one `key`) stand once, under the first name; the other is told in the file's notes as
    `{alias: name}`, where the safetensors library looks for it. Raises ValueNotCarried for an element type that the format
    lacks, Refused for a size below 1.
    """
    if shard_nbytes < 1:
        raise Refused(f"a file of {shard_nbytes} bytes can hold no tensor")
    kept, aliases = _once(tensors)
    for name, tensor in kept.items():
        if tensor.dtype not in _NAME_OF:
            raise ValueNotCarried(f"{name}: safetensors has no element type {tensor.dtype}; `--cast` or `--skip` it")
    shards = _shards(kept, shard_nbytes)
    texts = {"format": "pt", **(notes or {})}
    if len(shards) == 1:
        return (_plan(f"{stem}.safetensors", shards[0], texts | aliases),)
    files: list[FilePlan] = []
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        there = {alias: name for alias, name in aliases.items() if name in shard}
        files.append(_plan(path, shard, texts | there))
        places |= dict.fromkeys(shard, path)
    total = sum(tensor.nbytes for tensor in kept.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return (*files, constant_file(f"{stem}.safetensors.index.json", text.encode()))


def _once(tensors: Mapping[str, NewTensor]) -> tuple[dict[str, NewTensor], dict[str, str]]:
    """Tensors under their first names, and the other names with it."""
    first: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor.key, name) != name:
            aliases[name] = first[tensor.key]
    return {name: tensors[name] for name in first.values()}, aliases


def _shards(tensors: Mapping[str, NewTensor], limit: int) -> list[dict[str, NewTensor]]:
    shards: list[dict[str, NewTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _plan(path: str, tensors: Mapping[str, NewTensor], notes: Mapping[str, str]) -> FilePlan:
    """Wide element types first, so that each tensor is aligned to its own."""
    ordered = sorted(tensors.items(), key=lambda pair: -DTYPES[pair[1].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": dict(notes)}
    places: list[tuple[NewTensor, int]] = []
    at = 0
    for name, tensor in ordered:
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAME_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        places.append((tensor, at))
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise ValueNotCarried(f"{path}: {len(tensors)} tensors need a header of {len(text)} bytes, the format's limit is less")
    begin = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    slots = tuple(TensorSlot(tensor, begin + offset) for tensor, offset in places)
    return FilePlan(path, begin + at, slots, lambda _: ((0, head),))
