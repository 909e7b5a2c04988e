"""The state that everyone saves: transformer-shaped parameters with Adam's moments, and many small tensors.

Contents are a function of (array, position in the whole), so a load at any layout can be checked without a second copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

State = dict[str, dict[str, torch.Tensor]]
ITEMS = ("model", "exp_avg", "exp_avg_sq")
LAYERS, VOCABULARY = 12, 8192
SMALL_TENSORS, SMALL_ELEMENTS = 10_000, 256  # 1 KiB each in float32
_MULTIPLIER, _MASK = 2_654_435_761 - (1 << 32), (1 << 24) - 1  # below 2**24 every value is exact in float32
_BLOCK = 1 << 18  # elements that are made at once, in the core's cache


@dataclass(frozen=True, slots=True)
class Piece:
    """One local tensor and where its first element lies in the whole array, counted in elements."""

    array: int
    local: torch.Tensor
    start: int


def shapes_for(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a LLaMA-like model whose float32 parameters and two Adam moments take about `nbytes`."""
    wanted = nbytes / (4 * len(ITEMS))
    a, b = 12 * LAYERS, 2 * VOCABULARY  # parameters = a * width**2 + b * width, nearly
    width = max(8, round((-b + math.sqrt(b * b + 4 * a * wanted)) / (2 * a) / 8) * 8)
    hidden = round(width * 8 / 3)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, width)}
    for layer in range(LAYERS):
        name = f"layers.{layer}."
        shapes |= {f"{name}attention.{which}.weight": (width, width) for which in ("q", "k", "v", "o")}
        shapes |= {f"{name}mlp.{which}.weight": (hidden, width) for which in ("gate", "up")}
        shapes[f"{name}mlp.down.weight"] = (width, hidden)
        shapes |= {f"{name}{which}.weight": (width,) for which in ("attention_norm", "mlp_norm")}
    shapes["norm.weight"] = (width,)
    shapes["head.weight"] = (VOCABULARY, width)
    return shapes


def rows_of(extent: int, *, rank: int, ranks: int) -> tuple[int, int]:
    """The rows [start, stop) that `torch.chunk` gives to `rank`; empty at the end where it runs out."""
    step = -(-extent // ranks)
    return min(rank * step, extent), min((rank + 1) * step, extent)


def sharded_state(nbytes: int, mesh: DeviceMesh) -> State:
    """Parameters and moments as DTensors of Shard(0) over the one-dimensional `mesh`, as FSDP2 holds them; zeros."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    state: State = {}
    for item in ITEMS:
        state[item] = {}
        for name, shape in shapes_for(nbytes).items():
            start, stop = rows_of(shape[0], rank=rank, ranks=ranks)
            local = torch.zeros((stop - start, *shape[1:]))
            stride = torch.empty(shape, device="meta").stride()
            state[item][name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
    return state


def small_state(*, rank: int, ranks: int) -> State:
    """This rank's share of 10,000 plain tensors of 1 KiB, each on one rank only, as pipeline stages hold theirs; zeros."""
    start, stop = rows_of(SMALL_TENSORS, rank=rank, ranks=ranks)
    return {f"stage_{rank}": {f"tensor_{index:05d}": torch.zeros(SMALL_ELEMENTS) for index in range(start, stop)}}


def pieces(state: State) -> Iterator[Piece]:
    """Every local tensor of the state with its place in the whole array."""
    for item in sorted(state):
        for name, tensor in state[item].items():
            array = sum(ord(letter) * (at + 1) for at, letter in enumerate(f"{item}/{name}"))
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                first, _ = rows_of(tensor.shape[0], rank=mesh.get_local_rank(), ranks=mesh.size())
                yield Piece(array, tensor.to_local(), first * math.prod(tensor.shape[1:]))
            else:
                yield Piece(array, tensor, 0)


def local_nbytes(state: State) -> int:
    """Bytes that this rank holds."""
    return sum(piece.local.nbytes for piece in pieces(state))


def fill(state: State) -> None:
    """Give every element its expected value."""
    for piece in pieces(state):
        for part, expected in _parts(piece):
            part.copy_(expected)


def clear(state: State) -> None:
    """Set every element to zero, so that a load that leaves something out is seen."""
    for piece in pieces(state):
        piece.local.zero_()


def wrong_pieces(state: State) -> int:
    """How many local tensors differ from what `fill` puts there."""
    return sum(any(not torch.equal(part, expected) for part, expected in _parts(piece)) for piece in pieces(state))


def _parts(piece: Piece) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of a local tensor, and what each should hold: (number of the element × multiplier) modulo 2**24."""
    numbers = torch.arange(min(_BLOCK, piece.local.numel()), dtype=torch.int32)
    flat = piece.local.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        part = flat[start : start + _BLOCK]
        first = (piece.start + start + piece.array * 7919 + 1) & _MASK
        expected = numbers[: part.numel()].add(first).mul_(_MULTIPLIER)  # modulo 2**32
        yield part, expected.bitwise_and_(_MASK).to(torch.float32)
