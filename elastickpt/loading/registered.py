"""Whether the folder of a run's attempt is a checkpoint: its register says so, and no file in it. [RUN-55, RUN-63]"""

from __future__ import annotations

from elastickpt.errors import MissingFile, Uncommitted
from elastickpt.ledger.epochs import counts
from elastickpt.ledger.names import AttemptId, parse_folder
from elastickpt.ledger.records import Abort
from elastickpt.ledger.steps import Steps, complete
from elastickpt.ledger.stored import list_commits, newest_adopted, read_register
from elastickpt.storage.opening import place_in
from elastickpt.storage.store import Store


def registered_digest(store: Store, name: str) -> str | None:
    """The digest of the manifest in folder `name`, as its register says; None where `name` is no attempt of a run in `store`.

    Blocking; reads small objects only. Raises Uncommitted for an attempt that does not count, Damaged kinds for objects of the
    run that are not what was written.
    """
    found = parse_folder(name)
    if found is None:
        return None
    return complete(_digest(store, found[0], where=place_in(store, name), swept=found[1] == "swept"))


def _digest(store: Store, attempt: AttemptId, *, where: str, swept: bool) -> Steps[str | None]:
    listing = yield from list_commits(store)
    if not listing.newest:
        return None  # a copy that stands outside of its run
    if swept:
        raise Uncommitted(f"{where}: a checkpoint that is being removed")
    newest = yield from newest_adopted(store, listing, before=listing.newest + 1)
    if not counts(attempt, newest):
        known = "no epoch has adopted anything" if newest is None else f"epoch {newest.epoch} is the newest one"
        raise Uncommitted(f"{where}: an attempt that does not count in its run: {known}")
    try:
        register = yield from read_register(store, attempt)
    except MissingFile:
        raise Uncommitted(f"{where}: an attempt without a register in its run: never committed, or removed") from None
    if isinstance(register, Abort):
        raise Uncommitted(f"{where}: an attempt that its register calls aborted: {register.reason}")
    return register.digest
