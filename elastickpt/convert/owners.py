"""Whose a state is: from the name or number that an optimizer has for a parameter to the tensor of a model that is meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from elastickpt.convert.local_tensors import Local, LocalRank
from elastickpt.errors import ProgramFault, Refused
from elastickpt.foreign.listing import LocalName
from elastickpt.language.holders import LocalShape
from elastickpt.language.orders import counted, written_names
from elastickpt.language.rules import Rules

OwnerKey = tuple[str, str, int]  # item, local name and chunk of a value


class Owners:
    """Of one rank. `values` are its parameters and buffers in the order of its file."""

    def __init__(self, rules: Rules, rank: LocalRank, values: Sequence[Local]) -> None:
        self._rules, self._rank, self._values = rules, rank, values
        self._chunks = {(one.item, str(one.name)): one.chunk for one in values}
        self._orders: dict[str, tuple[Local, ...]] = {}
        self._models: dict[str, str] = {}
        self.notes: list[str] = []

    def find(self, optimizer: str, name: LocalName) -> OwnerKey:
        """Raises ProgramFault where an optimizer counts and no order says how, Refused for a number beyond it."""
        if isinstance(name, str):
            model = self.model_of(optimizer)
            return model, name, self._chunks.get((model, name), 0)
        if optimizer not in self._orders:
            self._orders[optimizer] = self._order(optimizer)
        order = self._orders[optimizer]
        if name >= len(order):
            raise Refused(f"{self._rank.where}: {optimizer} counts to {name}, its order has {len(order)} names")
        return order[name].item, str(order[name].name), order[name].chunk

    def model_of(self, optimizer: str) -> str:
        """The model whose parameters an optimizer names.

        Of several with the same names and shapes it is the one beside the optimizer, else the one called `model`, else the one
        of the shortest name, which a note says.
        """
        if optimizer not in self._models:
            states = [one for one in self._rank.tensors if one.item == optimizer and isinstance(one.name, str)]
            groups = [group for group in self._rank.groups if group.item == optimizer]
            names = {str(one.name) for one in states} | {str(name) for group in groups for name in group.members}
            self._models[optimizer] = self._chosen(optimizer, names, states)
        return self._models[optimizer]

    def _chosen(self, optimizer: str, names: Iterable[str], states: Sequence[Local] = ()) -> str:
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for one in self._values:
            shapes.setdefault(one.item, {})[str(one.name)] = one.shape
        if len(shapes) < 2:
            return next(iter(shapes), "model")
        wanted = set(names)
        fits = {
            item: (
                len(wanted & known.keys()),
                sum(one.shape == known.get(str(one.name)) for one in states),
                _shared(optimizer, item),
            )
            for item, known in shapes.items()
        }
        best = max(fits.values())
        chosen = sorted((item for item, fit in fits.items() if fit == best), key=lambda one: (not _is_main(one), len(one), one))
        if len(chosen) > 1:
            self.notes.append(
                f"{optimizer}: {', '.join(chosen)} have the names that it has; its states are taken for those of {chosen[0]}"
            )
        return chosen[0]

    def _order(self, optimizer: str) -> tuple[Local, ...]:
        members = [member for group in self._rank.groups if group.item == optimizer for member in group.members]
        order = self._rules.orders.get(optimizer)
        if order is None:
            raise ProgramFault(_wanted_order(optimizer, self._rank, members))
        if isinstance(order.by, tuple):
            shapes = [LocalShape(one.item, str(k), one.shape, one.chunk) for k, one in enumerate(self._values)]
            found = tuple(self._values[int(k)] for k in counted(order, self._rules, shapes, {}))
        else:
            by_name = self._by_name(optimizer, written_names(order))
            named = [LocalShape(one.item, name, one.shape, one.chunk) for name, one in by_name.items()]
            found = tuple(by_name[name] for name in counted(order, self._rules, named, {}))
        if members and len(found) != len(members):
            said = (
                f"order {optimizer!r} has {len(found)} names, the files count {len(members)} parameters in {self._rank.where}"
            )
            raise self._rules.scope.fault(said, order.at)
        return found

    def _by_name(self, optimizer: str, by: Sequence[str]) -> Mapping[str, Local]:
        """Values by name, and by "item/name", which an order may write where two models have a name."""
        model = self._chosen(optimizer, by)
        found = {f"{one.item}/{one.name}": one for one in self._values}
        found.update({str(one.name): one for one in self._values if one.item != model})
        found.update({str(one.name): one for one in self._values if one.item == model})
        return found


def _is_main(item: str) -> bool:
    return item.rpartition(".")[2] == "model"


def _shared(optimizer: str, model: str) -> int:
    """How many parts at the begin of their paths are the same."""
    count = 0
    for one, other in zip(optimizer.split("."), model.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def _wanted_order(item: str, rank: LocalRank, members: Sequence[LocalName]) -> str:
    """A refusal with a clause to fill in."""
    shapes = {one.name: one.shape for one in rank.tensors if one.item == item and one.state == "exp_avg"}
    shapes = shapes or {one.name: one.shape for one in rank.tensors if one.item == item and one.shape != ()}
    numbers = sorted({*(m for m in members if isinstance(m, int)), *(n for n in shapes if isinstance(n, int))})
    lines = [f"    NAME    # {number}{f', shape {shapes[number]}' if number in shapes else ', no state'}" for number in numbers]
    return (
        f"{rank.where}: {item} counts its parameters, in which order is in no file: give --rules a program with this, or "
        f"leave them out with --skip:\norder {item}:\n" + "\n".join(lines)
    )
