"""Folders of attempts go. [RUN-71]"""

from __future__ import annotations

from elastickpt.errors import MissingFile
from elastickpt.ledger.names import SWEPT, AttemptId
from elastickpt.ledger.steps import NOW, Steps
from elastickpt.storage.store import Store


def remove_folder(store: Store, attempt: AttemptId) -> Steps[None]:
    """The folder of an attempt that does not count is gone. First its name, at once, so that no late writer adds to it."""
    swept = attempt.folder + SWEPT
    yield NOW
    store.remove_tree(swept)  # of a removal that was interrupted
    yield NOW
    try:
        store.rename(attempt.folder, swept)
    except MissingFile:
        return
    yield NOW
    store.remove_tree(swept)
