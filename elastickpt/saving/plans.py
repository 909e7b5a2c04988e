"""The plans that a rank knows: by the digest of its own table, so that it can stage without asking anybody."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from elastickpt.commit.contents import encode_outline
from elastickpt.saving.agree import KNOWN_STRUCTURES, Agreed, Structure
from elastickpt.saving.outline import records_of
from elastickpt.writer.plans import documents_of
from elastickpt.writer.prepared import Prepared, prepare


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A structure of the job, `id`, and what this rank makes of it. The encoded outline on the committer, else empty."""

    id: str
    structure: Structure
    prepared: Prepared
    encoded_outline: bytes


class Plans:
    """Of this rank's tables the newest ones, each with the job's structure of which it was a part last."""

    def __init__(self, *, arena_nbytes: int | None) -> None:
        self._arena_nbytes = arena_nbytes
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._changing = threading.Lock()

    def of(self, table: str) -> Known | None:
        """The plan by which a state with this table is staged; None if other ranks must be asked."""
        with self._changing:
            return self._known.get(table)

    def learn(self, table: str, agreed: Agreed) -> Known:
        """The plan for what the ranks agreed on. Raises LimitExceeded for an arena in which it cannot go."""
        known = self.of(table)
        if known is None or known.id != agreed.id:
            structure = agreed.structure
            records = records_of(agreed.live.arrays, structure.shared)
            prepared = prepare(structure.plan, documents_of(structure.plan, records), arena_nbytes=self._arena_nbytes)
            outline = structure.outline
            known = Known(agreed.id, structure, prepared, b"" if outline is None else encode_outline(outline))
        with self._changing:
            self._known[table] = known
            self._known.move_to_end(table)
            while len(self._known) > KNOWN_STRUCTURES:
                self._known.popitem(last=False)
        return known

    def forget(self, table: str) -> None:
        """The job has another structure by now: the next save with this table asks."""
        with self._changing:
            self._known.pop(table, None)
