"""Random streams go on exactly on the same layout; on another, equal ones stay equal and others are seeded anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from memory_checkpoint import MemoryCheckpoint

from elastickpt.errors import Malformed
from elastickpt.format.encode_values import typed_key
from elastickpt.training.capture import capture
from elastickpt.training.listing import Binding
from elastickpt.training.restore import bind, hold_models
from elastickpt.training.rng import RNG, streams


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state())
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    numpy.random.set_state(before[2])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def draw() -> list[float]:
    """Some numbers of every stream, also what a stream has put aside (the second of a pair of normals)."""
    return [
        *torch.rand(3).tolist(),
        torch.randn(1).item(),
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.standard_normal(),
    ]


def saved_on(*seeds: int, step: int = 5) -> MemoryCheckpoint:
    captures = []
    for rank, seed in enumerate(seeds):
        seed_all(seed)
        draw()
        captures.append(capture({"rng": RNG()}, rank=rank, world_size=len(seeds), declared=None))
    return MemoryCheckpoint(captures, step=step)


def bound(checkpoint: MemoryCheckpoint, rank: int, world_size: int) -> Binding:
    listing = checkpoint.listing(world_size=world_size)
    return bind(hold_models({"rng": RNG()}, rank=rank, world_size=world_size, declared=None), listing)


def drawn_after(checkpoint: MemoryCheckpoint, rank: int, world_size: int) -> list[float]:
    binding = bound(checkpoint, rank, world_size)
    seed_all(999)
    checkpoint.fill(binding)
    return draw()


def expected_after(seed: int) -> list[float]:
    seed_all(seed)
    draw()
    return draw()


def test_capture_and_bind_draw_nothing() -> None:
    checkpoint = saved_on(1)
    before = typed_key(streams())
    capture({"rng": RNG()}, rank=0, world_size=1, declared=None)
    bound(checkpoint, 0, 1)
    assert typed_key(streams()) == before


def test_each_rank_goes_on_exactly_on_the_same_layout() -> None:
    checkpoint = saved_on(1, 2)
    assert drawn_after(checkpoint, 1, 2) == expected_after(2)
    assert drawn_after(checkpoint, 0, 2) == expected_after(1)
    assert bound(checkpoint, 0, 2).notes == ()


def test_only_the_own_values_are_read_on_the_same_layout() -> None:
    checkpoint = saved_on(1, 2, 3)
    bound(checkpoint, 2, 3)
    assert set(checkpoint.reads) == {2}


def test_the_seed_is_restored_too() -> None:
    checkpoint = saved_on(41)
    drawn_after(checkpoint, 0, 1)
    assert torch.initial_seed() == 41


def test_equal_streams_stay_equal_on_another_layout() -> None:
    checkpoint = saved_on(7, 7)
    for rank in range(3):
        assert drawn_after(checkpoint, rank, 3) == expected_after(7)
        assert bound(checkpoint, rank, 3).notes == ()


def test_unequal_streams_are_seeded_anew_and_the_load_says_so() -> None:
    checkpoint = saved_on(7, 8)
    drawn = [drawn_after(checkpoint, rank, 3) for rank in range(3)]
    assert drawn == [drawn_after(checkpoint, rank, 3) for rank in range(3)]
    firsts = [numbers[0] for numbers in drawn]
    assert len({*firsts, expected_after(7)[0], expected_after(8)[0]}) == 5
    kinds = [note.removeprefix("/rng: the random stream of ").split()[0] for note in bound(checkpoint, 0, 3).notes]
    assert kinds == ["torch", "python", "numpy"]
    assert drawn_after(saved_on(7, 8, step=6), 0, 3) != drawn[0]


def test_the_stream_of_one_process_goes_on_on_the_first_rank_only() -> None:
    checkpoint = saved_on(7)
    drawn = [drawn_after(checkpoint, rank, 3) for rank in range(3)]
    assert drawn[0] == expected_after(7)
    assert drawn == [drawn_after(checkpoint, rank, 3) for rank in range(3)]
    assert len({numbers[0] for numbers in drawn}) == 3
    for rank in range(3):
        assert ["that of one process: rank 0 goes on with it" in note for note in bound(checkpoint, rank, 3).notes] == [
            True
        ] * 3
    assert bound(checkpoint, 0, 1).notes == ()


def test_kinds_are_judged_each_by_itself() -> None:
    captures = []
    for rank in range(2):
        seed_all(7)
        torch.manual_seed(rank)
        captures.append(capture({"rng": RNG()}, rank=rank, world_size=2, declared=None))
    checkpoint = MemoryCheckpoint(captures)
    (note,) = bound(checkpoint, 0, 1).notes
    assert "stream of torch" in note
    seed_all(7)
    expected = random.random()
    seed_all(9)
    checkpoint.fill(bound(checkpoint, 0, 1))
    assert random.random() == expected


def test_streams_that_the_checkpoint_lacks_are_missing() -> None:
    checkpoint = MemoryCheckpoint([capture({"step": 1}, rank=0, world_size=1, declared=None)])
    assert [(m.name, m.what) for m in bound(checkpoint, 0, 1).mismatches] == [("/rng", "missing")]


@pytest.mark.parametrize("damage", [lambda v: None, lambda v: {"seed": 1}, lambda v: {**v, "seed": "x"}])
def test_streams_of_a_wrong_form_are_malformed(damage: Callable[[Any], object]) -> None:
    checkpoint = saved_on(1)
    checkpoint.per_rank[0]["/rng"] = damage(checkpoint.per_rank[0]["/rng"])
    with pytest.raises(Malformed):
        bound(checkpoint, 0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_stream_goes_on_exactly() -> None:
    torch.cuda.manual_seed(3)
    checkpoint = MemoryCheckpoint([capture({"rng": RNG()}, rank=0, world_size=1, declared=None)])
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(4)
    checkpoint.fill(bound(checkpoint, 0, 1))
    assert torch.equal(torch.rand(4, device="cuda"), expected)
