"""A place in a job, and what a user builds for it: a part of the model, and how a microbatch passes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elastickpt.elastic.neighbours import MIN_SWAPPED_STAGES
from elastickpt.errors import PlacementUnsupported, Refused
from elastickpt.training.elements import is_loaded_instance
from elastickpt.training.parameters import ZERO

StagePart = Literal["embed", "body", "head"]
Swap = Literal["microbatch", "step"]
PARTS: tuple[StagePart, ...] = ("embed", "body", "head")


@dataclass(frozen=True, slots=True)
class Place:
    """What a member of a job is: it holds pipeline stage `stage` of `stages`, counted in the order in which a microbatch passes
    them, on `device`. `shard` and `replica` are 0: stages are whole, and held once.

    Examples:
        >>> ek.elastic.Place(stage=1, stages=4).device
        device(type='cpu')
    """

    stage: int
    stages: int
    shard: int = 0
    replica: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Stage:
    """What one place trains, as `build(place)` returns it.

    `module` is what is trained and saved, under the names of the whole model. `body`, `embed` and `head` say how a microbatch
    passes: embed → body → head, each called with one tensor and returning one; all their parameters and buffers belong to
    `module`. Without `body` the whole module is it. `loss(output, target)` is a mean over one microbatch, on the stages that
    are last in an order. `example`: input and output of the body for one microbatch, as tensors on any device, meta too.

    Raises Refused, naming the tensor, for a part with tensors that are not the module's, parameters of the module that no part
    passes, an optimizer of other parameters, one that needs a closure; PlacementUnsupported for stages that are sharded or
    replicated.

    Examples:
        >>> stage = ek.elastic.Stage(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> list(stage.tensors["body"])
        ['layers.0.weight', 'layers.0.bias']
        >>> [tuple(one.shape) for one in stage.parameters("body")]
        [(4, 4), (4,)]
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        body: nn.Module | None = None,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
        scheduler: LRScheduler | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        example: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if body is None and (embed is not None or head is not None):
            raise Refused("Stage: embed and head were given without a body; expected body=, which is what lies between them")
        self.module, self.optimizer, self.scheduler, self.loss = module, optimizer, scheduler, loss
        given = {"embed": embed, "body": module if body is None else body, "head": head}
        self.parts: dict[StagePart, nn.Module] = {part: one for part in PARTS if (one := given[part]) is not None}
        self.example = None if example is None else _metas(example)
        self.names = _names_of(module)
        self._require_whole()
        self._tensor_names = {part: list(self._named(part)) for part in self.parts}
        self._parameters = {part: [one for one in self.tensors[part].values() if _is_trained(one)] for part in self.parts}
        self._require_apart()
        self._require_optimizer()
        self._require_scheduler()

    @property
    def tensors(self) -> dict[StagePart, dict[str, Tensor]]:
        """Parameters and buffers of each part that are saved, by the module's names and in its order. As they are now: forward
        may put another tensor in a buffer's place."""
        now = dict(_unique(self.module))
        return {part: {name: now[name] for name in names} for part, names in self._tensor_names.items()}

    def parameters(self, part: StagePart) -> list[nn.Parameter]:
        """Those of a part that are trained.

        Args:
            part: "embed", "body" or "head".

        Returns:
            They are in the module's order; none for a part that is not there.

        Raises nothing.
        """
        return self._parameters.get(part, [])  # type: ignore[return-value]

    def _named(self, part: StagePart) -> dict[str, Tensor]:
        """The tensors of a part that are saved, by the module's names. Raises Refused for one that is not the module's."""
        mine: set[int] = set()
        for own, tensor in _tensors_of(self.parts[part]):
            if id(tensor) not in self.names:
                raise Refused(f"Stage: {own!r} of {part} is no tensor of module, which is what is trained and saved")
            mine.add(id(tensor))
        saved = set(self.module.state_dict(keep_vars=True))
        return {name: tensor for name, tensor in _unique(self.module) if id(tensor) in mine and name in saved}

    def _require_whole(self) -> None:
        if isinstance(self.module, DistributedDataParallel):
            raise PlacementUnsupported("Stage: module is a DistributedDataParallel; replicated stages are not supported yet")
        for name, tensor in _unique(self.module):
            if isinstance(tensor, DTensor):
                raise PlacementUnsupported(f"Stage: {name!r} is a DTensor; sharded stages are not supported yet")
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise Refused(f"Stage: {name!r} is not initialised; expected a module that has made a forward once")

    def _require_apart(self) -> None:
        """Every trained parameter is passed by one part, which is what clips it and what rebuilds it."""
        holder: dict[int, StagePart] = {}
        for part, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                if (other := holder.setdefault(id(tensor), part)) != part and isinstance(tensor, nn.Parameter):
                    raise Refused(f"Stage: {name!r} belongs to {other} and to {part}; expected parts that share no parameter")
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in holder:
                given = ", ".join(self.parts)
                raise Refused(f"Stage: {name!r} of module belongs to none of {given}, so no microbatch trains it")

    def _require_optimizer(self) -> None:
        if is_loaded_instance(self.optimizer, *ZERO):
            raise PlacementUnsupported("Stage: optimizer is a ZeroRedundancyOptimizer; which is not supported yet")
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in self.names:
                    shape = tuple(parameter.shape)
                    raise Refused(f"Stage: group {number} of optimizer has a parameter {shape} that is none of module's")
        if _needs_arguments(type(self.optimizer).step):
            raise Refused(f"Stage: {type(self.optimizer).__name__}.step needs a closure; a step is decided before it is taken")

    def _require_scheduler(self) -> None:
        if self.scheduler is not None and _needs_arguments(type(self.scheduler).step):
            raise Refused(f"Stage: {type(self.scheduler).__name__}.step needs metrics; expected a scheduler of steps alone")


def require_parts(stage: Stage, place: Place, *, swap: Swap | None) -> None:
    """Whether the stage has the parts and the loss that its place needs. Raises Refused."""
    ends: dict[StagePart, tuple[int, ...]] = {"embed": (0,), "head": (place.stages - 1,)}
    if swap is not None:
        if place.stages < MIN_SWAPPED_STAGES:
            raise Refused(f"swap={swap!r} with {place.stages} stages: expected at least {MIN_SWAPPED_STAGES}")
        ends = {"embed": (0, 1), "head": (place.stages - 2, place.stages - 1)}
    for part, expected in ends.items():
        if part in stage.parts and place.stage not in expected:
            where = " and ".join(map(str, expected))
            raise Refused(f"stage {place.stage} of {place.stages} has {part}, which only stages {where} pass")
    if place.stage in ends["head"] and stage.loss is None:
        raise Refused(f"stage {place.stage} of {place.stages}: expected a loss, as it can be the last one")
    if place.stages > 1 and stage.example is None:
        raise Refused(f"stage {place.stage} of {place.stages}: expected example=(input, output) of one microbatch of its body")


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _metas(example: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if len(example) != 2:
        raise Refused("Stage: example: expected two tensors, the input and the output of one microbatch")
    first, second = (torch.empty(one.shape, dtype=one.dtype, device="meta") for one in example)
    return first, second


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _unique(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _names_of(module: nn.Module) -> dict[int, str]:
    """Tensor → its first name; by identity, as wrappers around parts have names of their own."""
    return {id(tensor): name for name, tensor in _unique(module)}


def _needs_arguments(step: Callable[..., object]) -> bool:
    """Of a method as its class has it: an instance's may be wrapped."""
    try:
        parameters = list(inspect.signature(step).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    return any(one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)
