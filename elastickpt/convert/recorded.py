"""The contents of a universal checkpoint, and the layout that it carries. Reads records only."""

from __future__ import annotations

from elastickpt.convert.contents import Array, Contents, Laid, NameGroups
from elastickpt.convert.nodes import Recorded
from elastickpt.foreign.listing import NotCarried
from elastickpt.format.tables import rows_of
from elastickpt.language import tree as t
from elastickpt.language.orders import written_groups
from elastickpt.language.parse import parse
from elastickpt.language.rules import resolve, sizes_of
from elastickpt.loading.opened import Opened


def recorded_contents(opened: Opened) -> Contents:
    """All that a universal checkpoint carries; per-rank values are not, and are named. Raises Damaged kinds, ProgramFault."""
    manifest = opened.manifest
    arrays = {}
    for identity, record in opened.records.items():
        attributes = dict(record.attributes)
        true = attributes.pop("true_shape", None)
        shape = tuple(true) if isinstance(true, list | tuple) else None
        arrays[identity] = Array(identity, Recorded(record), shape, tuple(attributes.items()))
    tables = opened.tables
    lost: list[NotCarried] = []
    for writer in range(len(manifest.fragments)):
        lost.extend(NotCarried(pointer, f"a value of rank {writer} alone") for pointer in opened.per_rank(writer))
    values = manifest.values if isinstance(manifest.values, dict) else {}
    return Contents(
        arrays=arrays,
        rows={table.item: rows_of(table) for table in tables},
        values=dict(values),
        items=manifest.items,
        step=manifest.step,
        tied=manifest.tied,
        layout=laid_by(manifest.layout_text),
        orders=orders_in(manifest.layout_text),
        layout_text=manifest.layout_text,
        not_carried=tuple(lost),
    )


def orders_in(text: str | None) -> dict[str, NameGroups]:
    """The orders that a `layout_text` writes out."""
    statements = parse(text, name="layout_text").statements if text is not None else ()
    return {one.name: written_groups(one) for one in statements if isinstance(one, t.Order) and isinstance(one.by, t.Names)}


def laid_by(text: str | None) -> Laid | None:
    """The program of a checkpoint's `layout_text`, with its constants and sizes."""
    if text is None:
        return None
    program = parse(text, name="layout_text")
    sizes = sizes_of(program)
    return Laid(program, resolve(program, {}, sizes).scope.constants, sizes)
