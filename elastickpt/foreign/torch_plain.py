"""What one process saved with torch.save: one file, or files that an index of transformers names. [FOR-70]"""

from __future__ import annotations

from elastickpt.errors import Malformed, MissingFile, NotACheckpoint, Refused, StructureConflict
from elastickpt.foreign.folder import Folder, inside
from elastickpt.foreign.listing import ForeignCheckpoint
from elastickpt.foreign.nested import sort_out
from elastickpt.foreign.plain_values import constants_among, constants_of
from elastickpt.foreign.safetensors_file import read_config
from elastickpt.foreign.torch_file import read_torch_file

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = "pytorch_model.bin.index.json"
_STEPS = ("/step", "/global_step", "/iteration")


def read_torch_plain(folder: Folder) -> ForeignCheckpoint:
    """Tensors, optimizers and values of one file. Raises what `read_torch_file` and `sort_out` do."""
    paths = _files(folder)
    merged: dict[object, object] = {}
    for path in paths:
        with folder.opened(path) as archive:
            value = read_torch_file(archive)
        if not isinstance(value, dict):
            raise Malformed(f"{path}: expected a mapping of names or of items, found a {type(value).__name__}")
        doubled = next((key for key in value if key in merged), None)
        if doubled is not None:
            raise StructureConflict(f"{path}: {doubled!r} stands in another file too")
        merged.update(value)
    found = sort_out(merged, folder.read_tensor, where=paths[0])
    steps = (found.values.get(name) for name in _STEPS)
    return ForeignCheckpoint(
        format="torch",
        folder=folder.url,
        files=tuple(folder.file(path) for path in paths),
        step=next((step for step in steps if type(step) is int and step >= 0), None),
        wholes=tuple(found.wholes),
        scalars=tuple(found.scalars),
        groups=tuple(found.groups),
        tied=tuple(found.tied),
        constants=constants_among(found.values) | constants_of(read_config(folder)),
        values=found.values,
        not_carried=tuple(found.not_carried),
    )


def _files(folder: Folder) -> list[str]:
    names = folder.names()
    if folder.only is not None:
        return [folder.only]
    if INDEX in names:
        content = folder.json(INDEX)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(path, str) for path in places.values()):
            raise Malformed(f"{INDEX}: expected the mapping `weight_map` from names to files")
        files = sorted({inside(path, named_by=INDEX) for path in places.values()})
        missing = next((path for path in files if "/" not in path and path not in names), None)
        if missing is not None:
            raise MissingFile(f"{INDEX}: it names the file {missing}, which is not there")
        return files
    found = sorted(name for name in names if name.endswith(SUFFIXES))
    if len(found) != 1:
        there = ", ".join(found) or "none"
        cls = Refused if found else NotACheckpoint
        raise cls(f"{folder.url}: expected one file of torch.save, found {there}; name the file itself")
    return found
