"""How the microbatches of one step pass the stages of a view, on torch's schedules, and the gradients that they leave.

Without a swap a step is one flush in the normal order 0 … S−1. In the swapped order the two stages of each end change places.
`swap="microbatch"`: two flushes, the even microbatches in the normal order, then the odd ones swapped; `swap="step"`: one
flush, swapped where an odd number of steps is complete. Gradients are summed over all microbatches and not scaled here.

Every transfer waits for as long as it takes: `links` ends it when something newer has taken this step's place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from elastickpt.elastic.links import LinkBroken, Links, Sending, told_by_one
from elastickpt.elastic.neighbours import partner
from elastickpt.elastic.stages import Place, Stage, Swap
from elastickpt.elastic.starts import BatchChanged, digest_of
from elastickpt.errors import Refused

Schedule = Literal["1f1b", "gpipe"]
_SCHEDULES: dict[Schedule, type[Schedule1F1B] | type[ScheduleGPipe]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class OwnCodeRaised(Exception):
    """The user's code raised while a step was computed; `error` is what it raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Watch(Protocol):
    """Who is told how a step goes on."""

    def began(self) -> None: ...

    def progress(self) -> None: ...

    def own_code(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class Passing:
    """How a job's steps pass its stages; the same on every member."""

    microbatches: int
    schedule: Schedule = "1f1b"
    swap: Swap | None = None


@dataclass(frozen=True, slots=True)
class Flush:
    """Some microbatches of a step, by number, and the stage at each position of their order."""

    order: tuple[int, ...]
    microbatches: tuple[int, ...]


def order_of(stages: int, *, swapped: bool) -> tuple[int, ...]:
    """The stage at each position."""
    if not swapped:
        return tuple(range(stages))
    return tuple(stage if (twin := partner(stage, stages)) is None else twin for stage in range(stages))


def flushes_of(passing: Passing, *, step: int, stages: int) -> tuple[Flush, ...]:
    """Those of the step that follows `step` completed ones."""
    every = tuple(range(passing.microbatches))
    if passing.swap == "microbatch":
        swapped = order_of(stages, swapped=True)
        return Flush(order_of(stages, swapped=False), every[0::2]), Flush(swapped, every[1::2])
    return (Flush(order_of(stages, swapped=passing.swap == "step" and step % 2 == 1), every),)


def orders_of(passing: Passing, *, stages: int) -> tuple[tuple[int, ...], ...]:
    """All orders in which a step may pass."""
    return tuple(order_of(stages, swapped=swapped) for swapped in ((False,) if passing.swap is None else (False, True)))


def sees_batches(passing: Passing, stage: int, *, stages: int) -> bool:
    """Whether a stage is first or last in an order: it asks the loader."""
    return any(stage in (order[0], order[-1]) for order in orders_of(passing, stages=stages))


class Passage:
    """The microbatches' way through one member, over the links of one view."""

    def __init__(self, stage: Stage, place: Place, passing: Passing, links: Links, watch: Watch) -> None:
        self._stage, self._place, self._passing, self._links, self._watch = stage, place, passing, links, watch
        self._ways: dict[Flush, tuple[Schedule1F1B | ScheduleGPipe, _LinkedStage]] = {}

    def train(self, step: int, batch: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Forward and backward of all microbatches after `step` completed steps. On the last stage of the normal order the
        losses of all microbatches, in their order and without a graph; none elsewhere.

        Raises OwnCodeRaised and LinkBroken; then gradients and buffers are whatever they are.
        """
        flushes = flushes_of(self._passing, step=step, stages=self._place.stages)
        losses: dict[int, Tensor] = {}
        for flush in flushes:
            losses |= dict(zip(flush.microbatches, self._flush(flush, batch), strict=False))
        return self._at_home(flushes, losses)

    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The mean over batches of their mean loss, in the normal order, the same on all members. As `train` raises, and
        OwnCodeRaised by BatchChanged on members whose batches are not those of the last stage. [REC-68]"""
        self._watch.began()
        self._require_same(batches)
        with torch.no_grad():
            means = [self._forward(inputs, targets) for inputs, targets in batches]
        mean = torch.tensor([sum(means) / len(means)], dtype=torch.float64)
        return told_by_one(self._links, mean, self._place.stages - 1).item()

    def _require_same(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        last = self._place.stages - 1
        mine = xxhash.xxh3_128("".join(map(digest_of, batches)).encode()).digest()
        theirs = told_by_one(self._links, torch.frombuffer(bytearray(mine), dtype=torch.uint8), last).numpy().tobytes()
        if theirs != mine:
            found = f"its batches have digest {mine.hex()}, those of stage {last} {theirs.hex()}"
            raise OwnCodeRaised(BatchChanged(f"evaluate: {found}; expected the same on all members"))

    def close(self) -> None:
        """No microbatch passes any more; nothing here holds the process group of the view."""
        self._ways.clear()

    def _flush(self, flush: Flush, batch: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """The losses, where this stage is the last one of the flush."""
        if flush not in self._ways:
            self._ways[flush] = self._way(flush)
        schedule, piped = self._ways[flush]
        inputs: list[Tensor] = []
        targets = None
        if batch is not None and (piped.is_first or piped.is_last):
            chosen, targets = (_chosen(one, flush.microbatches, self._passing.microbatches) for one in batch)
            inputs = [chosen] if piped.is_first else []
        losses: list[Tensor] = []
        try:
            schedule.step(*inputs, target=targets if piped.is_last else None, losses=losses, return_outputs=False)
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error  # what the user's code raised is told apart where it runs
        piped.settle()
        return [one.detach() for one in losses]

    def _way(self, flush: Flush) -> tuple[Schedule1F1B | ScheduleGPipe, _LinkedStage]:
        piped = _LinkedStage(self._stage, self._place, flush.order, self._links, self._watch)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            with raised_by_user(), self._watch.own_code():
                return _loss_of(self._stage)(output, target)

        kind = _SCHEDULES[self._passing.schedule]
        return kind(piped, n_microbatches=len(flush.microbatches), loss_fn=loss, scale_grads=False), piped

    def _at_home(self, flushes: Sequence[Flush], losses: dict[int, Tensor]) -> list[Tensor]:
        """The losses of other orders' last stages come to the last stage of the normal order."""
        home, mine = self._place.stages - 1, self._place.stage
        for flush in flushes:
            away = flush.order[-1]
            if away == home or mine not in (away, home):
                continue
            if mine == away:
                self._links.send(torch.stack([losses[one].double() for one in flush.microbatches]), home).wait()
            else:
                told = torch.empty(len(flush.microbatches), dtype=torch.float64)
                self._links.receive(told, away)
                losses |= dict(zip(flush.microbatches, told.unbind(), strict=True))
        return [losses[number] for number in sorted(losses)] if mine == home else []

    def _forward(self, inputs: Tensor, targets: Tensor) -> float:
        """The mean loss of one batch on the last stage, 0 elsewhere."""
        place, count = self._place, self._passing.microbatches
        first, last = place.stage == 0, place.stage == place.stages - 1
        parts, losses, sendings = parts_at(self._stage, place.stage, place.stages), [], []
        for number in range(count):
            if first:
                hidden = _chosen(inputs, (number,), count)
            else:
                hidden = torch.empty_like(_example(self._stage)[0], device=place.device)
                self._links.receive(hidden, place.stage - 1)
            with raised_by_user(), self._watch.own_code():
                for part in parts:
                    hidden = part(hidden)
                if last:
                    losses.append(float(_loss_of(self._stage)(hidden, _chosen(targets, (number,), count)).double()))
                if not last:
                    require_form(hidden, _example(self._stage)[1], what=f"stage {place.stage}: the output of its body")
            if not last:
                sendings.append(self._links.send(hidden, place.stage + 1))
            self._watch.progress()
        for sending in sendings:
            sending.wait()
        return sum(losses) / count


class _LinkedStage(PipelineStage):
    """One member's stage in one order of torch's schedules; its tensors go over the view's links."""

    def __init__(self, stage: Stage, place: Place, order: tuple[int, ...], links: Links, watch: Watch) -> None:
        position = order.index(place.stage)
        metas = tuple(one.detach().requires_grad_(one.is_floating_point()) for one in _example(stage))
        super().__init__(
            _InTurn(parts_at(stage, position, place.stages)),
            position,
            place.stages,
            place.device,
            input_args=metas[:1],
            output_args=metas[1:],
        )
        self.stage_index_to_group_rank = dict(enumerate(order))
        self._place, self._links, self._watch, self._output = place, links, watch, metas[1]
        self._sendings: deque[Sending] = deque()

    def settle(self) -> None:
        """Until all that was sent has gone."""
        while self._sendings:
            self._sendings.popleft().wait()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if fwd_chunk_id == 0:
            self._watch.began()
        with raised_by_user(wrapped=True), self._watch.own_code():
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
            if not self.is_last:
                require_form(output, self._output, what=f"stage {self._place.stage}: the output of its body")
            return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with raised_by_user(wrapped=True), self._watch.own_code():
            return super().backward_one_chunk(*args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._received(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._received(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent(super().get_bwd_send_ops(bwd_chunk_id))

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """Torch asks along the pipeline, and back, whether all stages know their shapes; that was told already. [REC-54]"""
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        """The answer to that: they do."""
        return torch.ones(1, dtype=torch.int32)

    def _received(self, wanted: list[dist.P2POp]) -> list[dist.P2POp]:
        for one in wanted:
            self._links.receive(one.tensor, one.peer)
        self._watch.progress()
        return []  # nothing is left for torch to do

    def _sent(self, ready: list[dist.P2POp]) -> list[dist.P2POp]:
        self._sendings += [self._links.send(one.tensor, one.peer) for one in ready]
        while len(self._sendings) > 2 * self.num_stages:  # what is that old has been received, in either schedule
            self._sendings.popleft().wait()
        return []


class _InTurn(nn.Module):
    """Parts in turn, none of them registered: torch's stage is to change nothing of them."""

    def __init__(self, parts: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self._parts = parts

    def forward(self, hidden: Tensor) -> Tensor:
        for part in self._parts:
            hidden = part(hidden)
        return hidden


@contextmanager
def raised_by_user(*, wrapped: bool = False) -> Iterator[None]:
    """What is raised in here is the user's; `wrapped`: torch has put an error of its own around it."""
    try:
        yield
    except (OwnCodeRaised, LinkBroken):
        raise
    except Exception as error:
        inner = error.__cause__ if wrapped else None
        raise OwnCodeRaised(inner if isinstance(inner, Exception) else error) from error


def parts_at(stage: Stage, position: int, stages: int) -> tuple[nn.Module, ...]:
    """The parts that a microbatch passes at a position: embed → body → head, the ends' only at the ends."""
    wanted = ["embed"] * (position == 0) + ["body"] + ["head"] * (position == stages - 1)
    return tuple(module for part, module in stage.parts.items() if part in wanted)


def require_form(found: object, expected: Tensor, *, what: str) -> None:
    """Whether something is a tensor of that shape and type. Raises Refused."""
    if not isinstance(found, Tensor):
        raise Refused(f"{what} is a {type(found).__name__}, expected one tensor")
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        here, there = (f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in (found, expected))
        raise Refused(f"{what} is {here}, expected {there} as its example says")


def _chosen(tensor: Tensor, microbatches: tuple[int, ...], count: int) -> Tensor:
    """The rows of some of `count` microbatches, one after the other."""
    if len(microbatches) == count:
        return tensor
    chunks = tensor.chunk(count)
    return chunks[microbatches[0]] if len(microbatches) == 1 else torch.cat([chunks[number] for number in microbatches])


def _example(stage: Stage) -> tuple[Tensor, Tensor]:
    nothing = torch.empty(0, device="meta")  # a stage that is the only one receives and sends nothing
    return (nothing, nothing) if stage.example is None else stage.example


def _loss_of(stage: Stage) -> Callable[[Tensor, Tensor], Tensor]:
    assert stage.loss is not None, "require_parts looks for it"
    return stage.loss
