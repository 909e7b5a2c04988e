"""Modules, averages, metrics and loaders of other libraries, whose state is not only in parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import elastickpt as ek
from tools.clients.case import Case, Job, batch, looped, model, states_of, train, wrapped


def _metrics(processes: int) -> Job:
    import torchmetrics

    net = wrapped(model(), processes)
    optimizer = torch.optim.Adam(net.parameters())
    metric = torchmetrics.MetricCollection(
        {"mean": torchmetrics.MeanMetric(), "cat": torchmetrics.CatMetric(), "r2": torchmetrics.R2Score()}
    )
    for one in metric.values():
        one.persistent(True)
    step = train(net, optimizer)

    def both(number: int) -> None:
        step(number)
        got = net(batch(number)).detach()
        metric["mean"].update(got)
        metric["cat"].update(got[:, 0])
        metric["r2"].update(got[:, 0], batch(number)[:, 0])

    seen = lambda: (dict(net.state_dict()), metric.compute())  # noqa: E731
    return Job({"model": net, "optimizer": optimizer, "metrics": metric}, both, seen)


def _ema(processes: int) -> Job:
    from torch_ema import ExponentialMovingAverage

    net = wrapped(model(), processes)
    optimizer = torch.optim.Adam(net.parameters())
    average = ExponentialMovingAverage(net.parameters(), decay=0.9)
    step = train(net, optimizer)

    def both(number: int) -> None:
        step(number)
        average.update()

    return Job({"model": net, "optimizer": optimizer, "ema": average}, both, lambda: (net.state_dict(), average.state_dict()))


def _timm(processes: int) -> Job:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    torch.manual_seed(1)
    net = timm.create_model("test_resnet", num_classes=4)
    optimizer = create_optimizer_v2(net, opt="lookahead_adamw", lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    ema = ModelEmaV3(net, decay=0.9)

    def step(number: int) -> None:
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
        scheduler.step(number)
        ema.update(net)

    seen = lambda: (net.state_dict(), ema.state_dict(), optimizer.param_groups[0]["lr"])  # noqa: E731
    return Job({"model": net, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}, step, seen)


def _loader(processes: int) -> Job:
    from torchdata.stateful_dataloader import StatefulDataLoader

    net = wrapped(model(), processes)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    data = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    loader: Any = StatefulDataLoader(data, batch_size=8, shuffle=True)
    iterator: list[Any] = []

    def step(number: int) -> None:
        if not iterator:
            iterator.append(iter(loader))
        inputs = next(iterator[0])
        optimizer.zero_grad()
        ((net(inputs) - inputs) ** 2).mean().backward()
        optimizer.step()

    entries = {"model": net, "optimizer": optimizer, "loader": ek.PerRank(loader), "rng": ek.RNG()}
    return Job(entries, step, lambda: (dict(net.state_dict()), states_of(optimizer)))


def _torchao_weights(processes: int) -> Job:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = model()
    quantize_(net, Int8WeightOnlyConfig())
    head = torch.nn.Linear(16, 16)
    optimizer = torch.optim.Adam(head.parameters())
    both = torch.nn.Sequential(net, head)

    def step(number: int) -> None:
        optimizer.zero_grad()
        head(net(batch(number)).detach()).square().mean().backward()
        optimizer.step()

    return Job({"model": both, "optimizer": optimizer}, step, lambda: (dict(both.named_parameters()), states_of(optimizer)))


def cases(library: str) -> Iterator[Case]:
    """Those of one library; none of another one."""
    yield from (case for case in _CASES if case.package == library)


_CASES = (
    Case("torchmetrics", "MeanMetric, CatMetric, R2Score", looped(_metrics), (1, 2)),
    Case("torch-ema", "ExponentialMovingAverage", looped(_ema), (1, 2)),
    Case("timm", "resnet, Lookahead(AdamW), CosineLRScheduler, ModelEmaV3", looped(_timm)),
    Case("torchdata", "StatefulDataLoader", looped(_loader), (1, 2)),
    Case("torchao", "int8 weights", looped(_torchao_weights)),
)
