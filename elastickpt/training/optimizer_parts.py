"""What an entry of `state` with optimizers consists of: optimizers, and optimizers inside them.

    entry                              parts (path)
    AdamW                              AdamW ("")
    [Muon, AdamW]                      Muon ("0"), AdamW ("1")
    Lookahead(optimizer=AdamW)         Lookahead (""), AdamW ("optimizer")
    a wrapper that delegates `state`   the wrapper (""): what is inside holds nothing of its own

An optimizer is looked for in the attributes of another one, and in lists and dicts there. One whose parameters are not all
known (it trains something of its own) is no part: what the outer one's state dict has of it is carried as that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from elastickpt.errors import ValueNotCarried
from elastickpt.training.entries import elements
from elastickpt.training.parameters import Identities, OwnedParameter, groups_of, owned_parameters, states_of


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerPart:
    """An optimizer with states of its own. `root` is the optimizer of the entry that it is or stands in, at `root_path`.

    `own_groups` says that its param groups are no other part's. `delegates` are optimizers whose states these are too.
    """

    path: str
    root_path: str
    root: Optimizer
    optimizer: Optimizer
    params: tuple[OwnedParameter, ...]
    own_groups: bool
    delegates: tuple[Optimizer, ...]

    @property
    def outermost(self) -> bool:
        """Whether it is what the user has put into `state`."""
        return self.optimizer is self.root


def parts_of(
    item: str, entry: object, identities: Identities, *, elsewhere: frozenset[int] = frozenset()
) -> tuple[OptimizerPart, ...]:
    """All parts of an entry, outer ones first. `elsewhere` are ids of optimizers that are entries of `state` themselves.

    Raises what `owned_parameters` does for optimizers that the user has put there; ValueNotCarried for one without states and
    groups that offers no state dict of its own either.
    """
    found: list[OptimizerPart] = []
    seen = set(elsewhere)
    roots = elements(entry)
    seen.update(id(root) for root in roots.values())
    states: set[int] = set()
    groups: set[int] = set()
    for root_path, root in roots.items():
        inside = list(_inside(root, root_path, seen))
        _require_something(item, root)
        own = states_of(root)
        states.add(id(own))
        delegates = tuple(one for _, one in inside if states_of(one) is own)
        found.append(OptimizerPart(root_path, root_path, root, root, owned_parameters(item, root, identities), True, delegates))
        groups.update(id(group) for group in groups_of(root))
        for path, one in inside:
            if id(states_of(one)) in states or not _all_known(one, identities):
                continue
            states.add(id(states_of(one)))
            same = tuple(other for _, other in inside if other is not one and states_of(other) is states_of(one))
            own_groups = not any(id(group) in groups for group in groups_of(one))
            groups.update(id(group) for group in groups_of(one))
            found.append(OptimizerPart(path, root_path, root, one, owned_parameters(item, one, identities), own_groups, same))
    return tuple(found)


def optimizers_inside(entry: object) -> Iterator[Optimizer]:
    """Every optimizer of an entry and inside of one, each once."""
    roots = elements(entry)
    seen = {id(root) for root in roots.values()}
    for path, root in roots.items():
        yield root
        yield from (one for _, one in _inside(root, path, seen))


def _inside(optimizer: Optimizer, path: str, seen: set[int]) -> Iterator[tuple[str, Optimizer]]:
    for name, value in vars(optimizer).items():
        for where, one in _optimizers_in(value, name):
            if id(one) not in seen:
                seen.add(id(one))
                below = f"{path}.{where}" if path else where
                yield below, one
                yield from _inside(one, below, seen)


def _optimizers_in(value: object, name: str) -> Iterable[tuple[str, Optimizer]]:
    if isinstance(value, Optimizer):
        return ((name, value),)
    if type(value) is dict and all(isinstance(one, Optimizer) for one in value.values()):
        return tuple((f"{name}.{key}", one) for key, one in value.items())
    if isinstance(value, (list, tuple)) and all(isinstance(one, Optimizer) for one in value):
        return tuple((f"{name}.{index}", one) for index, one in enumerate(value))
    return ()


def _all_known(optimizer: Optimizer, identities: Identities) -> bool:
    ids: set[int] = set()
    for group in groups_of(optimizer):
        for parameter in group["params"]:
            known = identities.find(parameter)
            if known is None or known.role == "buffer":
                return False
            ids.add(id(parameter))
    return all(id(key) in ids for key in states_of(optimizer) if isinstance(key, torch.Tensor))


def _require_something(item: str, optimizer: Optimizer) -> None:
    if hasattr(optimizer, "param_groups") or type(optimizer).state_dict is not Optimizer.state_dict:
        return
    raise ValueNotCarried(
        f"optimizer {item!r}: a {type(optimizer).__name__} without `param_groups`, and without a state_dict of its own; "
        f"its __init__ did not call that of torch.optim.Optimizer"
    )


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before a part's names; names that begin with one of `others` are another part's."""

    text: str
    others: tuple[str, ...] = ()

    def strip(self, stored: str) -> str | None:
        """The part's own name; None for one that is not its."""
        if not stored.startswith(self.text) or (self.others and stored.startswith(self.others)):
            return None
        return stored[len(self.text) :]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What stands before a part's names: of options, of states, and of states that belong to no parameter."""

    options: str
    states: str
    values: str


def prefixes_of(parts: Sequence[OptimizerPart]) -> dict[str, Prefixes]:
    """By path: "" for a part that has a parameter for itself, else "<path>." for one after a part that has states, or options,
    of the same parameter.

    Told from what the parts hold now. A part with groups of its own has options, so a reader sees which of both it is; for
    states the table says it (`optimizers`).
    """
    with_options: set[int] = set()
    with_states: set[int] = set()
    found: dict[str, Prefixes] = {}
    for part in parts:
        own, after = {id(param.parameter) for param in part.params}, f"{part.path}."
        found[part.path] = Prefixes(
            after if own & with_options else "", after if own & with_states else "", after if part is not parts[0] else ""
        )
        states, groups = states_of(part.optimizer), groups_of(part.optimizer)
        for param in part.params:
            if part.own_groups and groups[param.group].keys() - NO_OPTION:
                with_options.add(id(param.parameter))
            if states.get(param.parameter):
                with_states.add(id(param.parameter))
    return found


NO_OPTION = frozenset(("params", "param_names"))
