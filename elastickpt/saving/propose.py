"""What one rank proposes to save: its live state and its structure table. No I/O, nothing asked of other ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastickpt.format.arrays import ArraySpec
from elastickpt.format.records import Item
from elastickpt.format.values import Value, value_digest
from elastickpt.saving.messages import TABLE_PREFIX
from elastickpt.saving.settings import settings_of
from elastickpt.saving.structure import encode_table, table_digest, table_of
from elastickpt.training.capture import capture
from elastickpt.training.held import HeldArray, LiveState
from elastickpt.training.meshes import mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """`live` shares memory with training in its arrays only: all else is a copy. `table` is the encoded structure table, and
    `digest` identifies it."""

    live: LiveState
    table: bytes
    digest: str

    def value_digests(self) -> tuple[tuple[str, str], ...]:
        """A digest of each replicated value, and one of the optimizer tables. Raises ValueNotCarried."""
        live = self.live
        values = [(pointer, value_digest(value, where=pointer)) for pointer, value in live.values.items()]
        return (
            *values,
            *((pointer, value_digest(table, where="optimizer settings")) for pointer, table in self.tables.items()),
        )

    @property
    def tables(self) -> Mapping[str, Value]:
        """The optimizer tables as a value, compared like one by ranks with one structure: by item, parameter and setting."""
        return {TABLE_PREFIX + self.digest: {table.item: settings_of(table) for table in self.live.tables}}


def propose(state: Mapping[str, object], mesh: DeviceMesh | None, *, rank: int, world_size: int) -> Proposal:
    """Captures the state as it is now. Raises what `capture` raises, and ValueNotCarried for a name that cannot be carried."""
    declared = None if mesh is None else mesh_of(mesh, world_size=world_size)
    live = capture(state, rank=rank, world_size=world_size, declared=declared)
    encoded, digest = _TABLES.of(live)
    return Proposal(live, encoded, digest)


class _Tables:
    """Encoded tables of the newest states. Arrays that a capture found as the one before have the same `spec` objects, each of
    which was made for one array lying in one way: states that have them all, and the same items and ties, have one table."""

    def __init__(self) -> None:
        self._known: deque[tuple[tuple[ArraySpec, ...], tuple[Item, ...], object, bytes, str]] = deque(maxlen=4)

    def of(self, live: LiveState) -> tuple[bytes, str]:
        for specs, items, tied, encoded, digest in tuple(self._known):
            if (items, tied) == (live.items, live.tied) and _are_those(live.arrays, specs):
                return encoded, digest
        encoded = encode_table(table_of(live))
        digest = table_digest(encoded)
        self._known.append((tuple(held.spec for held in live.arrays), live.items, live.tied, encoded, digest))
        return encoded, digest


def _are_those(arrays: Sequence[HeldArray], specs: Sequence[ArraySpec]) -> bool:
    return len(arrays) == len(specs) and all(held.spec is spec for held, spec in zip(arrays, specs, strict=True))


_TABLES = _Tables()
