"""Tensors of a foreign checkpoint, put together whole, as numpy arrays: what tests compare with a truth."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from elastickpt.foreign.folder import open_folder
from elastickpt.foreign.listing import ForeignCheckpoint, StoredTensor, WholeTensor
from elastickpt.foreign.tensor_bytes import read_tensor


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def array_of(found: ForeignCheckpoint, stored: StoredTensor) -> np.ndarray:
    folder = open_folder(found.folder)
    with folder.opened(stored.storage.file) as archive:
        return read_tensor(archive.reader, stored).view(numpy_dtype(stored.dtype)).reshape(stored.shape)


def whole_of(found: ForeignCheckpoint, tensor: WholeTensor) -> np.ndarray:
    made = np.zeros(tensor.shape, numpy_dtype(tensor.dtype))
    for piece in tensor.pieces:
        at = tuple(slice(low, high) for low, high in zip(piece.box.start, piece.box.stop, strict=True))
        made[at] = array_of(found, piece.stored)
    return made


def bits(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array).tobytes()
