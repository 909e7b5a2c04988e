"""Composite tensors: tensors of a class with `__tensor_flatten__`, which are several tensors inside. [UCF-108..110]

    OptimState8bit of shape (64, 256)      -> state.codes, state.scale, state.qmap: an array each, with the attribute
                                              `composition`: class, outer shape and element type, context, this part

Compositions are compared when a composite is loaded into one that is there; where none is there, one is made by the class's
own `__tensor_unflatten__`. Its class must be loaded already: no module is loaded because a checkpoint names it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from elastickpt.errors import Malformed
from elastickpt.format.arrays import ArrayId
from elastickpt.format.encode_values import typed_key
from elastickpt.format.values import DtypeValue, Value
from elastickpt.training.contexts import NotMade, context_from, described, description_text, outer_shapes
from elastickpt.training.elements import PLAIN, Attributes, is_loaded_instance, settled
from elastickpt.training.trees import loaded_class, type_name

COMPOSITION = "composition"
Path = tuple[str, ...]


SPARSE = "torch.sparse_coo"  # the class of a sparse tensor: its indices and values


def is_sparse(tensor: torch.Tensor) -> bool:
    """Whether it is a sparse tensor in coordinates, whose parts have other shapes from step to step."""
    return tensor.layout is torch.sparse_coo


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether it is made of several tensors. A DTensor is not: its parts are on other ranks."""
    if is_sparse(tensor):
        return True
    if type(tensor) in PLAIN:
        return False
    wrapper: bool = is_traceable_wrapper_subclass(tensor)  # its TypeIs says that no Tensor can be one
    return wrapper and not is_loaded_instance(tensor, "torch.distributed.tensor", "DTensor")


def parts_of(tensor: torch.Tensor) -> tuple[tuple[str, torch.Tensor], ...]:
    """The tensors that a composite tensor is made of, by name, in its own order."""
    if is_sparse(tensor):
        return (("indices", tensor._indices()), ("values", tensor._values()))
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return tuple((name, settled(getattr(tensor, name))) for name in names)


def _context_of(tensor: torch.Tensor) -> Any:
    return {"coalesced": tensor.is_coalesced()} if is_sparse(tensor) else cast(Any, tensor).__tensor_flatten__()[1]


def class_of(tensor: torch.Tensor) -> str:
    """The name of a composite tensor's class."""
    return SPARSE if is_sparse(tensor) else type_name(type(tensor))


def leaves_of(tensor: torch.Tensor) -> list[tuple[Path, torch.Tensor]]:
    """The same through composites inside; a plain tensor is its own only part, at path ()."""
    if not is_composite(tensor):
        return [((), tensor)]
    return [((name, *path), leaf) for name, part in parts_of(tensor) for path, leaf in leaves_of(part)]


def composition_of(tensor: torch.Tensor, *, where: object, shape: Sequence[int] | None = None) -> dict[str, Value]:
    """What a composite tensor is beside the elements of its parts, in plain values. `shape` is the whole's, for a shard.

    Raises ValueNotCarried, naming `where`, for a context that has no description.
    """
    local = tuple(tensor.shape)
    whole = local if shape is None else tuple(shape)
    cuts = cuts_of(tensor)
    follows = local if cuts is not None and cuts.context_follows else None
    return {
        "class": class_of(tensor),
        "shape": list(whole),
        "dtype": DtypeValue(str(tensor.dtype).removeprefix("torch.")),
        "context": described(_context_of(tensor), follows, f"tensor {where}: the context of its {class_of(tensor)}"),
        "parts": [[name, _nested(part, local, whole, f"{where}, part {name!r}")] for name, part in parts_of(tensor)],
    }


def _nested(part: torch.Tensor, local: tuple[int, ...], whole: tuple[int, ...], where: str) -> Value:
    if not is_composite(part):
        return None
    return composition_of(part, where=where, shape=whole if tuple(part.shape) == local else None)


def attributes_of(composition: Value, path: Path) -> Attributes:
    """The attribute of the array of one part."""
    return ((COMPOSITION, {**cast(dict[str, Value], composition), "part": list(path)}),)


def composition_in(attributes: Mapping[str, Value]) -> tuple[dict[str, Any] | None, Path]:
    """The composition that an array's attributes have, and which part of it the array is; (None, ()) for a plain tensor.

    Raises Malformed for one that is none. [UCF-108]
    """
    found = attributes.get(COMPOSITION)
    if found is None:
        return None, ()
    members = ["class", "shape", "dtype", "context", "parts", "part"]
    if not isinstance(found, dict) or set(found) != set(members):
        raise Malformed(f"attribute {COMPOSITION!r}: expected an object with {', '.join(members)}")
    path, shape = found["part"], found["shape"]
    named = isinstance(path, list) and path and all(isinstance(one, str) and one for one in path)
    shaped = isinstance(shape, list) and all(type(one) is int and one >= 0 for one in shape)
    if not (named and shaped and isinstance(found["class"], str) and isinstance(found["dtype"], DtypeValue)):
        raise Malformed(f"attribute {COMPOSITION!r}: expected texts, extents, an element type and the path of a part")
    return {key: value for key, value in found.items() if key != "part"}, tuple(path)


# -- made anew ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A composite tensor of a checkpoint: its composition, and the array of each part."""

    composition: Mapping[str, Any]
    parts: Mapping[Path, ArrayId]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(self.composition["shape"])

    @property
    def text(self) -> str:
        """For messages."""
        return f"a {self.composition['class']} of shape {self.shape}"


def differing(live: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, str]:
    """What is expected and what was found, where two compositions differ first."""
    for what in ("class", "shape", "dtype", "parts", "context"):
        if typed_key(live[what]) != typed_key(saved[what]):
            return f"a composite tensor of {what} {description_text(live[what])}", f"{what} {description_text(saved[what])}"
    return "the same composition", "the same"


def made(
    composition: Mapping[str, Any],
    parts: Mapping[Path, torch.Tensor],
    *,
    shape: Sequence[int],
    peers: Iterable[torch.Tensor] = (),
) -> torch.Tensor:
    """A composite tensor of these parts, by its class's own `__tensor_unflatten__`. `shape` is its own (a shard's).

    Where its context has no plain value, that of a peer of the same class with the same description is taken. Raises NotMade.
    """
    if composition["class"] == SPARSE:
        coalesced = bool(context_from(composition["context"], (), torch.device("cpu"))["coalesced"])
        return torch.sparse_coo_tensor(
            parts["indices",], parts["values",], tuple(shape), is_coalesced=coalesced, check_invariants=False
        )
    cls = loaded_class(composition["class"])
    if cls is None or not issubclass(cls, torch.Tensor) or not hasattr(cls, "__tensor_unflatten__"):
        raise NotMade(f"this process has loaded no class {composition['class']}: import its module before loading")
    inner = {}
    for name, nested in composition["parts"]:
        below = {path[1:]: part for path, part in parts.items() if path[0] == name}
        if nested is None:
            inner[name] = below[()]
        else:
            own = shape if nested["shape"] == composition["shape"] else nested["shape"]
            inner[name] = made(nested, below, shape=own, peers=peers)
    outer = tuple(shape)
    device = next(iter(parts.values())).device
    try:
        context = context_from(composition["context"], outer, device)
    except NotMade:
        context = _peer_context(cls, composition, outer, peers)
    stride = torch.empty(outer, device="meta").stride()
    found: torch.Tensor = cast(Any, cls).__tensor_unflatten__(inner, context, torch.Size(outer), stride)
    return found


def _peer_context(cls: type, composition: Mapping[str, Any], outer: tuple[int, ...], peers: Iterable[torch.Tensor]) -> Any:
    wanted = typed_key(composition["context"])
    for peer in peers:
        if type(peer) is cls and tuple(peer.shape) == outer and typed_key(composition_of(peer, where="")["context"]) == wanted:
            return _context_of(peer)
    raise NotMade(
        f"what a {composition['class']} keeps beside its tensors ({description_text(composition['context'])}) cannot be made "
        f"from a checkpoint"
    )


def require_indices(indices: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises Malformed where an index of a sparse tensor of this shape lies outside of it."""
    for axis, extent in zip(indices, shape, strict=False):
        if axis.numel() and not (int(axis.min()) >= 0 and int(axis.max()) < extent):
            raise Malformed(f"a sparse tensor of shape {tuple(shape)}: an index outside of it")


# -- shards ------------------------------------------------------------------------------------------------------------

CompositeCut = (
    Literal["same", "fixed"] | Fraction
)  # of a part: cut as the whole is; not cut; so many rows for each row of the whole


@dataclass(frozen=True, slots=True)
class Cuts:
    """How the parts of a composite tensor go with its rows (its first axis), and whether the shape in its context does."""

    by_path: Mapping[Path, CompositeCut]
    context_follows: bool


_CUTS: OrderedDict[object, Cuts | None] = OrderedDict()


def cuts_of(tensor: torch.Tensor) -> Cuts | None:
    """How a composite tensor's parts are cut when its rows are; None where its class does not say.

    Asked of the class itself: some rows of it are taken by its own slicing, as resharding by torch would.
    """
    if is_sparse(tensor):
        return None
    leaves = leaves_of(tensor)
    key = (type(tensor), tuple(tensor.shape), tuple((path, tuple(leaf.shape)) for path, leaf in leaves))
    if key not in _CUTS:
        _CUTS[key] = _probed(tensor, leaves)
        while len(_CUTS) > 1024:
            _CUTS.popitem(last=False)
    return _CUTS[key]


def _probed(tensor: torch.Tensor, leaves: Sequence[tuple[Path, torch.Tensor]]) -> Cuts | None:
    rows = tensor.shape[0] if tensor.ndim else 0
    for some in _fewer(rows):
        for first_rows in (_sliced, _split):
            try:
                with torch.no_grad():
                    sliced = first_rows(tensor, some)
            except Exception:  # whatever a class raises for what it does not take
                continue
            if type(sliced) is not type(tensor) or sliced.shape != (some, *tensor.shape[1:]):
                return None
            after = dict(leaves_of(sliced))
            cuts = {path: _cut(leaf, after.get(path), tuple(tensor.shape), some) for path, leaf in leaves}
            return None if None in cuts.values() else Cuts(cast(dict[Path, CompositeCut], cuts), _follows(tensor, sliced))
    return None


def _sliced(tensor: torch.Tensor, some: int) -> torch.Tensor:
    found: torch.Tensor = torch.ops.aten.slice.Tensor(tensor, 0, 0, some)
    return found


def _split(tensor: torch.Tensor, some: int) -> torch.Tensor:
    """As `fully_shard` cuts a parameter."""
    found: torch.Tensor = torch.split(tensor, some)[0]
    return found


def _follows(tensor: torch.Tensor, sliced: torch.Tensor) -> bool:
    before, after = (outer_shapes(described(_context_of(one), tuple(one.shape), "")) for one in (tensor, sliced))
    return 0 < before == after


def _fewer(rows: int) -> list[int]:
    """Numbers of rows below all of them: halves first, as blocks end there, then thirds and the like."""
    found = []
    half = rows
    while half > 1:
        half = -(-half // 2)
        found.append(half)
    return [*found[:16], *(rows // ways for ways in (3, 5, 7) if rows > ways and rows % ways == 0)]


def _cut(before: torch.Tensor, after: torch.Tensor | None, outer: tuple[int, ...], some: int) -> CompositeCut | None:
    if after is None:
        return None
    if after.shape == before.shape:
        return "fixed"
    if tuple(before.shape) == outer:
        return "same"
    if before.ndim == 0 or after.shape[1:] != before.shape[1:] or after.shape[0] * outer[0] != before.shape[0] * some:
        return None
    return Fraction(before.shape[0], outer[0])
