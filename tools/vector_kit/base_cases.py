"""Checkpoints with pieces in another one: what a reader takes, and one fault each that it refuses."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vector_kit.checkpoints import Later, Parts, V, W, build, flip, only, valid, vector
from tools.vector_kit.kit import Vector, digest

BASE = "../frozen/"
CHUNK = f"{BASE}{W}/c.0.0"


def _frozen(key: str = W) -> dict[str, bytes]:
    """A checkpoint of one array, beside the other one."""
    return {BASE + path: data for path, data in build(only(key)).items()}


def _based(parts: Parts) -> None:
    """The pieces of w lie in a checkpoint beside this one."""
    only(V, W)(parts)
    for one in (one for pieces in parts.pieces for one in pieces if one.key == W):
        one.base = 1
    parts.based[W + "/c.0.0"] = parts.files.pop(W + "/c.0.0")
    parts.manifest["bases"] = [{"uri": "../frozen", "digest": digest(_frozen()[BASE + "checkpoint.json"])}]


def _beside(files: dict[str, bytes]) -> None:
    files.update(_frozen())


def _spoilt(change: Later) -> Later:
    def later(files: dict[str, bytes]) -> None:
        _beside(files)
        change(files)

    return later


_ELSEWHERE: tuple[tuple[str, str, str], ...] = (
    ("base-above", "A base that is not beside the checkpoint.", "../../frozen"),
    ("base-below", "A base in a folder beside.", "../a/frozen"),
    ("base-parent", "The folder above as a base.", "../.."),
    ("base-absolute", "An absolute path as a base.", "/frozen"),
    ("base-url", "A URL as a base.", "file:///frozen"),
    ("base-nameless", "No name at all.", "../"),
)

_SPOILT: tuple[tuple[str, str, str, str, Later], ...] = (
    ("base-replaced", "Another checkpoint under the base's name.", "UCF-85", "checksum-mismatch",
     lambda files: files.update({BASE + "checkpoint.json": _frozen(V)[BASE + "checkpoint.json"]})),
    ("base-file-missing", "A base's chunk is gone.", "UCF-3", "missing-file", lambda files: files.pop(CHUNK)),
    ("base-file-short", "A base's chunk lost its last byte.", "UCF-4", "wrong-length",
     lambda files: files.update({CHUNK: files[CHUNK][:-1]})),
    ("base-file-flip", "One bit of a base's chunk.", "FRAG-32", "checksum-mismatch", flip(CHUNK, 200)),
)  # fmt: skip


def vectors() -> Iterator[Vector]:
    yield valid("base", "Pieces in a checkpoint beside this one.", "UCF-84 UCF-85", _based, _beside)
    for name, about, uri in _ELSEWHERE:

        def edit(parts: Parts, uri: str = uri) -> None:
            _based(parts)
            parts.manifest["bases"][0].update(uri=uri)

        yield vector("invalid", name, about, "UCF-84", build(edit, later=_beside), error="unsafe")
    for name, about, rule, kind, change in _SPOILT:
        yield vector("invalid", name, about, rule, build(_based, later=_spoilt(change)), error=kind)
    missing = "No checkpoint under the base's name."
    yield vector("invalid", "base-missing", missing, "UCF-3", build(_based), error="missing-file")
