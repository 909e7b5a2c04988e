"""What one member reads of a checkpoint by itself, which a job of another kind may have saved. [REC-66]"""

from __future__ import annotations

from collections.abc import Mapping

from elastickpt.errors import CheckpointError, StateMismatch
from elastickpt.loading.opened import open_records
from elastickpt.runs.loading import load_alone


class NoGood(Exception):
    """The source of the own stage cannot be used; the message says why."""


def read(state: Mapping[str, object], path: str) -> int:
    """Fills the state; the bytes read. Raises StateMismatch, with nothing changed, and NoGood."""
    try:
        return load_alone(state, path).read_nbytes
    except StateMismatch:
        raise
    except CheckpointError as error:
        raise NoGood(f"{path}: {error.message}") from error


def read_known(state: Mapping[str, object], path: str) -> int:
    """The same, of the items that the checkpoint has. Raises NoGood."""
    try:
        try:
            return read(state, path)
        except StateMismatch:
            lacking = lacking_in(state, path)
            if not lacking:
                raise
            return read(found, path) if (found := {item: state[item] for item in state.keys() - lacking}) else 0
    except StateMismatch as error:
        raise NoGood(f"{path}: {error.message}") from error


def lacking_in(state: Mapping[str, object], path: str) -> frozenset[str]:
    """The items of a state that a checkpoint lacks, and may lack. Raises StateMismatch for an optimizer under another name, and
    NoGood."""
    try:
        kinds = {item.name: item.kind for item in open_records(path).manifest.items}
    except CheckpointError as error:
        raise NoGood(f"{path}: {error.message}") from error
    found = frozenset(state) - kinds.keys() - {"model"}
    if "optimizer" in found and (others := sorted(item for item, kind in kinds.items() if kind == "optimizer")):
        raise StateMismatch(f"{path}: has an optimizer's state as {', '.join(map(repr, others))}; expected it as 'optimizer'")
    return found
