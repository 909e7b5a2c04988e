"""Reads a checkpoint's tree with other libraries, elastickpt being out of reach. A script: READER TREE OUT.npz KEY...

Writes the bits of every array as uint8, by key, and what the reader said of dtype and shape. Exits with the reader's error.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys


class _Absent:
    """Makes `import elastickpt` fail, whatever is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "elastickpt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _hide() -> None:
    sys.meta_path.insert(0, _Absent())
    every = importlib.metadata.distributions
    importlib.metadata.distributions = lambda **wanted: (d for d in every(**wanted) if d.name != "elastickpt")


def _zarr_group(tree: str, keys: list[str]) -> dict[str, object]:
    """One group, opened once: its consolidated metadata, where it has them, else each document."""
    import zarr

    group = zarr.open_group(tree, mode="r")
    members = dict(group.members(max_depth=None))
    arrays = {key: node for key, node in members.items() if isinstance(node, zarr.Array)}
    assert set(arrays) == set(keys), set(arrays) ^ set(keys)
    return {"arrays": {key: node[...] for key, node in arrays.items()}, "consolidated": group.metadata.consolidated_metadata}


def _zarr_paths(tree: str, keys: list[str]) -> dict[str, object]:
    """Every array by its own path, consolidated metadata unused."""
    import zarr

    group = zarr.open_group(tree, mode="r", use_consolidated=False)
    return {"arrays": {key: group[key][...] for key in keys}}


def _zarrs(tree: str, keys: list[str]) -> dict[str, object]:
    import zarr
    import zarrs  # noqa: F401

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        return _zarr_paths(tree, keys)


def _xarray(tree: str, keys: list[str]) -> dict[str, object]:
    import xarray

    opened = xarray.open_datatree(tree, engine="zarr", mask_and_scale=False)
    return {"arrays": {key: opened[key].values for key in keys}, "sizes": {k: dict(opened[k].sizes) for k in keys}}


def _xarray_group(tree: str, keys: list[str]) -> dict[str, object]:
    """Group by group, which also serves trees in which other groups hold what this reader does not know."""
    import xarray

    found = {}
    for key in keys:
        group, _, name = key.rpartition("/")
        found[key] = xarray.open_dataset(tree, group=group, engine="zarr", mask_and_scale=False, consolidated=False)[
            name
        ].values
    return {"arrays": found}


def _tensorstore(tree: str, keys: list[str]) -> dict[str, object]:
    import tensorstore

    found = {}
    for key in keys:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tree}/{key}/"}}
        found[key] = tensorstore.open(spec, open=True, read=True).result().read().result()
    return {"arrays": found}


def main() -> None:
    reader, tree, out, *keys = sys.argv[1:]
    _hide()
    import numpy as np

    found = globals()[f"_{reader}"](tree, keys)
    assert "elastickpt" not in sys.modules
    arrays = {key: np.asarray(array) for key, array in found["arrays"].items()}
    np.savez(out, **{key: np.frombuffer(array.tobytes(), dtype=np.uint8) for key, array in arrays.items()})
    said = {key: [str(array.dtype), list(array.shape)] for key, array in arrays.items()}
    print(json.dumps({"arrays": said, "consolidated": found.get("consolidated") is not None, "sizes": found.get("sizes")}))


if __name__ == "__main__":
    main()
