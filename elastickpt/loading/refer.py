"""References to the chunks of a packed checkpoint, made anew from its records for readers of zarr. No torch. [UCF-161]"""

from __future__ import annotations

import os
from dataclasses import dataclass

from elastickpt.errors import Refused
from elastickpt.layout.references import references_of
from elastickpt.loading.opened import open_records
from elastickpt.storage.opening import path_in


@dataclass(frozen=True, slots=True)
class MadeReferences:
    """The text of the file, and the keys of arrays that are not in it, as a chunk of them lies in several packs."""

    text: str
    arrays: int
    left_out: tuple[str, ...]


def refer(path: str | os.PathLike[str], *, within: str) -> MadeReferences:
    """The references of the checkpoint at `path`, for a file in the folder `within`: the template of its own folder is ".", of
    any other one where the checkpoint is. Blocking for its records.

    Raises NotACheckpoint, Refused for a plain checkpoint, Damaged kinds.
    """
    opened = open_records(path)
    where = path_in(opened.store, opened.name)
    if opened.manifest.placement != "packed":
        raise Refused(f"{where}: expected a packed checkpoint, found a plain one: readers of zarr open it as it is")
    root = "." if os.path.abspath(within) == where else where
    made = references_of(tuple(opened.records.values()), opened.all_fragments(), root=root)
    return MadeReferences(made.text, len(opened.records) - len(made.left_out), made.left_out)
