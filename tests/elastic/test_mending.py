"""What a stage is made of: optimizers' states of two stages, checkpoints that a plain job saved, buffers of live replicas."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import elastickpt as ek
from elastickpt.elastic.checkpoints import NoGood
from elastickpt.elastic.gradients import keep_buffers_equal
from elastickpt.elastic.history import History
from elastickpt.elastic.membership import Mend
from elastickpt.elastic.mending import Mending, mixed_moments
from elastickpt.elastic.messages import StageSource, View
from elastickpt.elastic.passage import Passing, flushes_of
from elastickpt.elastic.policy import Policy
from elastickpt.elastic.saves import NoSaves
from elastickpt.elastic.stages import Place, Stage
from elastickpt.elastic.starts import KeptBuffers
from elastickpt.elastic.tasks import Tasks
from elastickpt.errors import Refused, StateMismatch
from tests.elastic.small_model import build

PASSING = Passing(12)
OPTIMIZERS: list[Any] = [
    lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.NAdam(parameters),
    lambda parameters: torch.optim.Adafactor(parameters),
]


def trained(make: Any, parameter: nn.Parameter, seed: int) -> dict[str, Any]:
    optimizer, generator = make([parameter]), torch.Generator().manual_seed(seed)
    for _ in range(3):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return dict(optimizer.state.get(parameter, {}))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_moments_are_averaged_as_weights_are_and_counts_are_the_sources(make: Any, shape: tuple[int, ...]) -> None:
    """[REC-4, REC-58]"""
    parameter = nn.Parameter(torch.ones(shape))
    before, after = (trained(make, nn.Parameter(torch.ones(shape)), seed) for seed in (1, 2))
    mixed = mixed_moments(before, after, parameter, 0.3)
    assert mixed.keys() == before.keys()
    for key, one in mixed.items():
        if not isinstance(one, Tensor) or key in ("step", "mu_product"):
            assert one == before[key] == after[key]
        else:
            b, a = before[key].numpy(), after[key].numpy()
            assert np.array_equal(one.numpy(), np.float32(0.3) * b + np.float32(1.0 - 0.3) * a)
            assert one.data_ptr() != before[key].data_ptr()


def test_moments_that_a_source_lacks_are_not_made_up() -> None:
    parameter = nn.Parameter(torch.ones(2))
    some = trained(OPTIMIZERS[0], parameter, 1)
    assert mixed_moments({}, some, parameter, 0.5) == {} == mixed_moments(some, {}, parameter, 0.5)
    with pytest.raises(NoGood, match="differ"):
        mixed_moments(some, {"momentum_buffer": torch.ones(2)}, parameter, 0.5)
    with pytest.raises(NoGood, match="exp_avg"):
        mixed_moments(some, {**some, "exp_avg": torch.ones(3)}, parameter, 0.5)


def test_infinite_moments_make_no_source() -> None:
    stage = build(Place(1, 3), PASSING)
    first = stage.parameters("body")[0]
    stage.optimizer.state[first] = {"step": torch.tensor(1.0), "exp_avg": torch.full_like(first, torch.inf)}
    for optimizer, finite in (("reset", True), ("average", False)):
        given = Mending(stage, Policy(optimizer=optimizer), swap=None).given()  # type: ignore[arg-type]
        assert all(bool(torch.isfinite(one).all()) for one in given) is finite


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 0.5), (0.02, 0.02 * 0.9**3)])
def test_a_schedule_is_where_the_others_are_by_its_own_rate(rate: float, expected: float) -> None:
    """A stage that began as another one did has what that one has now, whoever changed it; else its own schedule has gone on
    by itself. [REC-58]"""
    stages = [build(Place(number, 3), PASSING) for number in (0, 1)]
    for stage, base in zip(stages, (0.01, rate), strict=True):
        stage.optimizer.param_groups[0].pop("initial_lr")
        stage.optimizer.param_groups[0]["lr"] = base
        stage.scheduler = torch.optim.lr_scheduler.MultiplicativeLR(stage.optimizer, lambda _: 0.9)
    other, mine = (Mending(stage, Policy(), swap=None) for stage in stages)
    stages[0].optimizer.param_groups[0]["lr"] = 0.5
    mine._keep_time(3, other._ticks())
    assert stages[1].optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert stages[1].scheduler.last_epoch == (0 if rate == 0.01 else 3)


# -- checkpoints of a plain job


def plain(folder: Path, *items: str, whole: Stage | None = None) -> tuple[str, Stage]:
    """A checkpoint of the whole model after some steps, with these items."""
    whole = whole or build(Place(0, 1), PASSING, layers=6)
    for _ in range(2):
        for parameter in whole.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        whole.optimizer.step()
    state = {"model": whole.module, "optimizer": whole.optimizer, "opt": whole.optimizer, "scheduler": whole.scheduler}
    path = str(folder / "plain")
    ek.save({item: state[item] for item in items}, path, step=7)
    return path, whole


@pytest.mark.parametrize("items", [("model",), ("model", "optimizer"), ("model", "optimizer", "scheduler")])
def test_a_checkpoint_of_a_plain_job_is_what_a_run_begins_with(
    tmp_path: Path, items: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """What it lacks begins as it was built, the scheduler at its step; that is said. [REC-66]"""
    path, whole = plain(tmp_path, *items)
    stage, history = build(Place(1, 3), PASSING, layers=6), History(5, {"gone": 1.1}, {0: 1.0}, [{"step": 1}])
    built = dict(stage.optimizer.param_groups[0])
    assert Mending(stage, Policy(), swap=None).load_all(path, 7, history) > 0
    expected = whole.module.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in stage.module.state_dict().items())
    assert history == History(5)
    assert all(f"no {item}" in caplog.text for item in {"optimizer", "scheduler", "elastic"} - {*items})
    moments = dict(stage.optimizer.state)
    assert len(moments) == (0 if "optimizer" not in items else len(list(stage.module.parameters())))
    if "scheduler" in items:
        assert stage.scheduler.state_dict() == whole.scheduler.state_dict()
    else:
        assert stage.scheduler.last_epoch == 7
    if "optimizer" not in items:
        assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(built["lr"] / 1.7)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """[REC-66]"""
    path, _ = plain(tmp_path, "model", "opt")
    stage = build(Place(1, 3), PASSING, layers=6)
    before = {name: one.clone() for name, one in stage.module.state_dict().items()}
    with pytest.raises(StateMismatch, match=r"'opt'.*expected it as 'optimizer'"):
        Mending(stage, Policy(), swap=None).load_all(path, 7, History())
    (tmp_path / "other").mkdir()
    path, _ = plain(tmp_path / "other", "model")
    larger = build(Place(2, 3), PASSING, layers=9)
    with pytest.raises(StateMismatch, match=r"layers\.6"):
        Mending(larger, Policy(), swap=None).load_all(path, 7, History())
    assert all(torch.equal(one, before[name]) for name, one in stage.module.state_dict().items())


def test_of_a_job_whose_stages_are_all_lost_the_checkpoint_tells(tmp_path: Path) -> None:
    """Nobody stands who could; that of one stage is lost with it. [REC-58, REC-60]"""
    path, lineage = str(tmp_path / "x"), [{"step": 1, "stage": 0, "rung": "stale", "generation": 2}]
    ek.save({"elastic": History(5, {"w": 1.1}, {0: 2.0}, lineage)}, path, step=2)  # type: ignore[arg-type]
    training: Any = type("T", (), {"seed": 7})()
    tasks = Tasks(type("J", (), {})(), training, NoSaves())  # type: ignore[arg-type]
    tasks._held = type("H", (), {"place": Place(0, 1)})()  # type: ignore[assignment]
    lost = Mend(View(1, 3, 4, ("m",), (0,)), (StageSource(0, "stale", path=path, step=2),), 1)
    tasks._hear_history(lost, exchange=None)  # type: ignore[arg-type]
    assert tasks.history == History(7, {"w": 1.1}, {0: 2.0}, lineage)  # type: ignore[arg-type]


# -- buffers of live replicas


class Counting(nn.Embedding):
    """Counts what it has seen; another buffer never changes."""

    def __init__(self) -> None:
        super().__init__(11, 8)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("fixed", torch.arange(4))


class Channel:
    """Links between threads."""

    def __init__(self, stage: int, stages: int, queues: dict[tuple[int, int], queue.Queue[Tensor]]) -> None:
        self.stage, self.stages, self._queues = stage, stages, queues
        self.sent = 0

    def send(self, tensor: Tensor, stage: int) -> Channel:
        self._queues[self.stage, stage].put(tensor.detach().clone())
        self.sent += tensor.numel()
        return self

    def wait(self) -> None:
        """It has gone."""

    def receive(self, tensor: Tensor, stage: int) -> None:
        tensor.copy_(self._queues[stage, self.stage].get(timeout=60.0))


@pytest.mark.parametrize(("swap", "step", "first"), [("microbatch", 1, 0), ("step", 0, 0), ("step", 1, 1)])
def test_a_buffer_of_a_replica_is_what_the_first_one_made_of_it(swap: Any, step: int, first: int) -> None:
    """Though each of both saw other microbatches; one that only the other one changed is put back. [REC-62]"""
    stages, passing = 4, Passing(4, swap=swap)
    queues: dict[tuple[int, int], queue.Queue[Tensor]] = {(a, b): queue.Queue() for a in range(4) for b in range(4)}
    embeds, links, kept = [Counting(), Counting()], [Channel(k, stages, queues) for k in range(2)], []
    order = flushes_of(passing, step=step, stages=stages)[0].order

    def one(number: int) -> None:
        embed = embeds[number]
        module = nn.ModuleDict({"embed": embed, "body": nn.Linear(2, 2)})
        stage = Stage(module, torch.optim.SGD(module.parameters(), lr=1), body=module["body"], embed=embed)
        before = KeptBuffers(module)
        kept.append(before)
        embed.seen = torch.full((3,), 10.0 + number)  # another tensor than before
        if number != first:
            embed.fixed += 1
        keep_buffers_equal(stage, Place(number, stages), order, links[number], before)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert [embed.seen.tolist() for embed in embeds] == [[10.0 + first] * 3] * 2
    assert [embed.fixed.tolist() for embed in embeds] == [[0, 1, 2, 3]] * 2
    assert [link.sent for link in links] == [(0, 5)[number == first] for number in range(2)]  # two flags, and what changed
    for before in kept:
        before.put_back()  # of a step that is not taken
    assert [embed.seen.tolist() for embed in embeds] == [[0.0] * 3] * 2


def test_a_buffer_with_a_replica_keeps_its_form() -> None:
    module = nn.ModuleDict({"embed": Counting(), "body": nn.Linear(2, 2)})
    stage = Stage(module, torch.optim.SGD(module.parameters(), lr=1), body=module["body"], embed=module["embed"])
    kept = KeptBuffers(module)
    module["embed"].seen = torch.zeros(5)
    with pytest.raises(Refused, match=r"'embed\.seen'"):
        keep_buffers_equal(stage, Place(0, 4), (0, 1, 2, 3), Channel(0, 4, {}), kept)
