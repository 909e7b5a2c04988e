"""From what people write to a store: local paths, `file://`, `memory://`, schemes that packages register, and every other URL
that fsspec knows.

A package registers its store by an entry point of the group `elastickpt.stores`: the name is the scheme, the object is called
with the URL and returns a `Store`. So it is found in every process: the trainers, their writers, the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from urllib.parse import unquote

from elastickpt.errors import MissingFile, NotACheckpoint, PathOccupied, Refused
from elastickpt.storage.local import LocalStore
from elastickpt.storage.memory import MemoryStore
from elastickpt.storage.store import Store, naming

STORES = "elastickpt.stores"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_store(url: str) -> Store:
    """The store at a URL or local path. `memory://name` is one store in this process, `file://` a local directory.

    Raises MissingFile for a local directory that does not exist, Refused for a chained URL ("a::b"), and for a scheme that two
    packages register; what a registered store raises.
    """
    scheme, rest = _split(url)
    if scheme == "file":
        return LocalStore(rest)
    if scheme == "memory":
        return MemoryStore(rest.strip("/"))
    opener = _registered(scheme) or _of_fsspec
    return opener(url)


def _of_fsspec(url: str) -> Store:
    """Imported here: fsspec takes most of a second to import, which nobody pays who saves and loads by local paths."""
    from elastickpt.storage.remote import FsspecStore

    return FsspecStore(url)


def _registered(scheme: str) -> Callable[[str], Store] | None:
    found = {one.value: one for one in entry_points(group=STORES, name=scheme)}
    if len(found) > 1:
        raise Refused(f"{scheme}://: expected one package that registers this scheme, found {', '.join(sorted(found))}")
    opener: Callable[[str], Store] | None = None
    for one in found.values():
        opener = one.load()
    return opener


def locate(path: str | os.PathLike[str]) -> tuple[Store, str]:
    """ "/runs/a/step-7/" -> (the store at "/runs/a", "step-7"). Creates nothing.

    Local paths are made absolute, ".." being resolved as text. Raises NotACheckpoint where the parent is no directory
    or there is no last name.
    """
    parent, name = _parent_and_name(path)
    try:
        if not name:
            raise NotACheckpoint(f"{parent}: expected the path of a checkpoint, found the top of a store")
        return open_store(parent), name
    except MissingFile as error:
        raise NotACheckpoint(f"{os.fspath(path)}: there is no directory {parent}") from error


def locate_for_saving(path: str | os.PathLike[str]) -> tuple[Store, str]:
    """Like `locate`, and makes missing local parents, whose names are durable on return.

    Raises PathOccupied where a file or the top of a store stands.
    """
    parent, name = _parent_and_name(path)
    if not name:
        raise PathOccupied(f"{parent}: no checkpoint can stand at the top of a store")
    scheme, rest = _split(parent)
    if scheme == "file":
        _make_durably(rest)
    return open_store(parent), name


def _make_durably(directory: str) -> None:
    """`directory` exists; the names that were missing on the way to it survive a power cut."""
    missing = []
    existing = directory
    while not os.path.isdir(existing) and existing != os.path.dirname(existing):
        missing.append(existing)
        existing = os.path.dirname(existing)
    with naming("make directory", directory):
        os.makedirs(directory, exist_ok=True)
    for made in reversed(missing):
        LocalStore(os.path.dirname(made)).sync_directory("")


def local_path(path: str) -> str:
    """A local path that begins with `~` or `~NAME` leads from that user's home folder, as in a shell; any other is itself."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _split(url: str) -> tuple[str, str]:
    """(scheme, what follows): ("file", path) for `file://` and for plain local paths, in which `~` is expanded."""
    if "::" in url and "://" in url:
        raise Refused(f"{url}: expected one URL, found several chained by '::'")
    found = _URL.fullmatch(url)
    if found is None:
        return "file", local_path(url)
    scheme, rest = found[1].lower(), found[2]
    if scheme != "file":
        return scheme, rest
    if not rest.startswith("/"):
        raise Refused(f"{url}: expected file:///absolute/path")
    return scheme, unquote(rest)


def _parent_and_name(path: str | os.PathLike[str]) -> tuple[str, str]:
    """(URL or absolute local path of the parent, last component or "")."""
    scheme, rest = _split(os.fspath(path))
    if scheme == "file":
        return os.path.split(os.path.abspath(rest))
    if scheme != "memory" and rest.startswith("/"):  # a URL without a host: what follows is a path from the root
        parent, name = os.path.split(rest.rstrip("/"))
        return f"{scheme}://{parent}", name
    parent, _, name = rest.strip("/").rpartition("/")
    if not parent and scheme != "memory":
        return f"{scheme}://{name}", ""  # a bucket or host is no folder that a checkpoint could be renamed in
    return f"{scheme}://{parent}", name


def path_in(store: Store, name: str) -> str:
    """Where `name` is in a store, as people write it: an absolute local path, else a URL; `locate` understands both."""
    url = f"{store.url}{name}" if store.url.endswith("/") else f"{store.url}/{name}"
    scheme, rest = _split(url)
    return rest if scheme == "file" else url
