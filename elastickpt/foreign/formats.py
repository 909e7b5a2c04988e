"""Which format a source has: what its folder holds, the words of `--from`, and the step that it stands for. [FOR-80..86]"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from elastickpt.errors import Malformed, MissingFile, NotACheckpoint, Refused, Unsupported
from elastickpt.foreign.dcp import METADATA, read_dcp
from elastickpt.foreign.folder import Folder, inside
from elastickpt.foreign.listing import ForeignCheckpoint, Format, NotCarried
from elastickpt.foreign.megatron_legacy import RANK_FOLDER, read_megatron_legacy
from elastickpt.foreign.safetensors_file import INDEX_SUFFIX, SUFFIX, read_safetensors
from elastickpt.foreign.torch_plain import SUFFIXES, read_torch_plain

MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
TRACKERS: Mapping[str, str] = {MEGATRON_TRACKER: "iter_{step:07d}", "latest": "global_step{step}"}
WORDS: Mapping[str, tuple[Format, ...]] = {
    "universal": ("universal",),
    "dcp": ("dcp",),
    "safetensors": ("safetensors",),
    "hf": ("safetensors",),
    "torch": ("torch",),
    "plain": ("torch",),
    "megatron": ("megatron-legacy", "megatron-dist"),
    "megatron-legacy": ("megatron-legacy",),
    "megatron-dist": ("megatron-dist",),
    "torch_dist": ("megatron-dist",),
    "deepspeed": ("deepspeed",),
    "deepspeed-universal": ("deepspeed-universal",),
    "fsdp1": ("fsdp1",),
}
READERS: Mapping[Format, Callable[[Folder], ForeignCheckpoint]] = {
    "dcp": read_dcp,
    "safetensors": read_safetensors,
    "torch": read_torch_plain,
    "megatron-legacy": read_megatron_legacy,
}
_DEEPSPEED = re.compile(r".*_(model|optim)_states\.pt")
_BESIDE = re.compile(r"(training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth)")
_NUMBERED = re.compile(r"(?:.*?[^0-9])?(\d+)")


@dataclass(frozen=True, slots=True)
class FoundSource:
    """A source whose format is known: the folder of its step, and what a user is told about how it was found."""

    format: Format
    folder: Folder
    said: tuple[str, ...]


def find_source(folder: Folder, word: str | None = None, step: int | None = None) -> FoundSource:
    """The format of a source and the folder of its step. Nothing but names, and a first few bytes, is read.

    `word` is what `--from` says. Raises Refused for a folder of several formats, NotACheckpoint for one of none or of another
    than `word` says; both name what was found and the words to choose from.
    """
    if word is not None and word not in WORDS:
        raise Refused(f"format {word!r} is not known; expected one of {', '.join(WORDS)}")
    at, said = _step_folder(folder, step)
    found = dict(_found(at))
    wanted = WORDS[word] if word is not None else tuple(found)
    fitting = [one for one in found if one in wanted]
    if word == "fsdp1" and "torch" in found:
        fitting = ["fsdp1"]  # names of files do not tell it
    if not found or (word is not None and not fitting):
        what = "; ".join(f"{one} ({why})" for one, why in found.items()) or "nothing that a format begins with"
        raise NotACheckpoint(f"{at.url}: expected {word or 'a checkpoint'}, found {what}; --from takes {', '.join(WORDS)}")
    if len(fitting) > 1:
        what = "; ".join(f"{one} ({why})" for one, why in found.items())
        raise Refused(f"{at.url}: several formats in one folder: {what}; say which with --from {' or --from '.join(fitting)}")
    return FoundSource(fitting[0], at, said)


def read_foreign(source: FoundSource) -> ForeignCheckpoint:
    """The listing of a source. Raises Unsupported for a format that this release does not read, and what its reader does."""
    reader = READERS.get(source.format)
    if reader is None:
        raise Unsupported(
            f"{source.folder.url}: format {source.format} is not read by this release, which reads {', '.join(READERS)}"
        )
    found = reader(source.folder)
    beside = (NotCarried(name, "left beside the weights by a trainer, not read") for name in _beside(source))
    return replace(found, said=(*source.said, *found.said), not_carried=(*found.not_carried, *beside))


def _beside(source: FoundSource) -> list[str]:
    """What a trainer of transformers leaves beside weights: no part of them, and not to be passed over in silence."""
    if source.format != "safetensors" or source.folder.only is not None:
        return []
    return sorted(name for name in source.folder.names() if _BESIDE.fullmatch(name))


def _found(folder: Folder) -> Iterable[tuple[Format, str]]:
    """Formats and the names that tell them."""
    if folder.only is not None:
        yield _of_file(folder, folder.only)
        return
    entries = folder.entries()
    names = {one.name for one in entries}
    folders = {one.name for one in entries if one.kind == "directory"}
    if "checkpoint.json" in names:
        yield "universal", "checkpoint.json"
    ranks = sorted(name for name in folders if RANK_FOLDER.fullmatch(name))
    if ranks:
        yield "megatron-legacy", f"{ranks[0]}/"
    if METADATA in names:
        dist = next((name for name in ("common.pt", "metadata.json") if name in names), None)
        yield ("megatron-dist", f"{METADATA} and {dist}") if dist else ("dcp", METADATA)
    tensors = sorted(name for name in names if name.endswith((INDEX_SUFFIX, SUFFIX)))
    if tensors:
        yield "safetensors", tensors[0]
    sliced = sorted(name for name in names if _DEEPSPEED.fullmatch(name))
    if sliced:
        yield ("deepspeed-universal", "zero/") if "zero" in folders else ("deepspeed", sliced[0])
    files = sorted(name for name in names if name.endswith(SUFFIXES) and not _DEEPSPEED.fullmatch(name))
    files = [name for name in files if name != "common.pt" and not (tensors and _BESIDE.fullmatch(name))]
    if files:
        yield "torch", files[0]


def _of_file(folder: Folder, name: str) -> tuple[Format, str]:
    with folder.opened(name) as file:
        head = file.read(0, min(file.nbytes, 9))
    if name.endswith(SUFFIX) or (head[8:9] == b"{" and head[:4] != b"PK\x03\x04"):
        return "safetensors", name
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return "torch", name
    raise NotACheckpoint(
        f"{name}: expected a file of torch.save or safetensors, found one that begins with {head[:4]!r};"
        f" --from takes {', '.join(WORDS)}"
    )


def _step_folder(folder: Folder, step: int | None) -> tuple[Folder, tuple[str, ...]]:
    """The folder of one step, where SOURCE holds several or names the newest; SOURCE itself otherwise."""
    if folder.only is not None:
        if step is not None:
            raise Refused(f"{folder.only}: --step {step} is for a folder of several steps, this is one file")
        return folder, ()
    entries = folder.entries()
    steps = sorted(one.name for one in entries if one.kind == "directory" and _NUMBERED.fullmatch(one.name))
    if step is not None:
        fitting = [name for name in steps if int(_digits(name)) == step and not RANK_FOLDER.fullmatch(name)]
        if len(fitting) != 1:
            raise NotACheckpoint(
                f"{folder.url}: expected one folder of step {step}, found {', '.join(fitting or steps) or 'none'}"
            )
        return folder.below(fitting[0]), (f"step {step}: {fitting[0]} is read",)
    files = {one.name for one in entries if one.kind == "file"}
    tracker = next((name for name in TRACKERS if name in files), None)
    if tracker is None:
        return folder, ()
    text = folder.text(tracker)
    name = TRACKERS[tracker].format(step=int(text)) if text.isascii() and text.isdigit() else text
    if not name or "/" in inside(name, named_by=tracker):
        raise Malformed(f"{tracker}: expected a step, found {text[:40]!r}")
    if name not in {one.name for one in entries}:
        raise MissingFile(f"{tracker} says {text}, and there is no folder {name}")
    return folder.below(name), (f"{tracker} says {text}: {name} is read",)


def _digits(name: str) -> str:
    match = _NUMBERED.fullmatch(name)
    return match[1] if match is not None and len(match[1]) <= 18 else "-1"
