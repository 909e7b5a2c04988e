"""Whether the ranks that load hold now what the ranks that saved held, as far as both sides have the same models.

Values of a rank's own (random streams, loaders, per-rank states) go back to the ranks that had them only then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from elastickpt.format.arrays import ArrayId
from elastickpt.loading.opened import Opened, is_converted
from elastickpt.training.held import HeldArray


def lies_as_saved(opened: Opened, held: Sequence[HeldArray]) -> bool:
    """Whether meshes and placements of a rank that holds `held` of models are the writers': those of the arrays that both sides
    have; where there are none, the meshes at least."""
    manifest = opened.manifest
    if is_converted(opened):  # no rank stood anywhere
        return False
    both = [(array, opened.records[array.spec.id]) for array in held if array.spec.id in opened.records]
    if not both:
        return {array.mesh for array in held} <= {None, *manifest.meshes}
    for array, record in both:
        layout = None if record.layout is None else manifest.layouts[record.layout]
        saved = (None, ()) if layout is None else (manifest.meshes[layout.mesh], layout.placements)
        if (array.mesh, array.placements) != saved:
            return False
    return True


def lacking_of(opened: Opened, ids: Collection[ArrayId], writer: int) -> Iterator[ArrayId]:
    """Parameters and buffers of which `writer` stored something, and a rank that holds `ids` has nothing, of models that it
    has."""
    items = {identity.item for identity in ids} & {item.name for item in opened.manifest.items if item.kind == "module"}
    for identity in (record.spec.id for record in opened.stored_by(writer, items)) if items else ():
        if identity.item in items and identity.section == "params" and identity.state == "value" and identity not in ids:
            yield identity
