"""Dicts of plain tensors are loaded in columns: each into its own memory, with the checks and the words of any other load."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elastickpt as ek
from elastickpt.errors import CheckpointError, ChecksumMismatch, MissingFile, StateMismatch
from elastickpt.loading.targets import FEW, scatter

TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
SHAPES = ((256,), (3, 5), (), (0, 4), (70_001,), (2, 1, 7))


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype)
    words = made.view(torch.uint8) if made.ndim else made.reshape(1).view(torch.uint8)
    top = 2 if dtype is torch.bool else 256
    words.copy_(torch.randint(0, top, words.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))
    return made


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(TYPES)), min_size=1, max_size=12),
    st.sampled_from(["plain", "packed"]),
    st.sampled_from(["tensors", "a/b~c"]),
)
def test_a_dict_of_tensors_comes_back_into_the_memory_that_it_has(
    kinds: list[tuple[tuple[int, ...], torch.dtype]], placement: Any, above: str
) -> None:
    saved = {f"t{k}" if k else "odd/~name": filled(*kind, k) for k, kind in enumerate(kinds)}
    own = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    where = {name: (tensor.data_ptr(), tensor._version) for name, tensor in own.items()}
    with TemporaryDirectory() as folder:
        ek.save({"state": {above: saved}}, f"{folder}/it", placement=placement)
        report = ek.load({"state": {above: own}}, f"{folder}/it")
    assert report.nbytes == sum(tensor.nbytes for tensor in saved.values())
    for name, tensor in own.items():
        assert same_bits(tensor, saved[name])
        assert (tensor.data_ptr(), tensor._version > where[name][1]) == (where[name][0], True)


def test_what_does_not_lie_in_a_row_is_loaded_too(tmp_path: Path) -> None:
    saved = {"turned": torch.arange(12.0).reshape(3, 4), "half": torch.arange(5.0), "plain": torch.arange(6)}
    ek.save({"state": saved}, tmp_path / "it", placement="packed")
    base = torch.zeros(10)
    own = {"turned": torch.zeros(4, 3).t(), "half": base[::2], "plain": torch.zeros(6, dtype=torch.int64)}
    ek.load({"state": own}, tmp_path / "it")
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())
    assert torch.equal(base[1::2], torch.zeros(5))


def test_views_of_one_memory_and_tied_tensors_are_loaded(tmp_path: Path) -> None:
    memory = torch.arange(8.0)
    ek.save({"state": {"low": memory[:4], "high": memory[4:], "twice": memory[4:]}}, tmp_path / "it", placement="packed")
    fresh = torch.zeros(8)
    ek.load({"state": {"low": fresh[:4], "high": fresh[4:], "twice": (tied := torch.zeros(4))}}, tmp_path / "it")
    assert torch.equal(fresh, memory)
    assert torch.equal(tied, memory[4:])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"t3": torch.zeros(255)}, "state/t3: shape: expected (255,) (in this process), found (256,)"),
        ({"t3": torch.zeros(256, dtype=torch.int32)}, "state/t3: dtype: expected int32 (in this process), found float32"),
        ({"more": torch.zeros(2)}, "/state/more: missing: expected "),
        ({"t3": None}, "/state/t3: value: expected"),
    ],
)
def test_what_differs_is_named_and_nothing_is_changed(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    ek.save({"state": {f"t{k}": torch.full((256,), float(k)) for k in range(20)}}, tmp_path / "it", placement="packed")
    own = {f"t{k}": torch.zeros(256) for k in range(20)} | change
    with pytest.raises(StateMismatch) as caught:
        ek.load({"state": own}, tmp_path / "it")
    assert text in caught.value.message
    assert all(not tensor.any() for tensor in own.values() if tensor is not None)


def test_a_tensor_that_nobody_has_a_place_for_is_named(tmp_path: Path) -> None:
    ek.save({"state": {"a": torch.ones(2), "b": torch.ones(2)}}, tmp_path / "it", placement="packed")
    own = {"a": torch.zeros(2)}
    with pytest.raises(StateMismatch, match=r"extra/state/b: unexpected"):
        ek.load({"state": own}, tmp_path / "it")
    assert ek.load({"state": own}, tmp_path / "it", strict="missing").skipped
    assert torch.equal(own["a"], torch.ones(2))


def damaged(folder: Path, at: int) -> str:
    (pack,) = (folder / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[at] ^= 0x40
    pack.write_bytes(data)
    return pack.name


@pytest.mark.parametrize("length", [256, 70_000])
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, length: int) -> None:
    names = [f"t{k:02}" for k in range(12)]
    ek.save({"state": {name: torch.full((length,), 1.0) for name in names}}, tmp_path / "it", placement="packed")
    size = -(-length * 4 // 64) * 64
    pack = damaged(tmp_path / "it", size * 7 + 11)
    own = {name: torch.zeros(length) for name in names}
    with pytest.raises(ChecksumMismatch) as caught:
        ek.load({"state": own}, tmp_path / "it")
    assert f"packs/{pack}: block 0 of piece [0:{length}] of array extra/state/t07" in caught.value.message
    assert "is now undefined" in caught.value.message
    one = ek.open(tmp_path / "it")
    wanted = next(id_ for id_ in one.records if id_.name == "t07")
    with pytest.raises(ChecksumMismatch) as alone:
        one.read(wanted)
    assert caught.value.message.startswith(alone.value.message)
    ek.load({"state": own}, tmp_path / "it", verify="off")
    assert sum(int((tensor != 1.0).sum()) for tensor in own.values()) == 1


def test_a_pack_that_is_gone_is_named_before_anything_changes(tmp_path: Path) -> None:
    ek.save({"state": {f"t{k}": torch.ones(256) for k in range(9)}}, tmp_path / "it", placement="packed")
    (pack,) = (tmp_path / "it" / "packs").iterdir()
    pack.unlink()
    own = {f"t{k}": torch.zeros(256) for k in range(9)}
    with pytest.raises(MissingFile, match=rf"{pack.name}.*it holds array extra/state/t0"):
        ek.load({"state": own}, tmp_path / "it")
    assert not any(tensor.any() for tensor in own.values())


def test_memory_that_a_library_freed_is_refused_as_ever(tmp_path: Path) -> None:
    ek.save({"state": {"a": torch.ones(8), "b": torch.ones(8)}}, tmp_path / "it", placement="packed")
    own = {"a": torch.zeros(8), "b": torch.zeros(8)}
    own["b"].untyped_storage().resize_(0)
    with pytest.raises(CheckpointError, match="has elements and no memory"):
        ek.load({"state": own}, tmp_path / "it")
    assert not own["a"].any()


@given(
    st.lists(st.sampled_from([1, 7, 64, 1000]), min_size=1, max_size=40),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_scattered_copies_go_where_they_belong_and_nowhere_else(lengths: list[int], gap: int, random: Any) -> None:
    source = np.frombuffer(random.randbytes(sum(lengths) + gap * len(lengths)), dtype=np.uint8)
    low = np.cumsum([0, *(length + gap for length in lengths[:-1])])
    spare = np.zeros(len(source), dtype=np.uint8)
    places = list(range(len(lengths)))
    random.shuffle(places)
    at = np.zeros(len(lengths), dtype=np.int64)
    end = 0
    for place in places:
        at[place], end = end, end + lengths[place] + gap
    scatter(source.data, low, np.array(lengths), at + spare.ctypes.data)
    expected = np.zeros(len(source), dtype=np.uint8)
    for length, begin, place in zip(lengths, low, at, strict=True):
        expected[place : place + length] = source[begin : begin + length]
    assert spare.tobytes() == expected.tobytes()


def test_many_copies_of_one_length_are_one_call() -> None:
    count, length = 8 * FEW, 24
    source, own = np.arange(count * length, dtype=np.uint8), [np.zeros(length, dtype=np.uint8) for _ in range(count)]
    address = np.array([one.ctypes.data for one in own])
    scatter(source.data, np.arange(count) * length, np.full(count, length), address)
    assert b"".join(map(bytes, own)) == source.tobytes()
