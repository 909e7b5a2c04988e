"""Megatron-LM's legacy layout: a file of torch.save for each pair of pipeline and tensor rank. [FOR-50..59]

`mp_rank_TT[_PPP[_EEE]]/model_optim_rng.pt` holds `args`, `model` (or `model0`, `model1`, ... for several stages
a rank) and `optimizer`. These keys are the file's structure; names of tensors inside `model` are data here and the program's
business. Optimizers count their parameters: `ParamGroup.members` are integers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from elastickpt.errors import Malformed, MissingFile, NotACheckpoint, StructureConflict, Unsupported, ValueNotCarried
from elastickpt.foreign.folder import Folder
from elastickpt.foreign.listing import (
    ForeignCheckpoint,
    LocalTensor,
    NotCarried,
    ParamGroup,
    RankListing,
    StateScalar,
    StoredTensor,
)
from elastickpt.foreign.pickle_names import is_odd_tensor
from elastickpt.foreign.pickle_values import Instance
from elastickpt.foreign.plain_values import ReadTensor, carried, constants_of, to_plain
from elastickpt.foreign.torch_file import read_torch_file

RANK_FOLDER = re.compile(r"mp_rank_(?P<tp>\d{2,})(?:_(?P<pp>\d{3,}))?(?:_(?P<ep>\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_states.pt")
_DISTRIBUTED = "distrib_optim.pt"
_CHUNK = re.compile(r"model(\d*)")
_NOT_PLAIN = {"args", "optimizer"}
_RANDOM_STATES = ("rng_state", "rerun_state_machine")
_SIZES = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
_MASTERS = ("fp32_from_fp16_params", "fp32_from_float16_groups")


@dataclass(frozen=True, slots=True)
class _RankFile:
    coordinate: tuple[tuple[str, int], ...]
    path: str


def read_megatron_legacy(folder: Folder) -> ForeignCheckpoint:
    """All ranks' tensors, groups and values. Raises what `read_torch_file` does, MissingFile for an absent rank's file,
    StructureConflict where files contradict each other or the sizes in `args`.
    """
    found = _rank_files(folder)
    read = [(one, *_read_rank(folder, one)) for one in found]
    arguments = [_arguments(contents) for _, contents, _ in read]
    _check_agreement(read[0][0], [(one, contents) for one, contents, _ in read], arguments)
    ranks = tuple(listing for _, _, (listing, _) in read)
    first = dict(read[0][1])
    iteration = first.get("iteration")
    left = {one.name: one for _, _, (_, lost) in read for one in lost}
    for path in sorted(_distributed_optimizers(folder)):
        left.setdefault("optimizer", NotCarried("optimizer", f"{path}: shards of a distributed optimizer, not read yet"))
    return ForeignCheckpoint(
        format="megatron-legacy",
        folder=folder.url,
        files=tuple(folder.file(one.path) for one in found),
        step=iteration if type(iteration) is int else None,
        ranks=ranks,
        constants=constants_of(arguments[0]),
        values=ranks[0].values,
        not_carried=tuple(left.values()),
    )


def _rank_files(folder: Folder) -> list[_RankFile]:
    found: dict[tuple[tuple[str, int], ...], str] = {}
    with_experts = False
    for entry in folder.entries():
        match = RANK_FOLDER.fullmatch(entry.name)
        if match is None:
            continue
        with_experts |= match["ep"] is not None
        coordinate = tuple((axis, int(match[axis] or 0)) for axis in ("pp", "ep", "tp"))
        inner = folder.names(entry.name)
        names = [name for name in _FILES if name in inner]
        if len(names) != 1:
            raise MissingFile(f"{entry.name}: expected one of {', '.join(_FILES)}, found {', '.join(sorted(inner))}")
        if coordinate in found:
            raise StructureConflict(f"{found[coordinate]} and {entry.name} are files of one and the same rank")
        found[coordinate] = f"{entry.name}/{names[0]}"
    if not found:
        raise NotACheckpoint(f"{folder.url}: expected folders mp_rank_TT or mp_rank_TT_PPP, found none")
    axes = ("pp", "ep", "tp") if with_experts else ("pp", "tp")
    files = [
        _RankFile(tuple((axis, place) for axis, place in coordinate if axis in axes), path)
        for coordinate, path in sorted(found.items())
    ]
    _check_grid(files)
    return files


def _check_grid(files: list[_RankFile]) -> None:
    """Every combination of the places that occur is there."""
    coordinates = {one.coordinate for one in files}
    wanted: list[tuple[tuple[str, int], ...]] = [()]
    for k, (axis, _) in enumerate(files[0].coordinate):
        size = 1 + max(coordinate[k][1] for coordinate in coordinates)
        if size > len(files):
            raise MissingFile(f"{files[-1].path}: place {size - 1} on axis {axis}, but only {len(files)} ranks have a file")
        wanted = [(*begun, (axis, place)) for begun in wanted for place in range(size)]
        if len(wanted) > 4 * len(files):
            break
    missing = next((one for one in wanted if one not in coordinates and len(one) == len(files[0].coordinate)), None)
    if missing is not None:
        where = ", ".join(f"{axis} {place}" for axis, place in missing)
        raise MissingFile(f"the file of the rank at {where} is missing beside {files[0].path}")


def _distributed_optimizers(folder: Folder) -> Iterator[str]:
    for entry in folder.entries():
        if RANK_FOLDER.fullmatch(entry.name) and _DISTRIBUTED in folder.names(entry.name):
            yield f"{entry.name}/{_DISTRIBUTED}"


def _read_rank(folder: Folder, rank: _RankFile) -> tuple[Mapping[object, object], tuple[RankListing, tuple[NotCarried, ...]]]:
    with folder.opened(rank.path) as archive:
        contents = read_torch_file(archive)
        if not isinstance(contents, dict) or not any(isinstance(key, str) and _CHUNK.fullmatch(key) for key in contents):
            raise Malformed(f"{rank.path}: expected a mapping with `model`, found {_said(contents)}")
        _check_version(rank.path, contents.get("checkpoint_version"))
        model = list(_model(rank.path, contents))
        optimizer = contents.get("optimizer")
        states, groups, rest, sharded = _optimizer(rank.path, optimizer, folder.read_tensor)
        plain = {
            key: value
            for key, value in contents.items()
            if key not in _NOT_PLAIN and key not in _RANDOM_STATES and not _is_chunk(key)
        }
        if isinstance(contents.get("args"), Instance):
            plain["args"] = contents["args"]
        values, lost = carried(plain, folder.read_tensor, where="")
        beside, lost_beside = carried(rest, folder.read_tensor, where="optimizer")
    random = (NotCarried(str(name), "random streams of each rank") for name in _RANDOM_STATES if name in contents)
    listing = RankListing(
        coordinate=rank.coordinate,
        file=rank.path,
        tensors=tuple(one for one in (*model, *states) if isinstance(one, LocalTensor)),
        groups=groups,
        values=values | {f"/optimizer{pointer}": value for pointer, value in beside.items()},
        scalars=tuple(one for one in states if isinstance(one, StateScalar)),
        empty=tuple(one for one in model if isinstance(one, str)),
    )
    objects = (one for one in model if isinstance(one, NotCarried))
    return contents, (listing, (*random, *objects, *lost, *lost_beside, *sharded))


def _check_version(path: str, version: object) -> None:
    """Before version 2 the rows of query, key and value lay in another order, which nothing else in a file tells."""
    if isinstance(version, int | float) and version < 2:
        raise Unsupported(
            f"{path}: checkpoint_version {version}; expected 2.0 or newer: older files order fused rows otherwise"
        )


def _is_chunk(key: object) -> bool:
    return isinstance(key, str) and _CHUNK.fullmatch(key) is not None


def _said(value: object) -> str:
    keys = ", ".join(map(repr, list(value)[:8])) if isinstance(value, dict) else ""
    return f"a {type(value).__name__} {keys}".rstrip()


def _model(path: str, contents: Mapping[object, object]) -> Iterator[LocalTensor | NotCarried | str]:
    """The tensors of `model`, or of `model0`, `model1`, ...; the names of entries that hold none, objects as left out."""
    for key, entries in contents.items():
        match = _CHUNK.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(entries, dict):
            continue
        chunk = int(match[1] or 0)
        for name, value in _flat(entries, ""):
            where = f"{path}: {key}: {name}"
            if isinstance(value, StoredTensor):
                yield LocalTensor("model", name, "value", value, chunk)
            elif value is None or isinstance(value, Instance | bytes | bytearray):
                if is_odd_tensor(value):
                    raise ValueNotCarried(f"{where}: a tensor made by {value!r}, which no array can hold")
                yield name if value is None else NotCarried(name, "a module's extra state that is no tensor")
            else:
                raise ValueNotCarried(f"{where}: expected a tensor, found {_said(value)}")


def _flat(entries: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Nested mappings of modules (files from before core models) with dotted names."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _optimizer(
    path: str, optimizer: object, read: ReadTensor
) -> tuple[list[LocalTensor | StateScalar], tuple[ParamGroup, ...], dict[object, object], list[NotCarried]]:
    """(states, groups, what else it holds, what is left out) of an optimizer's state_dict, with or without the wrapper for half
    types. A distributed optimizer leaves neither states nor members of its groups there.

    Of a chain (experts, several model chunks) each is an item of its own, `optimizer0`, `optimizer1`, ...: every one counts
    from 0, and which parameters are whose is in no file. [FOR-55]
    """
    if optimizer is None:
        return [], (), {}, []
    chain = optimizer if isinstance(optimizer, list) else [optimizer]
    states: list[LocalTensor | StateScalar] = []
    groups: list[ParamGroup] = []
    rest: dict[object, object] = {}
    left: list[NotCarried] = []
    for number, one in enumerate(chain):
        item = f"optimizer{number}" if len(chain) > 1 else "optimizer"
        if not isinstance(one, dict):
            raise Malformed(f"{path}: {item}: expected a mapping, found {_said(one)}")
        inner = one.get("optimizer", one)
        if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
            raise Malformed(f"{path}: {item}: expected `state` and `param_groups`, found {_said(inner)}")
        if "state" not in inner and not any(isinstance(group, dict) and "params" in group for group in inner["param_groups"]):
            left.append(NotCarried(item, "a distributed optimizer, whose states are shards in files of their own"))
        else:
            own = tuple(_groups(path, item, inner["param_groups"], read))
            states += [*_states(path, item, inner.get("state"), read), *_masters(path, item, one, own)]
            groups += own
        known = {"state", "param_groups", "optimizer", *_MASTERS}
        more = {key: value for key, value in one.items() if key not in known}
        rest.update(more if len(chain) == 1 else {item: more} if more else {})
    return states, tuple(groups), rest, left


def _groups(path: str, item: str, found: list[object], read: ReadTensor) -> Iterator[ParamGroup]:
    for group in found:
        members = group.get("params") if isinstance(group, dict) else None
        if not isinstance(group, dict) or not isinstance(members, list) or not all(type(one) is int for one in members):
            raise Malformed(f"{path}: {item}: a param group without its list of numbers `params`")
        options = {str(key): to_plain(value, read, where=f"/{key}") for key, value in group.items() if key != "params"}
        yield ParamGroup(item, tuple(members), options)


def _states(path: str, item: str, found: object, read: ReadTensor) -> Iterator[LocalTensor | StateScalar]:
    if not isinstance(found, dict):
        raise Malformed(f"{path}: {item}: expected the mapping `state`, found {_said(found)}")
    for index, states in found.items():
        if type(index) is not int or not isinstance(states, dict):
            raise Malformed(f"{path}: {item}: expected states by number, found {index!r}: {_said(states)}")
        for state, value in states.items():
            if isinstance(value, StoredTensor):
                yield LocalTensor(item, index, str(state), value)
            else:
                plain = to_plain(value, read, where=f"{path}: {item}: {index}: {state}")
                yield StateScalar(item, index, str(state), plain)


def _masters(path: str, item: str, optimizer: Mapping[object, object], groups: tuple[ParamGroup, ...]) -> Iterator[LocalTensor]:
    """fp32 masters: a list of tensors for each group, in the order of the group's members."""
    for key in _MASTERS:
        lists = optimizer.get(key)
        if not isinstance(lists, list):
            continue
        if len(lists) != len(groups):
            raise StructureConflict(f"{path}: {item}: {key} has {len(lists)} lists for {len(groups)} param groups")
        for group, masters in zip(groups, lists, strict=True):
            if not isinstance(masters, list) or len(masters) not in (0, len(group.members)):
                raise StructureConflict(
                    f"{path}: {item}: {key} has masters for some members of a group only; which ones is in no file"
                )
            for index, master in zip(group.members, masters, strict=False):
                if not isinstance(master, StoredTensor):
                    raise Malformed(f"{path}: {item}: {key}: expected tensors, found {_said(master)}")
                yield LocalTensor(item, index, "master", master)


def _arguments(contents: Mapping[object, object]) -> dict[str, object]:
    found = contents.get("args")
    return found.fields() if isinstance(found, Instance) else {}


def _check_agreement(
    first: _RankFile, read: Iterable[tuple[_RankFile, Mapping[object, object]]], arguments: list[dict[str, object]]
) -> None:
    """Files are of one step, and their `args` state the sizes that their names tell."""
    files = list(read)
    sizes = {axis: 1 + max(dict(one.coordinate)[axis] for one, _ in files) for axis in _SIZES}
    steps = [contents.get("iteration") for _, contents in files]
    for (one, _), given, step in zip(files, arguments, steps, strict=True):
        if step != steps[0]:
            raise StructureConflict(f"{one.path} is of step {step}, {first.path} of step {steps[0]}")
        for axis, key in _SIZES.items():
            stated = given.get(key)
            if type(stated) is int and stated != sizes[axis]:
                raise StructureConflict(f"{one.path}: args.{key} is {stated}, and there are files of {sizes[axis]} such ranks")
