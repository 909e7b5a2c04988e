"""`RUN/latest`, a symbolic link for people: it names the folder of the newest checkpoint. Nothing here follows it. [RUN-58]"""

from __future__ import annotations

from elastickpt.ledger.branch import entries_of
from elastickpt.ledger.names import LATEST, AttemptId
from elastickpt.ledger.steps import NOW, Steps
from elastickpt.ledger.stored import read_view
from elastickpt.storage.links import replace_link
from elastickpt.storage.store import Store


def point_latest(store: Store) -> Steps[AttemptId | None]:
    """The link names the newest checkpoint of the live branch that stands, as of now; without one there is no link.

    For after a commit, a start, a removal. Returns what it names; None also where the store has no links, or something that is
    no link has the name, which stays. Raises StorageFailed kinds, which cost nobody anything, Damaged kinds as reading a run.
    """
    entries = entries_of((yield from read_view(store)))
    newest = next((one.id for one in entries if one.state == "live" and one.commit is not None), None)
    yield NOW
    linked = replace_link(store, LATEST, None if newest is None else newest.folder)
    return newest if linked else None
