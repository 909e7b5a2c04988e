"""A small job to save and load, forged records with right digests, and pictures of all that must not change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastickpt as ek
from elastickpt.format.decode_index import decode_index
from elastickpt.format.digest import file_digest
from elastickpt.format.encode_fragments import decode_fragments, encode_fragments
from elastickpt.format.encode_index import encode_index
from elastickpt.format.encode_manifest import decode_manifest, encode_manifest
from elastickpt.format.records import FileDigest, FragmentMap, IndexEntry, IndexPart, Manifest
from elastickpt.training.elements import host_elements

Picture = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)


def job(seed: int) -> dict[str, Any]:
    """A state with every kind of entry, its optimizer stepped once."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01 * (1 + seed))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    extra = {"mean": torch.randn(5), "tokens": 10 * seed, "names": ["a", str(seed)]}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra": extra, "epoch": seed}


def _picture(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), host_elements(value.detach()).tobytes(), value.data_ptr())
    if isinstance(value, dict):
        return {key: _picture(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_picture(one) for one in value]
    return value


def picture(state: dict[str, Any]) -> Picture:
    """All of a state: bits, where tensors lie, and values."""
    whole = {key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in state.items()}
    found = _picture(whole)
    assert isinstance(found, dict)
    return found


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every name below a folder, with size and time of change."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*"))}


@dataclass(frozen=True)
class Forge:
    """Changes records of a checkpoint in place; every digest is right afterwards."""

    path: Path

    def manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        file = self.path / "checkpoint.json"
        file.write_bytes(encode_manifest(change(decode_manifest(file.read_bytes(), path="it"))))

    def text(self, old: bytes, new: bytes) -> None:
        """Changes the manifest's text, so also what no encoder would write."""
        file = self.path / "checkpoint.json"
        body = file.read_bytes().rpartition(b',"digest":')[0]
        assert body.count(old) == 1
        body = body.replace(old, new)
        file.write_bytes(body + f',"digest":"{file_digest(body)}"}}\n'.encode())

    def index(self, change: Callable[[IndexPart], IndexPart]) -> None:
        part = change(decode_index((self.path / "index.msgpack").read_bytes(), path="it"))
        self.index_bytes(encode_index(part), part.arrays[0].key, part.arrays[-1].key)

    def index_bytes(self, data: bytes, first: str, last: str) -> None:
        """Puts any bytes in place of the index."""
        (self.path / "index.msgpack").write_bytes(data)
        entry = IndexEntry(FileDigest("index.msgpack", len(data), file_digest(data)), first, last)
        self.manifest(lambda manifest: replace(manifest, index=(entry,)))

    def fragments(self, change: Callable[[FragmentMap], FragmentMap], *, writer: int = 0) -> None:
        file = self.path / f"fragments/{writer:05d}.msgpack"
        data = encode_fragments(change(decode_fragments(file.read_bytes(), path="it")))
        file.write_bytes(data)
        said = FileDigest(f"fragments/{writer:05d}.msgpack", len(data), file_digest(data))

        def swap(manifest: Manifest) -> Manifest:
            return replace(manifest, fragments=(*manifest.fragments[:writer], said, *manifest.fragments[writer + 1 :]))

        self.manifest(swap)


@dataclass(frozen=True)
class Attempted:
    """A refused load: its error, and that nothing was changed by it."""

    error: ek.errors.CheckpointError
    unchanged: bool


@dataclass(frozen=True)
class Case:
    """A saved job, and loads of it into another one."""

    path: Path
    forge: Forge

    def load(self, change: Callable[[dict[str, Any]], object] = lambda state: None, **options: Any) -> Attempted:
        """Loads into a job of other contents, changed before; the load must fail."""
        state = job(2)
        change(state)
        before, files, streams = picture(state), tree(self.path.parent), torch.get_rng_state()
        with pytest.raises(ek.errors.CheckpointError) as caught:
            ek.load(state, self.path, **options)
        same = picture(state) == before and torch.equal(torch.get_rng_state(), streams)
        return Attempted(caught.value, same and tree(self.path.parent) == files)


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "c"
    ek.save(job(1), path, step=5)
    return path


@pytest.fixture
def case(_original: Path, tmp_path: Path) -> Case:
    """A checkpoint of `job(1)` that the test may spoil."""
    shutil.copytree(_original, tmp_path / "c")
    return Case(tmp_path / "c", Forge(tmp_path / "c"))


@pytest.fixture
def new_job() -> Callable[[int], dict[str, Any]]:
    return job


@pytest.fixture
def picture_of() -> Callable[[dict[str, Any]], Picture]:
    return picture
