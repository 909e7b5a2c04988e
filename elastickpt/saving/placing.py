"""Whether the files of a save are chunks or packs, and why. Decided by member 0, from what was asked for and what its store can
do; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastickpt.errors import PlacementUnsupported
from elastickpt.format.records import Placement
from elastickpt.saving.request import PlacementChoice
from elastickpt.storage.kernel import ONE_SIDED
from elastickpt.storage.store import Store

MANY_PARTS = 5_000  # pairs of a writer and a file: from here on `auto` makes packs

PlacementRule = Literal["plain", "packed", "by number"]


@dataclass(frozen=True, slots=True)
class Placing:
    """By which rule the placement follows: "by number" of the pairs of a writer and a file. `why`: of packs that nobody asked
    for."""

    rule: PlacementRule
    why: str = ""

    def placement(self, file_parts: int) -> Placement:
        """Where plain placement would have so many pairs."""
        return self.rule if self.rule != "by number" else "packed" if file_parts >= MANY_PARTS else "plain"

    def note(self, file_parts: int) -> str:
        """What is to be said of it; "" for nothing."""
        if self.rule == "by number" and self.placement(file_parts) == "packed":
            return f"placement 'packed', as 'plain' would make {file_parts} pairs of a writer and a file"
        return f"placement 'packed', as {self.why}" if self.why else ""


PLAIN = Placing("plain")


def choose(asked: PlacementChoice, store: Store, *, ranks: int, hosts: int) -> Placing:
    """The rule for a save by so many ranks on so many hosts. Raises PlacementUnsupported where there is none."""
    able = store.capabilities
    if not able.no_replace_rename:
        raise PlacementUnsupported(
            f"{store.url} ({able.name}): expected a store with a rename that replaces nothing, by which a checkpoint comes to "
            "exist at once or not at all; other stores are not supported yet"
        )
    against = _against_plain(store, ranks=ranks, hosts=hosts)
    if asked == "packed":
        return Placing("packed")
    if asked == "auto":
        why = against or _against_auto(store)
        if why:
            return Placing("packed", f"{store.url}: {why}")
        return Placing("by number")
    if against:
        raise PlacementUnsupported(f"{store.url}: {against}; choose placement 'packed'")
    return Placing("plain")


def _against_auto(store: Store) -> str:
    """Why `auto` makes packs there, although plain placement is possible; "" if it does not."""
    able = store.capabilities
    if able.name in ONE_SIDED:
        return f"files on file system {able.name!r} must not be filled from several sides"
    if able.name.startswith("0x") and not able.directory_sync:
        return f"file system {able.name} is not known, and cannot sync a folder"
    return ""


def _against_plain(store: Store, *, ranks: int, hosts: int) -> str:
    """Why several writers cannot fill one file there; "" if they can."""
    able = store.capabilities
    if not able.ranged_writes:
        return f"{ranks} rank{'s' if ranks > 1 else ''} cannot fill ranges of one file on {able.name!r}"
    if hosts > 1 and not able.shared_by_hosts:
        return (
            f"ranks on {hosts} hosts write over file system {able.name!r}, which is not on the list of those where hosts may "
            "fill one file together (lustre, gpfs)"
        )
    return ""
