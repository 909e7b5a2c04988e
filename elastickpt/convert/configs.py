"""The files that transformers wants beside weights: copied from a folder, or made from constants. [CONV-36]"""

from __future__ import annotations

import json
from collections.abc import Mapping

from elastickpt.convert.contents import Contents
from elastickpt.errors import NotACheckpoint
from elastickpt.foreign.folder import open_folder

MAX_FILE_NBYTES = 64 << 20
_LEFT = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")


def config_files(folder: str | None, contents: Contents, known: Mapping[str, object]) -> dict[str, bytes]:
    """Name → content. `folder` is `--config`: all of it but weights. Else `config.json` as the source has it, if it has one.

    Raises NotACheckpoint for a folder without `config.json`.
    """
    if folder is not None:
        at = open_folder(folder)
        found = {
            entry.name: at.store.read(entry.name, MAX_FILE_NBYTES)
            for entry in at.entries()
            if entry.kind == "file" and not entry.name.endswith(_LEFT)
        }
        if "config.json" not in found:
            raise NotACheckpoint(f"--config {folder}: expected config.json there, found {', '.join(found) or 'nothing'}")
        return found
    config = contents.values.get("/config")
    if isinstance(config, dict):
        return {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
    return {}
