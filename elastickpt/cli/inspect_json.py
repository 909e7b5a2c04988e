"""What `inspect --json` says: stable names, nothing for people. Fixed by spec/schemas/cli-inspect.schema.json. [CLI-21]"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from elastickpt.cli.facts import ArrayFact, Facts, OptimizerFact, Setting
from elastickpt.format.encode_values import encode_value
from elastickpt.format.records import Manifest
from elastickpt.format.values import Value

Json = dict[str, object]


def checkpoint_json(facts: Facts) -> Json:
    """The manifest, the arrays and the optimizers."""
    return {
        **_manifest(facts.manifest),
        "total": {
            "arrays": len(facts.every),
            "parameters": facts.parameters,
            "elements": facts.elements,
            "chunks": facts.chunks,
            "nbytes": facts.nbytes,
        },
        "arrays": [_array(fact) for fact in facts.arrays],
        "optimizers": [_optimizer(optimizer) for optimizer in facts.optimizers],
    }


def _manifest(manifest: Manifest) -> Json:
    return {
        "format": {"name": "elastickpt", "version": manifest.version, "requires": list(manifest.requires)},
        "attempt": manifest.attempt,
        "step": manifest.step,
        "time": manifest.time,
        "world_size": manifest.world_size,
        "placement": manifest.placement,
        "versions": dict(manifest.versions),
        "items": [{"name": item.name, "kind": item.kind, "type": item.type} for item in manifest.items],
        "meshes": [
            {"name": mesh.name, "axes": list(mesh.axes), "sizes": list(mesh.sizes), "ranks": list(mesh.ranks)}
            for mesh in manifest.meshes
        ],
        "tied": [[{"item": item, "name": name} for item, name in group] for group in manifest.tied],
        "layout_text": manifest.layout_text,
        "bases": [{"uri": base.uri, "digest": base.digest} for base in manifest.bases],
    }


def _array(fact: ArrayFact) -> Json:
    record = fact.record
    return {
        "key": record.key,
        "section": fact.id.section,
        "item": fact.id.item,
        "name": fact.id.name,
        "state": fact.id.state or None,
        "shape": list(record.spec.shape),
        "dtype": record.spec.dtype,
        "nbytes": fact.nbytes,
        "chunk_shape": list(record.chunk_shape),
        "chunks": fact.chunks,
        "writers": list(record.writers),
        "mesh": fact.mesh,
        "placements": None if fact.placements is None else list(fact.placements),
        "attributes": {name: encode_value(value, where=f"attribute {name}") for name, value in record.attributes},
    }


def _optimizer(optimizer: OptimizerFact) -> Json:
    return {
        "item": optimizer.item,
        "parameters": optimizer.parameters,
        "shared": _settings(optimizer.shared),
        "groups": [
            {
                "settings": _settings(group.values),
                "parameters": [{"item": item, "name": name} for item, name in group.parameters],
            }
            for group in optimizer.groups
        ],
    }


def _settings(values: Mapping[Setting, Value]) -> list[Json]:
    return [
        {"kind": kind, "key": key, "value": encode_value(value, where=f"{kind} {key}")} for (kind, key), value in values.items()
    ]


def values_json(facts: Facts) -> Json:
    """All values in typed JSON, leaf by leaf: replicated ones, then every writer's own."""
    writers = range(len(facts.manifest.fragments))
    return {
        "values": _values(facts.values()),
        "per_rank": [{"writer": writer, "values": _values(facts.values_of(writer))} for writer in writers],
    }


def _values(values: Iterable[tuple[str, Value]]) -> Json:
    return {place: encode_value(value, where=place) for place, value in values}


def writers_json(facts: Facts) -> Json:
    """What each writer stored."""
    return {
        "writers": [
            {
                "writer": writer.writer,
                "path": writer.path,
                "file_nbytes": writer.file_nbytes,
                "arrays": writer.arrays,
                "pieces": writer.pieces,
                "nbytes": writer.nbytes,
                "block_nbytes": writer.block_nbytes,
                "values": writer.values,
            }
            for writer in facts.writers()
        ]
    }


def fragments_json(facts: Facts) -> Json:
    """Every stored piece of the arrays listed."""
    return {
        "fragments": [
            {
                "key": piece.key,
                "writer": piece.writer,
                "start": list(piece.box.start),
                "stop": list(piece.box.stop),
                "file": piece.file,
                "offset": piece.offset,
                "nbytes": piece.nbytes,
                "row_nbytes": piece.row_nbytes,
                "row_stride": piece.row_stride,
            }
            for piece in facts.pieces()
        ]
    }
