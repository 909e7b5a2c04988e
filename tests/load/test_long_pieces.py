"""In memory a thread takes much of one piece at once, and reads and verifies it unit by unit. [FRAG-32]"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import elastickpt as ek
from elastickpt.errors import ChecksumMismatch
from elastickpt.format.encode_fragments import decode_columns
from elastickpt.loading import fetch
from elastickpt.loading.fetch import Pace

LENGTH = 150_001  # floats: nine blocks of 64 KiB and a part of one, or 36 of 16 KiB and a part


@pytest.fixture(params=[(1, 64 << 10, 1 << 20, 0), (2, 256 << 10, 300 << 10, 1 << 20), (2, 100_000, 8 << 20, 300_000)])
def _pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "pace_of", lambda *_, **__: Pace(*request.param))


@pytest.mark.usefixtures("_pace")
@pytest.mark.parametrize("placement", ["plain", "packed"])
def test_every_block_is_read_and_verified(tmp_path: Path, placement: Any) -> None:
    saved = {"a": torch.rand(LENGTH), "small": torch.rand(5), "b": torch.rand(LENGTH)}
    ek.save({"state": saved}, tmp_path / "c", placement=placement)
    live = {name: torch.zeros_like(one) for name, one in saved.items()}
    ek.load({"state": live}, tmp_path / "c")
    assert all(torch.equal(one, saved[name]) for name, one in live.items())
    (stored,) = (tmp_path / "c" / "fragments").iterdir()
    columns = decode_columns(stored.read_bytes(), path=str(stored))
    (number,) = columns.pieces.by_array()["extra/state/b"]
    piece = columns.pieces.objects()[number]
    path, whole = tmp_path / "c" / columns.files[piece.file].path, saved["b"].numpy().nbytes
    for block in range(-(-whole // columns.block_nbytes)):
        data = bytearray(path.read_bytes())
        data[piece.offset + min((block + 1) * columns.block_nbytes, whole) - 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ChecksumMismatch, match=rf"block {block} of piece \[0:{LENGTH}\] of array extra/state/b"):
            ek.load({"state": live}, tmp_path / "c")
        data[piece.offset + min((block + 1) * columns.block_nbytes, whole) - 1] ^= 1
        path.write_bytes(data)
