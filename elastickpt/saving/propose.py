"""What one rank proposes to save: its live state and its structure table. No I/O, nothing asked of other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastickpt.format.encode_values import value_digest
from elastickpt.format.values import Value
from elastickpt.saving.merge_values import settings_of
from elastickpt.saving.messages import TABLE_PREFIX
from elastickpt.saving.structures import KNOWN, EncodedTable
from elastickpt.training.capture import capture
from elastickpt.training.held import LiveState
from elastickpt.training.meshes import mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """`live` shares memory with training in its arrays only: all else is a copy. `table` is its structure table."""

    live: LiveState
    table: EncodedTable

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
        return {TABLE_PREFIX + self.table.digest: {table.item: settings_of(table) for table in self.live.tables}}


def propose(state: Mapping[str, object], mesh: DeviceMesh | None, *, rank: int, world_size: int) -> Proposal:
    """Captures the state as it is now. Raises what `capture` raises, and ValueNotCarried for a name that cannot be carried."""
    declared = None if mesh is None else mesh_of(mesh, world_size=world_size)
    live = capture(state, rank=rank, world_size=world_size, declared=declared)
    return Proposal(live, KNOWN.table_of(live))
