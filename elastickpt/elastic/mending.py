"""How lost stages get their state back: read from a checkpoint, copied from a partner, averaged from neighbours. [REC-3..7]

Every member goes through the lost stages in order, and for each gives, takes or does nothing. What is rebuilt stands where the
lost stage stood: parameters and buffers of the body by its rung, embedding and head from the replica that lives, the
scheduler at the step of the view. Members that give change nothing of their own.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from elastickpt.elastic import checkfree
from elastickpt.elastic.alike import in_order
from elastickpt.elastic.checkpoints import NoGood, lacking_in, read, read_known
from elastickpt.elastic.duties import Exchange
from elastickpt.elastic.gradients import REPLICATED
from elastickpt.elastic.history import History
from elastickpt.elastic.limits import OTHERS_S
from elastickpt.elastic.links import Links
from elastickpt.elastic.messages import StageSource
from elastickpt.elastic.neighbours import partner
from elastickpt.elastic.policy import Policy
from elastickpt.elastic.stages import Stage, StagePart, Swap
from elastickpt.errors import Refused, StateMismatch
from elastickpt.ranks.messages import decode, encode

log = logging.getLogger(__name__)

_SCALARS = (bool, int, float, str, type(None))


@dataclass(slots=True)
class Rebuilding:
    """What came of it: bytes moved between members and read from storage; the factors of rebuilt bodies, by name."""

    moved: int = 0
    read: int = 0
    factors: dict[int, dict[str, float]] = field(default_factory=dict)


class Moment(msgspec.Struct, frozen=True):
    """One entry of an optimizer's state of one parameter: a tensor of this type and shape, or a plain value."""

    key: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: bool | int | float | str | None = None


class Ticks(msgspec.Struct, frozen=True):
    """Where a scheduler stands: its state and the options of the optimizer's groups, as far as they are plain. `built`: what
    both were when the stage was built."""

    scheduler: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    built: bytes = b""


class Mending:
    """One stage's part in rebuilding. `fresh` is its optimizer's state as `build` left it, by parameter."""

    def __init__(self, stage: Stage, policy: Policy, *, swap: Swap | None) -> None:
        self._stage, self._policy, self._swap = stage, policy, swap
        optimizer = stage.optimizer
        self._fresh = {id(one): copy.deepcopy(dict(state)) for one, state in optimizer.state.items()}
        self._options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._scheduler = None if stage.scheduler is None else copy.deepcopy(stage.scheduler.state_dict())

    def load_all(self, path: str, step: int, history: History) -> int:
        """The whole stage as the checkpoint has it; a rollback. Items that it lacks are as `build` made them, the scheduler at
        its step, the history empty; but the model it must have. Returns the bytes read. Raises NoGood, and StateMismatch for
        another model than it has. [REC-66]"""
        state: dict[str, object] = {"model": self._stage.module, "optimizer": self._stage.optimizer, "elastic": history}
        if self._stage.scheduler is not None:
            state["scheduler"] = self._stage.scheduler
        try:
            return read(state, path)
        except StateMismatch:
            lacking = lacking_in(state, path)
            if not lacking:
                raise
        self._as_built()
        if "scheduler" in lacking:
            self._keep_time(step, b"")
        if "elastic" in lacking:
            history.load_state_dict({})
        log.warning("%s: has no %s, which begin as they were built", path, ", no ".join(sorted(lacking)))
        return read({item: one for item, one in state.items() if item not in lacking}, path)

    def given(self) -> Iterator[Tensor]:
        """All that others may be made of."""
        for part, tensors in self._stage.tensors.items():
            yield from tensors.values()
            if part == "body" and self._policy.optimizer == "average":
                states = (self._stage.optimizer.state.get(one, {}) for one in self._stage.parameters(part))
                yield from (one for state in states for one in state.values() if isinstance(one, Tensor))

    def take_part(
        self,
        sources: Sequence[StageSource],
        step: int,
        history: History,
        trained: Mapping[int, list[str]],
        links: Links,
        exchange: Exchange,
    ) -> Rebuilding:
        """Gives and takes for all lost stages. `trained`: the names of each body's parameters. Raises LinkBroken, NoGood where
        the own source cannot be used, and what `exchange` raises."""
        lost, found = {one.stage for one in sources}, Rebuilding()
        for source in sorted(sources, key=lambda one: one.stage):
            self._rebuild(source, step, lost, links, exchange, found)
            found.factors[source.stage] = self._factors(source, history, trained[source.stage], links, exchange)
        return found

    def _rebuild(
        self, source: StageSource, step: int, lost: set[int], links: Links, exchange: Exchange, found: Rebuilding
    ) -> None:
        me, away = links.stage, source.stage
        twin = partner(away, links.stages) if self._swap is not None else None
        twin = None if twin in lost else twin
        standing = [one for one in range(links.stages) if one not in lost]
        donor = source.stages[0] if source.stages else standing[0] if twin is None and standing else twin
        transfer = _Transfer(links, exchange, away, found)
        if me == away:
            self._take(source, step, donor, twin, transfer)
            return
        if me in source.stages:
            transfer.give_tensors(self._body())
            if self._policy.optimizer == "average":
                transfer.give_moments(self._stage, "body")
        if me == donor:
            exchange.set(f"ticks/{away}", self._ticks())
        if me == twin:
            for part in REPLICATED:
                if part in self._stage.parts:
                    transfer.give_tensors([tensor for _, tensor in in_order(self._stage.tensors[part])])
                    transfer.give_moments(self._stage, part)

    def _take(self, source: StageSource, step: int, donor: int | None, twin: int | None, transfer: _Transfer) -> None:
        self._as_built()
        if source.rung == "stale":
            transfer.found.read += read_known({"model": self._stage.module, "optimizer": self._stage.optimizer}, source.path)
            self._options_as_built()
        else:
            self._mix(source, transfer)
        self._keep_time(step, b"" if donor is None else transfer.exchange.get(f"ticks/{transfer.away}", limit_s=OTHERS_S))
        if twin is not None:
            for part in REPLICATED:
                if part in self._stage.parts:
                    tensors = [tensor for _, tensor in in_order(self._stage.tensors[part])]
                    for mine, theirs in zip(tensors, transfer.take_tensors(tensors, twin), strict=True):
                        mine.data.copy_(theirs)
                    self._put_moments(part, [transfer.take_moments(twin, part)], 1.0)

    def _mix(self, source: StageSource, transfer: _Transfer) -> None:
        """The body of its sources: a copy of one, or the average of two."""
        names = [name for name, _ in in_order(self._stage.tensors["body"])]
        mine = self._body()
        average = self._policy.optimizer == "average"
        given, moments = [], []
        for one in source.stages:
            given.append(dict(zip(names, transfer.take_tensors(mine, one), strict=True)))
            if average:
                moments.append(transfer.take_moments(one, "body"))
        alpha = 1.0 if len(given) == 1 else float(source.alpha if source.alpha is not None else 0.5)
        try:
            made = given[0] if len(given) == 1 else checkfree.average(given[0], given[1], alpha)
        except Refused as error:
            raise NoGood(error.message) from error
        with torch.no_grad():
            for name, tensor in zip(names, mine, strict=True):
                tensor.copy_(made[name])
        if average:
            self._put_moments("body", moments, alpha)

    def _factors(
        self, source: StageSource, history: History, names: Iterable[str], links: Links, exchange: Exchange
    ) -> dict[str, float]:
        """What the learning rates of the rebuilt body are multiplied by, by name; known to all members."""
        if source.rung != "stale":
            return {name: self._policy.factor_after(history.lr_factors.get(name, 1.0)) for name in names}
        key = f"factors/{source.stage}"
        if links.stage == source.stage:
            saved = History()
            read_known({"elastic": saved}, source.path)
            exchange.set(key, encode({name: saved.lr_factors.get(name, 1.0) for name in names}))
        return decode(exchange.get(key, limit_s=OTHERS_S), dict[str, float])

    # -- the own state

    def _body(self) -> list[Tensor]:
        return [tensor for _, tensor in in_order(self._stage.tensors["body"])]

    def _as_built(self) -> None:
        """Optimizer and scheduler are what `build` made of them."""
        optimizer = self._stage.optimizer
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for one in group["params"]:
                if id(one) in self._fresh:
                    optimizer.state[one] = copy.deepcopy(self._fresh[id(one)])
        self._options_as_built()
        if self._stage.scheduler is not None and self._scheduler is not None:
            self._stage.scheduler.load_state_dict(copy.deepcopy(self._scheduler))

    def _options_as_built(self) -> None:
        for group, options in zip(self._stage.optimizer.param_groups, self._options, strict=True):
            group.update(copy.deepcopy(options))

    def _ticks(self) -> bytes:
        scheduler, groups = self._stage.scheduler, self._stage.optimizer.param_groups
        state = {} if scheduler is None else scheduler.state_dict()
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if not all(_is_plain(one) for one in (state, options)):
            return b""
        return encode(Ticks(state, options, self._built()))

    def _built(self) -> bytes:
        """The same on stages whose schedulers begin alike; b"" where that cannot be told."""
        built = (self._scheduler, self._options)
        return encode(built) if all(map(_is_plain, built)) else b""

    def _keep_time(self, step: int, told: bytes) -> None:
        """The scheduler stands where those of other stages do: by what one says that began alike, else by as many steps of its
        own."""
        scheduler, optimizer = self._stage.scheduler, self._stage.optimizer
        if told:
            ticks = decode(told, Ticks)
            if ticks.built == self._built() != b"":
                for group, options in zip(optimizer.param_groups, ticks.groups, strict=True):
                    group.update({key: _as_type(value, group[key]) for key, value in options.items()})
                if scheduler is not None:
                    scheduler.load_state_dict(ticks.scheduler)
                return
        if scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no step of the optimizer lies between these
                for _ in range(step):
                    scheduler.step()

    def _put_moments(self, part: StagePart, given: Sequence[list[dict[str, Any]]], alpha: float) -> None:
        for parameter, *states in zip(_trained(self._stage, part), *given, strict=True):
            found = states[0] if len(states) == 1 else mixed_moments(states[0], states[1], parameter, alpha)
            if found:
                self._stage.optimizer.state[parameter] = found


def mixed_moments(before: dict[str, Any], after: dict[str, Any], parameter: Tensor, alpha: float) -> dict[str, Any]:
    """An optimizer's state of a parameter that was averaged, from those of its sources: moments by the same weights, step
    counts and whatever else is no tensor of numbers as in the stage before; none, where a source has none. Raises NoGood.
    [REC-58]"""
    if not before or not after:
        return {}
    if before.keys() != after.keys():
        raise NoGood(f"moments of the stages beside it differ: {sorted(before)} and {sorted(after)}")
    counts = {"step"} | {key for key, one in before.items() if isinstance(one, Tensor) and one.dim() == 0 < parameter.dim()}
    mixed = {key: one for key, one in before.items() if isinstance(one, Tensor) and key not in counts}
    try:
        return {**before, **checkfree.average(mixed, {key: after[key] for key in mixed}, alpha)}
    except Refused as error:
        raise NoGood(f"moments of the stages beside it: {error.message}") from error


def _trained(stage: Stage, part: StagePart) -> list[Tensor]:
    """The parameters of a part that are trained, in the order in which two stages that are alike have them."""
    mine = {id(one) for one in stage.parameters(part)}
    return [tensor for _, tensor in in_order(stage.tensors[part]) if id(tensor) in mine]


@dataclass(slots=True)
class _Transfer:
    """From members that stand to the one of a lost stage."""

    links: Links
    exchange: Exchange
    away: int
    found: Rebuilding

    def give_tensors(self, tensors: Sequence[Tensor]) -> None:
        for sending in [self.links.send(one, self.away) for one in tensors]:
            sending.wait()
        self.found.moved += sum(one.nbytes for one in tensors)

    def take_tensors(self, like: Sequence[Tensor], stage: int) -> list[Tensor]:
        taken = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in like]
        for one in taken:
            self.links.receive(one, stage)
        return taken

    def give_moments(self, stage: Stage, part: StagePart) -> None:
        told: list[list[Moment]] = []
        tensors: list[Tensor] = []
        why = ""
        for parameter in _trained(stage, part):
            entries = []
            for key, value in sorted(stage.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    entries.append(Moment(key, str(value.dtype).removeprefix("torch."), tuple(value.shape)))
                    tensors.append(value)
                elif isinstance(value, _SCALARS):
                    entries.append(Moment(key, value=value))
                else:
                    kind = type(stage.optimizer).__name__
                    why = f"{key!r} of {kind} is a {type(value).__name__}, which is not carried between stages"
            told.append(entries)
        self.exchange.set(self._key(self.links.stage, part), encode((why, told)))
        if not why:
            self.give_tensors(tensors)

    def take_moments(self, stage: int, part: StagePart) -> list[dict[str, Any]]:
        data = self.exchange.get(self._key(stage, part), limit_s=OTHERS_S)
        why, told = decode(data, tuple[str, list[list[Moment]]])
        if why:
            raise NoGood(f"stage {stage}: {why}")
        states: list[dict[str, Any]] = []
        for entries in told:
            state: dict[str, Any] = {}
            for one in entries:
                state[one.key] = one.value
                if one.dtype:
                    (state[one.key],) = self.take_tensors([torch.empty(one.shape, dtype=getattr(torch, one.dtype))], stage)
            states.append(state)
        return states

    def _key(self, giver: int, part: StagePart) -> str:
        return f"moments/{part}/{giver}/{self.away}"


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return type(value) is not Counter and all(type(key) is str and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in _SCALARS


def _as_type(value: object, like: object) -> object:
    return tuple(value) if isinstance(like, tuple) and isinstance(value, list) else value
