"""Models that load by themselves: their own `load_state_dict`, with all overrides and hooks, runs as torch runs it.

    read in place    what has its name, shape and element type in the checkpoint: tensors of the state dict are the model's own
    renamed          what a hook brings under another name unchanged: read into the model's own tensor under the old name
    handed over      own entries; what a hook makes anew; what the module's own code resizes: read into new tensors
    ------------------> load_state_dict({the model's own keys, keys that only the checkpoint has, own entries})

Names that differ are rehearsed without contents, so that what the model would not take is refused before anything changes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from elastickpt.errors import StateMismatch
from elastickpt.format.arrays import ArrayId, ArraySpec, Box
from elastickpt.format.values import ArrayReference, Value
from elastickpt.training.binder import Binder
from elastickpt.training.dtensors import placed
from elastickpt.training.elements import torch_dtype
from elastickpt.training.entries import below, collectives_refused, covering, own_state_dict, titled
from elastickpt.training.held import HeldArray
from elastickpt.training.known_memory import KnownMemory
from elastickpt.training.modules import ExtraState, HeldModule, ModulePart
from elastickpt.training.naming import ModuleKeys, unwrapped
from elastickpt.training.own_state import PER_RANK, VERSION
from elastickpt.training.rehearsal import Rehearsed, hollow, load_entries, rehearse
from elastickpt.training.tree_binding import bind_tree
from elastickpt.training.values import mapped, place_of, revived, shown


def bind_model(binder: Binder, model: HeldModule) -> None:
    """Binds parameters, buffers, extra states and own entries of one item; nothing changes before `install()`."""
    item = model.item.name
    loading = [_OwnLoading(binder, item, part, model) for part in model.parts if part.loaders]
    theirs = {name for one in loading for name in one.part.names}
    binder.fill_many(held for held in model.arrays if held.spec.id.name not in theirs)
    binder.places.update(place for place in binder.listing.values if place.startswith(place_of(item, VERSION, "")))
    binder.installs.append(model.reshard)
    for extra in model.extra_states:
        if not any(one.sets(extra) for one in loading):
            bind_extra_state(binder, extra)
    for one in loading:
        one.bind()
    for part in model.parts:
        if not part.loaders:
            for entry in part.entries:
                binder.missing(place_of(item, entry.key), shown(entry.value))


def bind_extra_state(binder: Binder, extra: ExtraState) -> None:
    """Gives a module its extra state by its own `set_extra_state`."""
    found = extra_state_of(binder, extra)
    if found:
        binder.installs.append(lambda: extra.module.set_extra_state(found[0]))


def extra_state_of(binder: Binder, extra: ExtraState) -> tuple[object, ...]:
    """The extra state that the checkpoint has for a module, or () with a mismatch recorded."""
    what = f"extra state of a {type(extra.module).__name__}"
    item = extra.pointer.split("/")[1]
    return tuple(
        bind_tree(binder, item, value, place=extra.pointer, live=None) for value in of_ranks(binder, extra.pointer, what)
    )


def of_ranks(binder: Binder, place: str, what: str) -> tuple[Value, ...]:
    """What every rank has of its own at a place: this rank's on the same layout, else what all agree on. () is a mismatch."""
    if binder.listing.same_layout:
        own = binder.of_writer(binder.job.rank)
        saved = [own[place]] if place in own else []
    else:
        saved = binder.of_all_writers(place)
    if not saved:
        binder.missing(place, f"the {what}")
    elif not binder.is_one(saved):
        binder.differs(
            place,
            "value",
            expected=f"one {what} for all ranks, on another layout",
            found=f"{len(saved)} that differ; it can be loaded on the layout that saved it",
        )
    else:
        return (saved[0],)
    return ()


class _OwnLoading:
    """One part of a model that loads by itself. Keys are those of its own state dict, names are canonical."""

    def __init__(self, binder: Binder, item: str, part: ModulePart, model: HeldModule) -> None:
        self.part = part
        self._binder, self._item, self._model = binder, item, model
        self._top = unwrapped(part.module)
        self._keys = ModuleKeys(self._top)
        model.reshard()
        self._own = own_state_dict(self._top, name="", root=True)
        self._names = {key: self._keys.follow(key).name for key in self._own}
        self._key_of = {name: key for key, name in self._names.items()}
        self._memory = KnownMemory(part.names.values())
        self._given: dict[str, Any] = {}  # key -> what is handed over
        self._elsewhere: set[int] = set()  # tensors that get nothing under their own name
        self._absent: dict[str, HeldArray] = {}  # name -> what only the model's own code can supply, or resize
        self._only_there: dict[str, ArraySpec] = {}  # key -> array that only the checkpoint has

    def sets(self, extra: ExtraState) -> bool:
        """Whether the extra state belongs to a module of this part, whose loading sets it."""
        return any(module is extra.module for module in self._top.modules())

    # -- before anything changes ---------------------------------------------------------------------------------------

    def bind(self) -> None:
        for extra in self._model.extra_states:
            if self.sets(extra):
                self._bind_extra_state(extra)
        self._bind_tensors()
        trees = dict(self._entries())
        if self._absent or self._only_there or trees.keys() - self._own.keys():
            self._settle(rehearse(self._top, self._hollow(trees)), trees)
        for key, (place, found) in trees.items():
            self._binder.places.add(place)
            live = mapped(self._own.get(key), place, _fresh)
            self._given[key] = bind_tree(self._binder, self._item, found, place=place, live=live)
        self._binder.installs.append(self._load)

    def _bind_extra_state(self, extra: ExtraState) -> None:
        name = next((name for name, module in self._top.named_modules() if module is extra.module), "")
        for found in extra_state_of(self._binder, extra):
            self._given[f"{below(name)}_extra_state"] = found

    def _bind_tensors(self) -> None:
        binder, count = self._binder, Counter(held.spec.id.name for held in self._model.arrays)
        for held in self._model.arrays:
            name, found = held.spec.id.name, binder.names.arrays(held.spec.id)
            if name not in self.part.names:
                continue
            fits = bool(found) and binder.listing.arrays[found[0]].shape == held.spec.shape
            if not fits:
                self._elsewhere.add(id(self.part.names[name]))
            if fits or count[name] > 1 or not covering(self.part.loaders, name):
                binder.fill(held)
            else:
                self._absent[name] = held
        for id_, spec in binder.listing.arrays.items():
            mine = (id_.section, id_.item, id_.state) == ("params", self._item, "value") and not self._known(id_)
            if mine and covering(self.part.loaders, id_.name):
                self._only_there[self._keys.key_of(id_.name)] = spec

    def _known(self, id_: ArrayId) -> bool:
        names = self._binder.names.candidates(id_.item, id_.name)
        return any(item == self._item and name in self._model.names for item, name in names)

    def _entries(self) -> Iterator[tuple[str, tuple[str, Value]]]:
        """(key, (place, tree)) of the own entries that the checkpoint has; a mismatch for each that it lacks. [UCF-141]"""
        binder, there = self._binder, _own_places(self._binder, self._item)
        for entry in self.part.entries:
            if entry.key not in there:
                binder.missing(place_of(self._item, entry.key), shown(entry.value))
        for name, place in there.items():
            if not covering(self.part.loaders, name):
                continue
            key, own = self._key_of.get(name) or self._keys.key_of(name), place.removesuffix(PER_RANK)
            if own == place:
                yield key, (place, binder.listing.values[place])
            elif binder.listing.same_layout and name not in self._key_of and own not in binder.of_writer(binder.job.rank):
                binder.places.add(place)  # another rank's: a stage's, say
            else:
                binder.places.add(place)
                for found in of_ranks(binder, own, f"entry {name!r} of the model's own state dict"):
                    yield key, (place, found)

    def _hollow(self, trees: Mapping[str, tuple[str, Value]]) -> dict[str, Any]:
        """What would be loaded, without contents."""
        entries: dict[str, Any] = OrderedDict()
        entries._metadata = self._metadata()  # type: ignore[attr-defined]
        arrays, names = self._binder.listing.arrays, self._binder.names

        def leaf(one: object, where: str) -> object:
            id_ = names.array(ArrayId("extra", one.item, one.name, "")) if type(one) is ArrayReference else None
            return revived(one) if id_ is None else _like(arrays[id_], "meta")

        for key, value in self._in_place():
            entries[key] = hollow(value)
        for name, held in self._absent.items():
            for id_ in names.arrays(held.spec.id)[:1]:
                entries[self._key_of.get(name) or self._keys.key_of(name)] = _like(arrays[id_], "meta")
        entries.update({key: _like(spec, "meta") for key, spec in self._only_there.items()})
        entries.update({key: mapped(found, "", leaf) for key, (_, found) in trees.items()})
        entries.update(self._given)
        return entries

    def _metadata(self) -> dict[str, Any]:
        """What torch hands to each module's loading beside the contents: the versions that saved them. [UCF-142]"""
        found = {name: dict(own) for name, own in getattr(self._own, "_metadata", {}).items()}
        for key, _ in self._top.named_modules(remove_duplicate=False):
            name = self._keys.follow(f"{key}.x" if key else "x").name.removesuffix("x").removesuffix(".")
            version = self._binder.listing.values.get(place_of(self._item, VERSION, name))
            if name in self.part.loaders and type(version) is int:
                found.setdefault(key, {})["version"] = version
        return found

    def _in_place(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The entries of the own state dict that show the model's memory, which the checkpoint's contents are read into."""
        for key, name in self._names.items():
            tensor, value = self.part.names.get(name), self._own[key]
            if tensor is not None:
                if id(tensor) not in self._elsewhere:
                    yield key, tensor.detach()
            elif isinstance(value, torch.Tensor) and self._memory.covers(value):
                yield key, value

    def _settle(self, said: Rehearsed | None, trees: dict[str, tuple[str, Value]]) -> None:
        """Decides what becomes of what differs: read in place under the old name, handed over, or a mismatch."""
        binder = self._binder
        if said is not None:
            self._follow_renames(said)
            for strange in said.unexpected:
                self._only_there.pop(strange, None)
                trees.pop(strange, None)
        elif binder.job.world_size > 1 and not self._absent:
            self._only_there.clear()  # other stages', as likely as not
        for name, held in list(self._absent.items()):
            found, key = binder.names.arrays(held.spec.id), self._key_of.get(name)
            taken = said is None or (not said.refused and key not in said.missing)
            if not taken or key is None or placed(self.part.names[name]) is not None:
                binder.fill(self._absent.pop(name))
            elif found:
                self._hand_over(key, binder.listing.arrays[found[0]], self.part.names[name].device)
        if said is None or not said.refused:
            for only, spec in self._only_there.items():
                self._hand_over(only, spec, "cpu")

    def _follow_renames(self, said: Rehearsed) -> None:
        for to, of in said.renamed.items():
            name, spec = self._keys.follow(to).name, self._only_there.get(of)
            if name in self._absent and spec is not None:
                self._binder.names.alias((self._item, name), (self._item, spec.id.name))
                self._binder.fill(self._absent.pop(name))
                self._given[of] = self.part.names[name].detach()
                del self._only_there[of]

    def _hand_over(self, key: str, spec: ArraySpec, device: torch.device | str) -> None:
        """Reads an array into a new tensor."""
        made = self._given[key] = _like(spec, device)
        whole, rank = Box.whole(spec.shape), self._binder.job.rank
        self._binder.targets.append(HeldArray(spec, whole, made, "other", "declared", replicas=(rank,)))
        self._binder.know(spec.id)

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Runs the model's own loading; its tensors hold the checkpoint's contents."""
        what = f"the loading of {titled('', self._top)}"
        entries: dict[str, Any] = OrderedDict(self._in_place())
        entries._metadata = self._metadata()  # type: ignore[attr-defined]
        entries.update(self._given)
        with collectives_refused(what):
            _, unexpected = load_entries(self._top, entries)
        if unexpected:
            raise StateMismatch(f"{what} did not take {', '.join(map(repr, sorted(unexpected)))} of the checkpoint")


def _own_places(binder: Binder, item: str) -> dict[str, str]:
    """The names of an item's own entries in the checkpoint, and where each value, or the mark that ranks have them, stands."""
    above = place_of(item) + "/"
    places = [place for place in binder.listing.values if place.startswith(above)]
    places = [place for place in places if not place.startswith(f"{above}{VERSION}/")]
    return {place.removesuffix(PER_RANK).removeprefix(above).replace("~1", "/").replace("~0", "~"): place for place in places}


def _fresh(one: object, where: str) -> object:
    """What an own entry is read into: never the tensor that the module has now, which it may share with others."""
    return torch.empty_like(one) if isinstance(one, torch.Tensor) else one


def _like(spec: ArraySpec, device: torch.device | str) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
