"""From names to paths: keys of arrays, names of chunk and record files, and the check of paths that others wrote.
[UCF-30..39]

A name is data, never a path: what is not `[A-Za-z0-9._-]` is percent-encoded, so that a key is plain ASCII, has no
separator of its own, and differs from its siblings' keys on file systems that ignore case.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import xxhash

from elastickpt.errors import LimitExceeded, StructureConflict, Unsafe
from elastickpt.format.arrays import ArrayId
from elastickpt.format.version import MAX_COMPONENT_NBYTES, MAX_NAME_NBYTES, MAX_PATH_NBYTES

MANIFEST = "checkpoint.json"
DRAFT_TOKEN = "draft.json"  # whose folder has it is no checkpoint yet
DOCUMENT = "zarr.json"
ROOT_DOCUMENT = DOCUMENT
PACKS = "packs"
REFERENCES = "references.json"  # beside packs: addresses for readers of other libraries, derived from the records [UCF-6]
MAX_KEY_NBYTES = 200  # of a key without a suffix; leaves room below 255 for what stores append while writing
SUFFIX_CUT = 180  # bytes of a key that stand before its suffix

_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_OWN_KEY = re.compile(r"(?!__)(?!\.+\Z)(?!(?i:zarr\.json)\Z)[A-Za-z0-9._-]{1,200}")  # nearly all names
_PACK = re.compile(rf"{PACKS}/([0-9a-f]+)-[0-9]+\.bin", re.ASCII)
_KEPT = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def checked_name(name: str) -> str:
    """The name itself. Raises Unsafe for control characters and lone surrogates, LimitExceeded beyond 1,024 bytes.

    [UCF-30]
    """
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError:
        raise Unsafe(f"name {name!r} is no valid Unicode text") from None
    if nbytes > MAX_NAME_NBYTES:
        raise LimitExceeded(f"name {name[:60]!r}... has {nbytes} bytes of UTF-8, the limit is {MAX_NAME_NBYTES}")
    if not name.isprintable() and any(ord(char) < 32 or ord(char) == 127 for char in name):
        raise Unsafe(f"name {name!r} contains a control character")
    return name


def checked_names(names: Sequence[str]) -> Sequence[str]:
    """`checked_name` of many, at once where they are plain."""
    joined = "".join(names)
    if not (joined.isascii() and joined.isprintable()) or max(map(len, names), default=0) > MAX_NAME_NBYTES:
        for name in names:
            checked_name(name)
    return names


def encode_name(name: str) -> str:
    """The key of a name that has no siblings to be told from: percent-encoded ASCII, never empty. [UCF-31, UCF-32]

    `layers.0/w` -> `layers.0%2Fw`; `` -> `%`; `..` -> `%2E.`; `__x` -> `%5F_x`; `zarr.json` -> `%7Aarr.json`.
    """
    if _OWN_KEY.fullmatch(name):
        return name
    if not name:
        return "%"
    encoded = checked_name(name)
    if not _PLAIN.fullmatch(name):
        encoded = "".join(chr(byte) if byte in _KEPT else f"%{byte:02X}" for byte in name.encode())
    if not name.strip(".") or name.startswith("__") or name.lower() == DOCUMENT:
        return f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded


def _suffixed(key: str, name: str) -> str:
    cut = min(len(key), SUFFIX_CUT)
    inside = key.rfind("%", max(0, cut - 2), cut)  # a `%XX` that the cut would split
    if inside >= 0 and cut < len(key):
        cut = inside
    return f"{key[:cut]}%~{xxhash.xxh3_64_hexdigest(name.encode())}"


def child_keys(names: Iterable[str]) -> dict[str, str]:
    """name -> key for names that stand beside each other; the keys differ even where case is ignored. [UCF-33, UCF-34]

    Depends on the set of names only, not on its order. Raises StructureConflict when two hashes meet.
    """
    plain = {name: encode_name(name) for name in names}
    lower = [key.lower() for key in plain.values()]
    if len(set(lower)) == len(lower) and max(map(len, lower), default=0) <= MAX_KEY_NBYTES:
        return plain
    folded = Counter(lower)
    keys = {
        name: _suffixed(key, name) if len(key) > MAX_KEY_NBYTES or folded[key.lower()] > 1 else key
        for name, key in plain.items()
    }
    owner: dict[str, str] = {}
    for name, key in keys.items():
        other = owner.setdefault(key.lower(), name)
        if other != name:
            raise StructureConflict(f"names {other!r} and {name!r} have the same key {key!r}")
    return keys


def components(array: ArrayId) -> tuple[str, ...]:
    """The names on the way to an array below its section: item, name, state; for `extra` item and pointer tokens.

    [UCF-35]
    """
    if array.section == "params":
        return (array.item, array.name, array.state)
    if not array.name:
        return (array.item,)
    if "~" not in array.name:
        return (array.item, *array.name.split("/"))
    tokens = (token.replace("~1", "/").replace("~0", "~") for token in array.name.split("/"))
    return (array.item, *tokens)


def depth_of(array: ArrayId) -> int:
    """How many `components` an array has."""
    if array.section == "params":
        return 3
    return array.name.count("/") + 2 if array.name else 1


class _Node:
    """One name in the tree of a section, with what stands below it. `place`: which of the arrays stands there, -1 for none."""

    __slots__ = ("children", "place")

    def __init__(self) -> None:
        self.place = -1
        self.children: dict[str, _Node] = {}

    def take(self, array: ArrayId, place: int) -> None:
        node = self
        for name in components(array):
            found = node.children.get(name)
            if found is None:
                found = node.children[name] = _Node()
            node = found
        node.place = place

    def collect(self, key: str, ids: Sequence[ArrayId], found: list[str]) -> None:
        """Of all arrays below, their paths; this node's is `key`."""
        keys = child_keys(self.children)
        for name, child in self.children.items():
            path = f"{key}/{keys[name]}"
            if child.place >= 0:
                if child.children:  # [UCF-36]
                    raise StructureConflict(f"array {ids[child.place]} stands where other arrays have a group")
                if len(path) > MAX_PATH_NBYTES - MAX_COMPONENT_NBYTES:
                    raise LimitExceeded(f"array {ids[child.place]}: its path has {len(path)} bytes")
                found[child.place] = path
            else:
                child.collect(path, ids, found)


def keys_of(ids: Sequence[ArrayId]) -> list[str]:
    """The path of each array in the tree, for all arrays of a checkpoint; depends on their set only. [UCF-35]

    `params/<item>/<name>/<state>` and `extra/<item>/<pointer tokens>`. Raises StructureConflict where an array stands
    above another one, Unsafe for names that no checkpoint carries.
    """
    sections = {"params": _Node(), "extra": _Node()}
    for place, array in enumerate(ids):
        sections[array.section].take(array, place)
    found = [""] * len(ids)
    for section, node in sections.items():
        node.collect(section, ids, found)
    return found


def array_keys(ids: Iterable[ArrayId]) -> Mapping[ArrayId, str]:
    """array -> its path, as `keys_of` has it."""
    each = dict.fromkeys(ids)
    return dict(zip(each, keys_of(tuple(each)), strict=True))


def chunk_file(key: str, chunk: tuple[int, ...]) -> str:
    """The file of one chunk in placement `plain`: `params/m/w/value` and (0, 1) -> `params/m/w/value/c.0.1`.

    [UCF-14]
    """
    return ".".join((f"{key}/c", *map(str, chunk)))


def document_file(key: str) -> str:
    """The zarr document of an array or group; "" is the root."""
    return f"{key}/{DOCUMENT}" if key else DOCUMENT


def pack_file(attempt: str, writer: int) -> str:
    """The pack of one writer of an attempt. [FRAG-65]"""
    return f"{PACKS}/{attempt}-{writer:05d}.bin"


def attempt_of_pack(path: str) -> str | None:
    """The attempt that the name of a pack carries; None for the name of anything else. [FRAG-64]"""
    found = _PACK.fullmatch(path)
    return None if found is None else found[1]


def fragments_file(writer: int) -> str:
    """Where a writer's fragment map stands in a file system: at least five digits. [UCF-37]"""
    return f"fragments/{writer:05d}.msgpack"


def index_file(part: int) -> str:
    """Where a part of the index stands in a file system: `index.msgpack`, then `index-00001.msgpack`, ... [UCF-37]"""
    return f"index-{part:05d}.msgpack" if part else "index.msgpack"


# of paths with a line each: what none of them may have, and "://", which some may, looked at one by one
_ODD = ("\n\n", "\n/", "/\n", "//", "/./", "/../", "\n./", "\n../", "/.\n", "/..\n", "\n.\n", "\n..\n", "\\", ":")


def checked_paths(paths: Sequence[str]) -> Sequence[str]:
    """`checked_path` of many, at once where they are plain."""
    lines = "\n".join(("", *paths, ""))
    plain = lines.isascii() and "".join(paths).isprintable() and not any(odd in lines for odd in _ODD)
    if not plain or max(map(len, paths), default=0) > MAX_COMPONENT_NBYTES:
        for path in paths:
            checked_path(path)
    return paths


def checked_path(path: str) -> str:
    """The path itself, from a record that anyone may have written; safe to join below a root. [UCF-38]

    Raises Unsafe for an absolute path, `..`, `.`, an empty component, a backslash, NUL and other control characters,
    anything that is not ASCII, and a first component that ends with a colon; LimitExceeded beyond 4,096 bytes, or 255
    in one component.
    """
    if len(path) > MAX_PATH_NBYTES:
        raise LimitExceeded(f"path {path[:60]!r}... has {len(path)} bytes, the limit is {MAX_PATH_NBYTES}")
    if not path.isascii() or not path.isprintable() or "\\" in path:
        raise Unsafe(f"path {path!r} contains a backslash, a control character or a character beyond ASCII")
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise Unsafe(f"path {path!r} is absolute or has an empty, '.' or '..' component")
    if ":" in parts[0]:
        raise Unsafe(f"path {path!r} begins with a drive or scheme")
    if max(map(len, parts)) > MAX_COMPONENT_NBYTES:
        raise LimitExceeded(f"path {path[:60]!r}... has a component beyond {MAX_COMPONENT_NBYTES} bytes")
    return path
