"""The table of other libraries' objects: torch's own optimizers go through it, and each verdict can come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tools.clients.case import Case, Job, Life, batch, digest, looped, model, states_of, train
from tools.clients.lives import cases_of, row
from tools.clients.table import markdown


def job(optimizer: Callable[[Any], Any], *, state: Callable[[Any, Any], dict[str, Any]]) -> Case:
    def make(_: int) -> Job:
        net = model()
        made = optimizer(net)
        return Job(state(net, made), train(net, made), lambda: (net.state_dict(), states_of(made)))

    return Case("ours", "a case", looped(make))


def adam(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters())


def test_what_is_saved_whole_goes_on_bit_for_bit() -> None:
    assert row(job(adam, state=lambda net, made: {"model": net, "optimizer": made}), 1).verdict == "bit for bit"


def test_what_is_saved_in_part_differs() -> None:
    assert row(job(adam, state=lambda net, made: {"model": net}), 1).verdict == "differs"


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    found = row(job(adam, state=lambda net, made: {"model": net, "other": object()}), 1)
    assert found.verdict == "refused"
    assert found.why.startswith("save: ValueNotCarried: value /other")


def test_what_does_not_train_alike_twice_is_not_tried() -> None:
    def make(_: int) -> Job:
        net = torch.nn.Linear(16, 16)
        torch.seed()
        return Job({"model": net}, lambda step: torch.nn.init.normal_(net.weight), lambda: net.state_dict())

    found = row(Case("ours", "random", looped(make)), 1)
    assert (found.verdict, found.why) == ("not tried", "two runs of it without a stop differ")


def test_what_ends_by_an_error_of_its_own_is_not_tried() -> None:
    def run(life: Life) -> object:
        raise ValueError(f"no {life.kind}")

    assert row(Case("ours", "broken", run), 1).why == "does not train here: ValueError: no whole"


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_torchs_own_optimizers_are_cases(name: str) -> None:
    assert row(next(case for case in cases_of("torch") if case.name == name), 1).verdict == "bit for bit"


def test_a_digest_sees_every_bit_and_no_order_of_keys() -> None:
    one = {"a": torch.ones(2), "b": [1, torch.zeros(1)]}
    assert digest(one) == digest({"b": [1, torch.zeros(1)], "a": torch.ones(2)})
    assert digest(one) != digest({"a": torch.ones(2), "b": [1, -torch.zeros(1)]})
    assert digest(torch.ones(2, 3)) != digest(torch.ones(3, 2))
    assert digest(batch(1)) != digest(batch(2))


def test_the_table_has_what_did_not_resume_first() -> None:
    rows = [row(job(adam, state=lambda net, made: {"model": net, "optimizer": made}), 1)]
    rows.append(row(job(adam, state=lambda net, made: {"model": net}), 1))
    lines = [line for line in markdown(rows).splitlines() if line.startswith("| ours")]
    assert [line.split(" | ")[3] for line in lines] == ["differs", "bit for bit"]
