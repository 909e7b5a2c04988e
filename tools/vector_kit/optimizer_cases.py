"""A checkpoint of two optimizers in one item: what stands in the table, and what in values. A feature of `requires`."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vector_kit.checkpoints import Parts, base, build, vector
from tools.vector_kit.kit import Json, Record, Vector, canonical, column

ITEM = {"name": "optimizer", "kind": "optimizer", "type": "a list of 2"}


def _field(key: str, of_v: Json, of_w: Json) -> Record:
    """A state without axes of the parameters `v` and `w`; None where one has none."""
    there = [value for value in (of_v, of_w) if value is not None]
    which = [there.index(value) if value is not None else -1 for value in (of_v, of_w)]
    return {"kind": "scalar", "key": key, "values": canonical(there), "which": column(which)}


def _table() -> Record:
    """Both parameters are the first part's, which has states of `w` alone; those of `v` are the second part's, under their own
    names. `fast` stands in the second one's state dict alone."""
    way = {"path": ["fast"], "by": "place", "part": "1", "state": None}
    fields = [
        {"kind": "hyper", "key": "lr", "values": "[0.5]", "which": column([0, 0])},
        _field("@part", "1", None),
        _field("fast", 2.5, None),
        _field("fast@in", way, None),
        _field("step", 1.0, 2.0),
    ]
    return {"item": "optimizer", "models": ["model"], "model": column([0, 0]), "names": ["v", "w"], "fields": fields}


def _two_optimizers(parts: Parts) -> None:
    parts.manifest["requires"] = ["optimizer-parts"]
    parts.manifest["items"] = [*parts.manifest["items"], ITEM]
    parts.manifest["values"] = {**parts.manifest["values"], "/optimizer/1/count@per-rank": True}
    own = {
        "/optimizer/1/count": 3,
        "/optimizer/1/param_groups/1": {"lr": 0.25},
        "/optimizer/@entries": {"/optimizer/1/count": ["1", "count"]},
        "/scheduler/@lists": {"/base_lrs": [0.5]},
    }
    parts.index["tables"] = [_table()]
    for record in parts.maps:
        record.update(tables=[_table()], values=canonical(own))


def vectors() -> Iterator[Vector]:
    about = "Two optimizers in one item, with an entry of a state dict, a group without parameters and a scheduler's lists."
    rules = "UCF-150 UCF-151 UCF-152 UCF-153 UCF-154 UCF-100"
    arrays = {array.key: {"dtype": array.dtype, "shape": array.shape, "hex": array.data.hex()} for array in base().arrays}
    files = build(records=_two_optimizers)
    yield vector("valid", "optimizer-parts", about, rules, files, expect={"arrays": arrays})
