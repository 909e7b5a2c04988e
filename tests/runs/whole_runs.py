"""Runs of real checkpoints, by whole jobs of one process; and ways to spoil them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from run_actors import tree

import elastickpt as ek
from elastickpt.errors import Refused
from elastickpt.ledger.branch import history
from elastickpt.ledger.names import parse_folder
from elastickpt.storage.opening import open_store
from elastickpt.storage.store import Store

OPTIONS = ek.RunOptions(signals={}, saving=ek.AsyncOptions(executor="thread"), orphans_s=0.0)
BOUND_S = 60.0


def weights(step: int) -> torch.Tensor:
    return torch.arange(50.0) * step


@dataclass
class Place:
    """A run somewhere, and jobs that use it."""

    root: str

    @property
    def store(self) -> Store:
        return open_store(self.root)

    def job(self, *steps: int, continues: int, keep: ek.Keep | None = None, expected_notes: int = 0) -> ek.Restored:
        """One whole job: restores, demands what stands there, saves these steps."""
        weight = torch.zeros(50)
        with ek.Run(self.root, {"w": weight}, keep=keep, options=OPTIONS) as run:
            found = run.restore()
            assert found.step == continues
            assert torch.equal(weight, weights(continues))
            assert len(found.notes) == expected_notes, found.notes
            for step in steps:
                weight.copy_(weights(step))
                run.save(step).result(BOUND_S)
        return found

    def lose(self, pattern: str) -> list[str]:
        """Removes the objects whose names match from `commits/`."""
        names = [one.name for one in self.store.entries("commits") if re.fullmatch(pattern, one.name)]
        for name in names:
            self.store.remove(f"commits/{name}")
        assert names
        return names

    @property
    def folders(self) -> list[str]:
        return [one.name for one in self.store.entries("") if parse_folder(one.name)]

    @property
    def entries(self) -> list[tuple[int, int, str]]:
        return [(one.step, one.epoch, one.state) for one in history(self.root)]

    def demand_refusal(self, *words: str) -> str:
        """A restore refuses, and has changed nothing at all."""
        before = tree(self.store)
        with (
            ek.Run(self.root, {"w": torch.zeros(50)}, options=OPTIONS) as run,
            pytest.raises(Refused) as refused,
        ):
            run.restore()
        assert tree(self.store) == before
        said = str(refused.value)
        for word in ("ek.load(", f"ckpt-convert adopt {self.root}", "ek.adopt(", "another root", *words):
            assert word in said
        return said


def flip(store: Store, path: str) -> None:
    data = bytearray(store.read(path, 1 << 20))
    data[len(data) // 2] ^= 1
    store.remove(path)
    store.create(path, bytes(data))
