"""Writes spec/vectors anew: `python -m tools.make_vectors`. `check_spec.py` holds the committed files against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tools.vector_kit import (
    base_cases,
    checkfree,
    checkpoint_cases,
    fragment_maps,
    geometry,
    manifests,
    optimizer_cases,
    packs,
    values,
)
from tools.vector_kit.kit import Vector

FOLDER = Path(__file__).parent.parent / "spec" / "vectors"
INDEX = "index.json"


def vectors() -> Iterator[Vector]:
    yield from manifests.vectors()
    yield from fragment_maps.fragment_maps()
    yield from fragment_maps.indexes()
    yield from values.vectors()
    yield from geometry.boxes()
    yield from geometry.partitions()
    yield from geometry.grids()
    yield from packs.vectors()
    yield from geometry.keys()
    yield from geometry.documents()
    yield from checkpoint_cases.vectors()
    yield from base_cases.vectors()
    yield from optimizer_cases.vectors()
    yield from checkfree.vectors()


def files() -> dict[str, str]:
    """path below spec/vectors -> text, of all vectors and their index."""
    found: dict[str, str] = {}
    entries = []
    for vector in vectors():
        if vector.path in found:
            raise ValueError(f"two vectors are called {vector.path}")
        found[vector.path] = text = vector.text()
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        entries.append({"path": vector.path, "sha256": sha256, "requires": list(vector.requires)})
    found[INDEX] = "[\n" + ",\n".join(json.dumps(entry) for entry in sorted(entries, key=lambda e: str(e["path"]))) + "\n]\n"
    return found


def main() -> None:
    wanted = files()
    for path in FOLDER.rglob("*.json"):
        if path.relative_to(FOLDER).as_posix() not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{len(wanted) - 1} vectors")


if __name__ == "__main__":
    main()
