"""How a measure leaves nothing that slows the next one."""

from __future__ import annotations

from pathlib import Path

from tools.bench.session import discard


def tree(path: Path) -> Path:
    (path / "a").mkdir(parents=True)
    (path / "a" / "file").write_bytes(b"123")
    (path / "b").symlink_to(path / "a" / "file")
    return path


def test_a_tree_is_removed_or_emptied_and_moved_aside(tmp_path: Path) -> None:
    discard(tree(tmp_path / "one"), keeps_inodes=False)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        inode = (tree(tmp_path / "two") / "a" / "file").stat().st_ino
        discard(tmp_path / "two", keeps_inodes=True)
    discard(tmp_path / "two", keeps_inodes=True)
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    assert all(folder.name.startswith("emptied-") for folder in left)
    files = [folder / "a" / "file" for folder in left]
    assert [file.stat().st_size for file in files] == [0, 0]
    assert inode in [file.stat().st_ino for file in files]
