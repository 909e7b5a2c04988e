"""A step over real gloo ranks against the same step by one process: losses, gradients, norms, buffers, bit for bit."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from elastickpt.elastic import view_links as links_of
from elastickpt.elastic.gradients import Clipping, clip, divide, sum_over_replicas
from elastickpt.elastic.links import LinkBroken, told_by_one
from elastickpt.elastic.passage import OwnCodeRaised, Passage, Passing, sees_batches
from elastickpt.elastic.stages import Place, Stage, require_parts
from elastickpt.elastic.starts import BatchChanged, seed_streams
from elastickpt.elastic.view_links import ViewLinks
from elastickpt.errors import DeadlineExceeded
from elastickpt.ranks.processes import socket_identity
from tests.elastic.files_exchange import FilesExchange
from tests.elastic.members import run_members
from tests.elastic.small_model import SEED, Corpus, Sequential, build
from tests.elastic.watching import Unwatched

pytestmark = pytest.mark.ranks
Tensors = dict[str, Tensor]


def gradients_of(stage: Stage) -> Tensors:
    return {name: one.grad.clone() for name, one in stage.module.named_parameters() if one.grad is not None}


def buffers_of(stage: Stage) -> Tensors:
    return {name: one.clone() for name, one in stage.module.named_buffers()}


def steps_of(rank: int, stages: int, folder: str, passing: Passing, clipping: Clipping, steps: int) -> list[object]:
    """Per step: losses, the norm of the body, gradients as they are stepped with, buffers."""
    links, place = ViewLinks(FilesExchange(folder), stage=rank, stages=stages, limit_s=60.0), Place(rank, stages)
    stage = build(place, passing)
    require_parts(stage, place, swap=passing.swap)
    passage, found = Passage(stage, place, passing, links, Unwatched()), list[object]()
    for step in range(steps):
        batch = Corpus().batch(step) if sees_batches(passing, rank, stages=stages) else None
        seed_streams(SEED, step, rank)
        losses = [float(one) for one in passage.train(step, batch)]
        if passing.swap is not None:
            sum_over_replicas(stage, place, links)
        divide(stage.module.parameters(), passing.microbatches)
        norm = clip(stage, place, clipping, links)
        found.append((losses, norm, gradients_of(stage), buffers_of(stage)))
        stage.optimizer.step()
        stage.optimizer.zero_grad()
    links.close()
    return found


def expected_steps_of(alone: int, of: int, stages: int, passing: Passing, clipping: Clipping, steps: int) -> list[list[object]]:
    """The same by one process, per stage."""
    reference, found = Sequential(stages, passing), [list[object]() for _ in range(stages)]
    for step in range(steps):
        losses = reference.gradients(step, Corpus().batch(step))
        reference.sum_replicas()
        for stage in reference.stages:
            divide(stage.module.parameters(), passing.microbatches)
        before = [get_total_norm([p.grad for p in stage.parameters("body")]).item() for stage in reference.stages]
        if clipping.limit is not None:
            clip_by_torch(reference, clipping)
        after = [get_total_norm([p.grad for p in stage.parameters("body")]).item() for stage in reference.stages]
        for number, stage in enumerate(reference.stages):
            norm = (before if clipping.reported == "before" else after)[number]
            here = losses if number == stages - 1 else []
            found[number].append((here, norm, gradients_of(stage), buffers_of(stage)))
            stage.optimizer.step()
            stage.optimizer.zero_grad()
    return found


def clip_by_torch(reference: Sequential, clipping: Clipping) -> None:
    assert clipping.limit is not None
    if clipping.scope == "stage":
        for stage in reference.stages:
            for part in ("embed", "body", "head"):
                clip_grad_norm_(stage.parameters(part), clipping.limit)
        return
    clip_grad_norm_(reference.whole(), clipping.limit)
    for part, one, other in (("embed", 0, 1), ("head", -1, -2)):
        for a, b in zip(reference.stages[one].parameters(part), reference.stages[other].parameters(part), strict=False):
            b.grad = a.grad.clone()


def assert_same(found: object, expected: object, where: str) -> None:
    assert type(found) is type(expected), where
    if isinstance(found, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for name in found:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("stages", "passing", "clipping"),
    [
        (4, Passing(12, "1f1b", "step"), Clipping(0.05, "global")),
        pytest.param(4, Passing(12, "1f1b", "microbatch"), Clipping(0.05, "stage", "before"), marks=pytest.mark.long),
        pytest.param(2, Passing(1, "gpipe"), Clipping(0.05, "global"), marks=pytest.mark.long),
        pytest.param(4, Passing(12), Clipping(), marks=pytest.mark.long),
        pytest.param(3, Passing(4, "gpipe"), Clipping(0.05), marks=pytest.mark.long),
        pytest.param(1, Passing(3), Clipping(0.05), marks=pytest.mark.long),
        pytest.param(5, Passing(3, "gpipe", "microbatch"), Clipping(0.05, "global"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_pipelined_step_is_the_step_of_one_process(stages: int, passing: Passing, clipping: Clipping, tmp_path: Path) -> None:
    """[REC-50..53]"""
    found = run_members(steps_of, stages, str(tmp_path / "view"), passing, clipping, 2)
    (expected,) = run_members(expected_steps_of, 1, stages, passing, clipping, 2)
    assert_same(found, expected, "stages")


def evaluated_by(rank: int, stages: int, folder: str) -> object:
    """What an evaluation of the same batch comes to; then how one ends for which stage 0 has another batch than the others."""
    links = ViewLinks(FilesExchange(folder), stage=rank, stages=stages, limit_s=60.0)
    place, passing = Place(rank, stages), Passing(4)
    passage = Passage(build(place, passing), place, passing, links, Unwatched())
    same = passage.evaluate([Corpus().batch(1)])
    try:
        passage.evaluate([Corpus().batch(2 if rank == 0 else 3)])
    except OwnCodeRaised as raised:
        return same, type(raised.error), str(raised.error)
    except LinkBroken:
        return same, LinkBroken, ""
    finally:
        links.close()
    return same, None, ""


def test_members_that_evaluate_different_batches_are_told_so(tmp_path: Path) -> None:
    """[REC-68]"""
    (first, kind, message), (second, interrupted, _) = run_members(evaluated_by, 2, str(tmp_path / "view"))
    assert first == second
    assert (kind, interrupted) == (BatchChanged, LinkBroken)
    assert re.fullmatch(
        r"evaluate: its batches have digest \w{32}, those of stage 1 \w{32}; expected the same on all members", message
    )


def reformed(rank: int, stages: int, folder: str, times: int) -> list[tuple[int, int]]:
    """Threads and descriptors after each of so many views, whose last transfer was interrupted; nobody collects garbage."""
    place, passing = Place(rank, stages), Passing(4, "gpipe")
    stage, found = build(place, passing), list[tuple[int, int]]()
    gc.collect()
    gc.disable()
    for view in range(times):
        links = ViewLinks(FilesExchange(f"{folder}/{view}"), stage=rank, stages=stages, limit_s=60.0)
        passage = Passage(stage, place, passing, links, Unwatched())
        passage.train(0, Corpus().batch(0) if sees_batches(passing, rank, stages=stages) else None)
        links.abort()
        with pytest.raises(LinkBroken):
            links.receive(torch.empty(1), 1 - rank)
        passage.close()
        links.close()
        stage.optimizer.zero_grad()
        found.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    return found


def test_of_a_view_that_is_over_nothing_is_left(tmp_path: Path) -> None:
    """Threads, connections and stores of its groups go with it, and do not wait for a collection of garbage."""
    for counts in run_members(reformed, 2, str(tmp_path), 5):
        assert max(counts[2:]) <= max(counts[:2]), counts


def met_in_the_second(rank: int, stages: int, folder: str) -> float:
    """The first view fails on one member, while the other one has seen nothing of it."""
    first = FilesExchange(f"{folder}/first")
    if rank == 0:
        links_of.FORMING_S = 0.5
        with pytest.raises(DeadlineExceeded):
            ViewLinks(first, stage=0, stages=stages, limit_s=60.0)
        links_of.FORMING_S = 60.0
    else:
        first.set("here/1", socket_identity().encode())
    links = ViewLinks(FilesExchange(f"{folder}/second"), stage=rank, stages=stages, limit_s=60.0)
    told = told_by_one(links, torch.tensor([7.0 if rank == 0 else 0.0]), 0).item()
    links.close()
    return told


def test_who_failed_to_make_a_group_makes_the_next_one_with_who_did_not_try(tmp_path: Path) -> None:
    """As when a member dies while groups are made: who takes its place has tried once less than the others. [REC-11]"""
    assert run_members(met_in_the_second, 2, str(tmp_path)) == [7.0, 7.0]


def exchanged(rank: int, stages: int, folder: str) -> list[Tensor]:
    """What member 1 gets of tensors of all kinds into tensors that lie otherwise in memory."""
    links = ViewLinks(FilesExchange(folder), stage=rank, stages=stages, limit_s=60.0)
    found = [torch.zeros_like(one).t().contiguous().t() if one.ndim == 2 else torch.zeros_like(one) for one in kinds()]
    for mine, theirs in zip(kinds(), found, strict=True):
        if rank == 0:
            links.send(mine, 1).wait()
        else:
            links.receive(theirs, 0)
    links.close()
    return found


def kinds() -> list[Tensor]:
    numbers = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    types = (torch.bool, torch.bfloat16, torch.float64, torch.int64, torch.complex64)
    return [numbers, numbers.t(), numbers[:, ::2], numbers[0, 0], numbers[:0], *(numbers.to(one) for one in types)]


def test_a_tensor_arrives_whatever_its_type_and_its_order_in_memory(tmp_path: Path) -> None:
    found = run_members(exchanged, 2, str(tmp_path))[1]
    for theirs, mine in zip(found, kinds(), strict=True):
        assert torch.equal(theirs, mine), (mine.dtype, mine.stride())
