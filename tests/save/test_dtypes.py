"""Every element type, shape and stride: what was saved is what comes back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import elastickpt as ek
from elastickpt.errors import LayoutUnsupported, StateMismatch
from elastickpt.format.arrays import ArrayId
from elastickpt.training.elements import host_elements

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
SHAPES = ((), (1,), (0,), (3, 0, 2), (7,), (3, 5), (2, 3, 4), (1, 1, 9))


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in C order, as they lie in memory."""
    return host_elements(tensor.detach()).tobytes()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, so NaNs of every payload, infinities, subnormals and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def test_every_type_and_shape_round_trips_bitwise(tmp_path: Path) -> None:
    saved = {
        str(dtype): {str(number): random_bits(dtype, shape, seed=number) for number, shape in enumerate(SHAPES)}
        for dtype in DTYPES
    }
    ek.save({"arrays": saved}, tmp_path / "c")
    live = {name: {key: torch.zeros_like(tensor) for key, tensor in of.items()} for name, of in saved.items()}
    own = {name: dict(of) for name, of in live.items()}
    ek.load({"arrays": live}, tmp_path / "c")
    opened = ek.open(tmp_path / "c")
    for name, of in saved.items():
        for key, tensor in of.items():
            assert live[name][key] is own[name][key]
            assert bits(live[name][key]) == bits(tensor), (name, key)
            read = opened.read(ArrayId("extra", "arrays", f"{name}/{key}", ""))
            assert (read.shape, read.tobytes()) == (tuple(tensor.shape), bits(tensor)), (name, key)
            assert f"torch.{read.dtype}" == name
    assert opened.verify().sound


def test_payloads_of_nan_and_negative_zero_survive(tmp_path: Path) -> None:
    """What a round trip through float would change: signalling NaNs, payloads, the sign of zero."""
    words = torch.tensor([0x7F800001, 0x7FC00000, -0x800000 + 1, -0x80000000, 0x7FFFFFFF, 1], dtype=torch.int32)
    halves = torch.tensor([0x7F81, 0x7FC0, -0x8000, 0x7FFF, 1], dtype=torch.int16)
    state = {"f": words.view(torch.float32), "b": halves.view(torch.bfloat16), "h": halves.view(torch.float16)}
    ek.save(state, tmp_path / "c")
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    ek.load(live, tmp_path / "c")
    assert torch.equal(live["f"].view(torch.int32), words)
    assert torch.equal(live["b"].view(torch.int16), halves)
    assert torch.equal(live["h"].view(torch.int16), halves)


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of an (8, 6, 10) tensor that are not contiguous, each over memory of its own."""
    return {
        "transposed": base.clone().permute(2, 0, 1),
        "columns": base.clone()[:, 1:5, 2:9],
        "stepped": base.clone()[::2, ::3, 1::4],
        "last": base.clone()[..., 3],
        "flat": base.clone().reshape(-1)[5:77:3],
        "behind": base.clone()[3:],
        "channels": base.clone().unsqueeze(0).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.bool])
def test_sources_and_destinations_of_any_strides(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = views(random_bits(dtype, (8, 6, 10)))
    ek.save({"views": saved}, tmp_path / "c")
    bases = {key: torch.zeros_like(tensor) for key, tensor in saved.items()}
    strided = views(torch.zeros(8, 6, 10, dtype=dtype))
    for live in (bases, strided):
        ek.load({"views": live}, tmp_path / "c")
        for key, tensor in saved.items():
            assert bits(live[key]) == bits(tensor), key


def test_what_lies_beside_a_view_is_not_touched(tmp_path: Path) -> None:
    ek.save({"v": torch.ones(4, 3)}, tmp_path / "c")
    base = torch.full((8, 9), 5.0)
    ek.load({"v": base[::2, ::3]}, tmp_path / "c")
    expected = torch.full((8, 9), 5.0)
    expected[::2, ::3] = 1.0
    assert torch.equal(base, expected)


def test_an_expanded_tensor_is_saved_whole_and_loads_where_its_elements_agree(tmp_path: Path) -> None:
    expanded = torch.arange(3.0).unsqueeze(1).expand(3, 4)
    ek.save({"t": expanded}, tmp_path / "c")
    plain = torch.zeros(3, 4)
    ek.load({"t": plain}, tmp_path / "c")
    assert torch.equal(plain, expanded)
    live = torch.zeros(3, 1).expand(3, 4)
    ek.load({"t": live}, tmp_path / "c")
    assert torch.equal(live, expanded)


def test_an_expanded_destination_refuses_elements_that_differ(tmp_path: Path) -> None:
    """Its elements share memory, so it cannot hold what was saved; it must not hold the last of it silently."""
    ek.save({"t": torch.arange(12.0).reshape(3, 4)}, tmp_path / "c")
    live = torch.full((3, 1), 7.0).expand(3, 4)
    with pytest.raises((StateMismatch, LayoutUnsupported), match=r"extra/t.*share"):
        ek.load({"t": live}, tmp_path / "c")


@pytest.mark.parametrize("requires_grad", [True, False])
def test_leaves_of_autograd_are_filled_in_place(tmp_path: Path, requires_grad: bool) -> None:
    ek.save({"t": torch.ones(3, requires_grad=True)}, tmp_path / "c")
    live = torch.zeros(3, requires_grad=requires_grad)
    version = live._version
    ek.load({"t": live}, tmp_path / "c")
    assert torch.equal(live.detach(), torch.ones(3))
    assert live.requires_grad is requires_grad
    assert live.grad_fn is None
    assert live._version >= version
