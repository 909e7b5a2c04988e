"""The training example: short, the same model and the same data at every layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = ["fsdp3", "tp2", "fsdp2", "pp2.fsdp2", "pp2.tp2", "tp2.fsdp2", "pp3"]


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """examples/train.py as a module; it finds its neighbours as a script does."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train

        yield train
    finally:
        sys.path.remove(str(EXAMPLES))


def ranks_of(layout: str) -> int:
    ranks = 1
    for axis in layout.split("."):
        ranks *= int(axis[-1])
    return ranks


def parameters_at(train: ModuleType, layout: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of each parameter that `rank` has a part of; the process group is a fake one."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks_of(layout)))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks_of(layout))
    try:
        axes = train.axes_of(layout)
        stage, stages = train.path_in(axes.get("pp"))
        model = train.Transformer(train.Config(), stage=stage, stages=stages)
        train.shard(model, axes)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    finally:
        dist.destroy_process_group()


def whole(train: ModuleType) -> dict[str, tuple[int, ...]]:
    model = train.Transformer(train.Config())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_whole_shapes_are_the_same_at_every_layout(
    train: ModuleType, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is loaded by name, so a name that depended on the layout would end a run at its first change."""
    found: dict[str, tuple[int, ...]] = {}
    for rank in range(ranks_of(layout)):
        found |= parameters_at(train, layout, rank, monkeypatch)
    assert found == whole(train)


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_each_parameter_is_on_one_stage_with_the_values_of_the_whole_model(train: ModuleType, stages: int) -> None:
    """Every stage draws the whole model's values: a stage that drew only its own would start another model."""
    torch.manual_seed(0)
    expected = dict(train.Transformer(train.Config()).named_parameters())
    seen: list[str] = []
    for stage in range(stages):
        torch.manual_seed(0)
        for name, parameter in train.Transformer(train.Config(), stage=stage, stages=stages).named_parameters():
            seen.append(name)
            assert torch.equal(parameter, expected[name]), name
    assert sorted(seen) == sorted(expected)


def test_the_model_has_two_to_five_million_parameters(train: ModuleType) -> None:
    count = sum(parameter.numel() for parameter in train.Transformer(train.Config()).parameters())
    assert 2_000_000 <= count <= 5_000_000


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_ranks_share_the_one_batch_of_a_step(train: ModuleType, ranks: int) -> None:
    """The loss of a resumed run is comparable only if all layouts see the same bytes at the same step."""
    corpus, again = train.Corpus(), train.Corpus()
    inputs, targets = corpus.batch(41, context=128)
    parts = [again.batch(41, context=128, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {part[0].shape for part in parts} == {(train.BATCH // ranks, 128)}
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_targets_are_the_next_bytes_and_steps_differ(train: ModuleType) -> None:
    corpus = train.Corpus()
    inputs, targets = corpus.batch(7, context=128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, corpus.batch(8, context=128)[0])


@pytest.mark.parametrize("layout", ["ddp2", "tp", "pp2,fsdp2", "", "pp2.", "fsdp2"])
def test_a_layout_that_does_not_fit_the_job_is_refused(train: ModuleType, layout: str) -> None:
    """Several ranks that each believe to be alone would overwrite each other; this process is alone."""
    with pytest.raises(SystemExit, match="layout"):
        train.axes_of(layout)


def test_the_script_is_short() -> None:
    assert len((EXAMPLES / "train.py").read_text().splitlines()) < 200
