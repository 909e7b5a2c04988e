"""Param groups put together again: options and schedulers' lists, from the columns of a checkpoint's table.

Groups keep their parameters; each gets the options that its parameters had, except how a step is executed (`foreach`,
`fused`, `capturable`, `differentiable`): that is this process's choice. [UCF-88]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from elastickpt.format.encode_values import typed_key
from elastickpt.format.tables import TableName
from elastickpt.format.values import ArrayReference, ArrayValue, EnumValue, Value
from elastickpt.training.binder import Binder
from elastickpt.training.elements import dtype_name
from elastickpt.training.optimizer_columns import group_place, options_of
from elastickpt.training.optimizer_parts import Prefix
from elastickpt.training.optimizer_states import Disagreement, OneValue, TableView
from elastickpt.training.tree_binding import bind_tree, copy_into
from elastickpt.training.trees import token
from elastickpt.training.values import member_of, shown, tensor_of

_EXECUTION = frozenset(("foreach", "fused", "capturable", "differentiable"))


Groups = Iterable[tuple[dict[str, Any], Sequence[TableName]]]


def bind_groups(binder: Binder, item: str, view: TableView, groups: Groups, path: str, prefix: Prefix) -> None:
    """Gives each live param group the options that its parameters, by their names in `view`, were saved with; `path` and
    `prefix` are those of the part whose groups they are.
    """
    saved = {key: stored for stored in view.keys("hyper") if (key := prefix.strip(stored)) is not None}
    for index, (group, names) in enumerate(groups):
        place = group_place(item, path, index)
        if not group["params"]:
            _bind_without_parameters(binder, group, place)
            continue
        if not names:
            binder.note(f"{place} has no parameter that is in the checkpoint: its options stay")
            continue
        live = dict(options_of(group))
        for key in dict.fromkeys((*saved, *live)):
            found = view.agreed("hyper", saved.get(key, key), names)
            where = f"{place}/{token(key)}"
            if isinstance(found, Disagreement):
                differ(binder, where, found)
            elif found is not None:
                _bind_option(binder, group, key, found, where)
            elif key in live:
                binder.note(f"{where} is not in the checkpoint: {shown(live[key])} stays")


def _bind_without_parameters(binder: Binder, group: dict[str, Any], place: str) -> None:
    """Gives a group without parameters the options that the group at its place was saved with, by this rank or alike by all."""
    agreed = binder.agreed_of_ranks(place)
    if not agreed:
        binder.note(f"{place} has no parameters, and the checkpoint has no such group there: its options stay")
        return
    saved: Any = agreed[0]
    for key, value in saved.items():
        _bind_option(binder, group, str(key), OneValue(value), f"{place}/{token(key)}")


def differ(binder: Binder, where: str, found: Disagreement) -> None:
    """Records that parameters of one group were saved with different values."""
    (first, second), (one, other) = (found.first, found.second), found.values
    binder.differs(
        where,
        "value",
        expected="one value for all parameters of the group",
        found=f"{shown(one)} for {'/'.join(first)}, {shown(other)} for {'/'.join(second)}",
    )


def _bind_option(binder: Binder, group: dict[str, Any], key: str, found: OneValue, where: str) -> None:
    live = group.get(key)
    if isinstance(live, torch.Tensor) and not isinstance(found.value, ArrayReference):
        if step := overwritten(binder, live, found.value, where):
            binder.installs.append(step)
        return
    if key in _EXECUTION and key in group:
        if typed_key(live) != typed_key(found.value):
            binder.note(f"{where}: {live!r} stays, as it is how a step is executed; the checkpoint has {found.value!r}")
        return
    if isinstance(found.value, EnumValue):
        member = member_of(live, found.value)
        if member is None:
            binder.differs(where, "value", expected=f"{shown(live)}, a member of the same class", found=shown(found.value))
        else:
            binder.installs.append(lambda: group.__setitem__(key, member))
        return
    device = live.device if isinstance(live, torch.Tensor) else "cpu"
    new = bind_tree(binder, where.split("/")[1], found.value, place=where, live=None, device=device)
    binder.installs.append(lambda: group.__setitem__(key, new))


def option_lists(names: Sequence[Sequence[TableName]], view: TableView, key: str) -> list[OneValue | Disagreement | None]:
    """A scheduler's list, put together from its entries for each group's parameters."""
    return [view.agreed("schedule", key, group) for group in names]


def overwritten(binder: Binder, live: torch.Tensor, found: Value, where: str) -> Callable[[], None] | None:
    """What brings a small plain tensor to a saved value in place; None, and a mismatch, where it cannot take it."""
    if isinstance(found, ArrayValue):
        if found.shape != tuple(live.shape):
            binder.differs(where, "shape", expected=str(tuple(live.shape)), found=str(found.shape))
            return None
        if found.dtype != dtype_name(live.dtype):
            if (same := _same_number(live, found)) is not None:
                return partial(_fill, live, same)
            binder.differs(where, "dtype", expected=str(live.dtype).removeprefix("torch."), found=found.dtype)
            return None
        return lambda: copy_into(live, found)
    if type(found) not in (int, float) or live.ndim:
        binder.differs(where, "value", expected=shown(live), found=shown(found))
        return None
    made = torch.tensor(found, dtype=live.dtype)
    if made.item() != found:
        binder.note(
            f"{where}: {found!r} (in the checkpoint) is rounded to {live.dtype}, the type of the tensor in this process"
        )
    return lambda: _fill(live, made)


def _same_number(live: torch.Tensor, found: ArrayValue) -> torch.Tensor | None:
    """A saved number of another element type in the floating one of the tensor, where it is the same number there."""
    number = None if live.ndim or not live.dtype.is_floating_point else tensor_of(found).item()
    if type(number) not in (int, float):
        return None
    made = torch.tensor(number, dtype=live.dtype)
    return made if made.item() == number else None


def _fill(live: torch.Tensor, made: torch.Tensor) -> None:
    with torch.no_grad():
        live.detach().copy_(made)
