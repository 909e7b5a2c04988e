"""A conversion: decided as a whole before the first tensor is read; `engine` carries it out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from elastickpt.convert.configs import CONFIG, config_files, constants_in, require_agreement, templates_for
from elastickpt.convert.constants import lasting
from elastickpt.convert.contents import Contents, selected, with_constants
from elastickpt.convert.laid import lay
from elastickpt.convert.names import apply_names, leads_to
from elastickpt.convert.nodes import nbytes_of
from elastickpt.convert.options import Options
from elastickpt.convert.ranked_form import megatron_form
from elastickpt.convert.reading import Reading
from elastickpt.convert.recorded import recorded_contents
from elastickpt.convert.refining import with_casts, with_masters, without_numbered
from elastickpt.convert.saved_forms import SavedForm, dcp_form, safetensors_form, torch_form, with_config
from elastickpt.errors import ProgramFault, Refused
from elastickpt.foreign.folder import open_folder, open_linked
from elastickpt.foreign.formats import find_source, read_foreign
from elastickpt.foreign.listing import ForeignCheckpoint, Format, NotCarried, StoredTensor
from elastickpt.format.keys import MANIFEST
from elastickpt.language import tree as t
from elastickpt.language.parse import MAX_TEXT_NBYTES, parse
from elastickpt.language.patterns import known_names
from elastickpt.language.printer import print_program
from elastickpt.language.rules import axes_of, needed
from elastickpt.language.shelf import config_text, name_maps, programs
from elastickpt.language.shipped import shipped_names, shipped_program
from elastickpt.loading.opened import open_records
from elastickpt.storage.opening import locate, path_in
from elastickpt.storage.store import stamp_of

_PROGRAMS: Mapping[Format, tuple[str, ...]] = {"megatron-legacy": ("megatron", "megatron-lm")}


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source, opened: its contents before any option, and how its arrays are read."""

    format: Format
    contents: Contents
    reading: Reading
    facts: Mapping[str, object]  # constants, under the names of the files
    program: t.Program | None
    url: str
    files: tuple[tuple[str, str], ...] = ()  # path, what tells whether the file was written since


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is decided. `form` is None where a universal checkpoint is written."""

    options: Options
    source: OpenedSource
    target: Format
    contents: Contents
    form: SavedForm | None

    @property
    def not_carried(self) -> tuple[NotCarried, ...]:
        return (*self.contents.not_carried, *(self.form.not_carried if self.form else ()))

    @property
    def arrays(self) -> int:
        """Tensors that are written."""
        return len(self.form.deliveries if self.form is not None else self.contents.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that are written."""
        if self.form is not None:
            return sum(one.nbytes for one in self.form.deliveries)
        return sum(nbytes_of(one.node) for one in self.contents.arrays.values())


def shown_program(conversion: Conversion) -> t.Program | None:
    """The program that lays the source out, or OUT where the source is universal; None where neither side has one."""
    if conversion.source.format == "universal":
        return _target_program(conversion.options, conversion.source) if conversion.target == "megatron-legacy" else None
    return conversion.source.program


def target_program(conversion: Conversion) -> t.Program | None:
    """The program that lays OUT out; None where its format needs none."""
    if conversion.target != "megatron-legacy":
        return None
    options = conversion.options
    return program_of(options.rules_out) if options.rules_out else _target_program(options, conversion.source)


def program_of(name: str) -> t.Program:
    """A program: a file, or the name of a shipped one."""
    return shipped_program(name) if name in programs() else parse(_text_of(name), name=os.path.basename(name))


def names_of(name: str) -> t.Program:
    """A name map: a file, or the name of a shipped one."""
    return shipped_names(name) if name in name_maps() else parse(_text_of(name), name=os.path.basename(name))


def _text_of(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_TEXT_NBYTES + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: expected UTF-8 text: {error}") from None
    except OSError as error:
        raise Refused(f"{path}: expected a file or the name of a shipped one ({', '.join(name_maps())}): {error}") from None


ReadScalar = Callable[[Reading, StoredTensor], bytes]


def read_scalar(reading: Reading, stored: StoredTensor) -> bytes:
    """A 0-d state of an optimizer, which stands in its table."""
    return bytes(reading.stored(stored))


def unread_scalar(reading: Reading, stored: StoredTensor) -> bytes:
    """Zeros in its place, for a dry run, which reads no tensor. [CLI-62]"""
    return bytes(stored.nbytes)


def open_source(options: Options, *, scalar: ReadScalar = read_scalar) -> OpenedSource:
    """Opens SOURCE and lays it out by its program. Reads no tensor, but by `scalar`. Raises what readers and programs raise."""
    if _names_universal(options):
        opened = open_records(options.source)
        contents = recorded_contents(opened)
        facts: dict[str, object] = dict(_plain_constants(contents))
        if contents.layout is not None:
            facts.update(lasting(contents.layout.constants))
        program = contents.layout.program if contents.layout else None
        url = path_in(opened.store, opened.name)
        return OpenedSource("universal", contents, Reading(opened=opened), facts, program, url, _stamped(url, (MANIFEST,)))
    listed = _listed(options)
    files = _stamped(listed.folder, (one.path for one in listed.files))
    found = without_numbered(listed, options.only, options.skip)
    reading = Reading(store=open_linked(found.folder))
    program = _source_program(options, found)
    own = {need.name for need in needed(program) if need.default == t.SizeList(None)} if _is_ranked(options) else set()
    given = {name: value for name, value in options.constants.items() if name in _needs(program) - own}  # such lists are OUT's
    try:
        contents = lay(found, program, given, partial(scalar, reading))
    except ProgramFault as error:
        raise _with_a_way_on(error, options, found, program) from None
    facts = {**found.constants, **lasting(contents.layout.constants if contents.layout else {})}
    return OpenedSource(found.format, contents, reading, facts, program, found.folder, files)


def _listed(options: Options) -> ForeignCheckpoint:
    """What the files of another library hold. Reads no tensor."""
    return read_foreign(find_source(open_folder(options.source), options.source_format, options.step))


def program_in_use(options: Options) -> t.Program | None:
    """The program that lays the source out, or OUT where the source is universal, whether it fits or not; None where neither
    side has one. Reads no tensor."""
    if not _names_universal(options):
        return _source_program(options, _listed(options))
    return _target_program(options, open_source(options)) if options.target() == "megatron-legacy" else None


def _with_a_way_on(error: ProgramFault, options: Options, found: ForeignCheckpoint, program: t.Program) -> ProgramFault:
    """The error; where a shipped program for ranks' files does not fit, with what it is for and what to do."""
    if options.rules is not None or found.format not in _PROGRAMS:
        return error
    experts = any(axis == "ep" for rank in found.ranks for axis, _ in rank.coordinate) or found.constants.get("num_experts")
    lacks = "; this release ships none for experts" if experts else ""
    said = f"the shipped program {program.name!r} is for dense GPT models{lacks}"
    return ProgramFault(f"{error.message}\n{said}: change the one that --show-rules prints, and give it by --rules FILE")


def _is_ranked(options: Options) -> bool:
    """Whether OUT has a mesh of its own."""
    return options.target() == "megatron-legacy"


def _stamped(url: str, paths: Iterable[str]) -> tuple[tuple[str, str], ...]:
    store = open_linked(url)
    return tuple((path, stamp_of(store, path) if store.exists(path) else "absent") for path in paths)


def require_unchanged(source: OpenedSource) -> None:
    """Raises Refused if a file of the source has another size or time than when it was listed. [CLI-66]"""
    for (path, then), (_, now) in zip(source.files, _stamped(source.url, (path for path, _ in source.files)), strict=True):
        if now != then:
            raise Refused(f"{path}: the source changed meanwhile: {then} when it was listed, {now} now")


def _names_universal(options: Options) -> bool:
    """Whether SOURCE is a universal checkpoint. Raises NotACheckpoint, Refused where `--from` says another format, or others
    stand there, too."""
    store, name = locate(options.source)
    if not store.exists(f"{name}/{MANIFEST}"):
        return options.source_format == "universal"
    return find_source(open_folder(options.source), options.source_format).format == "universal"


def _plain_constants(contents: Contents) -> Mapping[str, object]:
    """Numbers among the values that a source's configuration left."""
    for pointer in ("/config", "/args"):
        value = contents.values.get(pointer)
        inner = value.get("state", value) if isinstance(value, dict) else None
        if isinstance(inner, dict):
            return {str(key): one for key, one in inner.items()}
    return {}


def _source_program(options: Options, found: ForeignCheckpoint) -> t.Program:
    default = _fitting_program(found)
    if options.rules is None:
        return default
    program = program_of(options.rules)
    if any(isinstance(one, t.Within) for one in program.statements):
        return program
    return _joined(program, default)


def _fitting_program(found: ForeignCheckpoint) -> t.Program:
    """The shipped program of the format; of several the one that has rules for most of the names."""
    names = {(one.item, str(one.name)) for rank in found.ranks for one in rank.tensors if one.state == "value"}
    choices = [shipped_program(name) for name in _PROGRAMS.get(found.format, ("whole",))]
    return max(choices, key=lambda program: known_names(program, names)) if len(choices) > 1 else choices[0]


def _joined(program: t.Program, default: t.Program) -> t.Program:
    """A program without rules, and the default one below it as one text; an order that both have is the first one's."""
    below = default.source.replace(f"ucl {default.version}", f"# {default.name}", 1)
    whole = parse(f"{program.source.rstrip()}\n{below}", name=program.name)
    orders = {one.name: one for one in reversed(whole.statements) if isinstance(one, t.Order)}
    stays = tuple(one for one in whole.statements if not isinstance(one, t.Order) or orders[one.name] is one)
    return replace(whole, statements=stays)


def _needs(program: t.Program) -> set[str]:
    return {need.name for one in program.statements if isinstance(one, t.Needs) for need in one.needs}


def prepare(options: Options, source: OpenedSource) -> Conversion:
    """Decides the whole conversion; no tensor is read. Raises Refused, ProgramFault and Unsupported kinds."""
    target = options.target()
    _check_places(options)
    _check_used(options, source, target)
    contents = with_masters(source.contents, options.weights)
    contents = selected(contents, options.only, options.skip)
    maps = [names_of(name) for name in options.names]
    _check_constants(options, source, maps)
    facts = dict(source.facts)
    for program in maps:
        contents, constants = apply_names(contents, program, facts, options.constants)
        facts = {**constants, **facts}
        if contents.layout_text is not None:  # a later conversion finds what this map found
            text = print_program(with_constants(parse(contents.layout_text, name="layout_text"), constants))
            contents = replace(contents, layout_text=text)
    contents = with_casts(contents, options.casts)
    if not contents.arrays:
        raise Refused(f"{options.source}: nothing is left to convert")
    form: SavedForm | None = None
    if target == "torch":
        form = torch_form(contents, "file")
    elif target == "dcp":
        form = dcp_form(contents)
    elif target == "safetensors":
        beside = config_files(options.config, options.names, contents, {**facts, **options.constants, **options.settings})
        form = with_config(safetensors_form(contents, options.shard_nbytes), beside)
    elif target == "megatron-legacy":
        program = program_of(options.rules_out) if options.rules_out else _target_program(options, source)
        try:
            form = megatron_form(contents, program, facts, options)
        except ProgramFault as error:
            raise _with_advice(error, options, contents, program) from None
    return Conversion(options, source, target, contents, form)


def _with_advice(error: ProgramFault, options: Options, contents: Contents, program: t.Program) -> ProgramFault:
    """The error; where the shipped program was taken because nobody named one, with what would do."""
    if options.names or options.rules or options.rules_out or program.name != shipped_program("megatron").name:
        return error
    names = [name for _, name in contents.parameters()]
    fitting = [name for name in name_maps() if leads_to(names_of(name), names, program)]
    maps = " or ".join(f"--names {name}" for name in fitting) or "--names FILE"
    return ProgramFault(f"{error.message}\nnothing here says how OUT lies: give {maps}, or --rules FILE")


def _target_program(options: Options, source: OpenedSource) -> t.Program:
    if source.format == "universal":
        if options.rules is not None:
            return program_of(options.rules)
        if source.program is not None and not options.names and axes_of(source.program):
            return source.program
    return shipped_program("megatron")


def _check_constants(options: Options, source: OpenedSource, maps: Sequence[t.Program]) -> None:
    known = {need for program in (*maps, *([source.program] if source.program else [])) for need in _needs(program)}
    known |= _needs(shipped_program("megatron")) if options.target() == "megatron-legacy" else set()
    known |= _needs(program_of(options.rules)) if options.rules else set()
    known |= _needs(program_of(options.rules_out)) if options.rules_out else set()
    configured: set[str] = set()
    if options.target() == "safetensors" and options.config is None:
        for template in (json.loads(config_text(name) or "{}") for name in templates_for(options.names)):
            configured |= constants_in(template)
            require_agreement(template, source.facts, {**options.constants, **options.settings})
    for name in options.constants:
        if name not in known | configured:
            needed = ", ".join(sorted(known | configured)) or "none"
            raise Refused(f"--set {name}: no program here needs it; they need {needed}")
    for name, value in options.settings.items():
        if name not in configured:
            raise Refused(f"--set {name}={value}: expected a whole number; {CONFIG} takes others, which is not made here")


def _check_used(options: Options, source: OpenedSource, target: Format) -> None:
    """What is asked for of a side that has no such thing is refused, and not passed over."""
    ranked = target == "megatron-legacy"
    given: Mapping[str, tuple[object, bool, str]] = {
        "--mesh": (options.mesh, ranked, f"OUT is {target}, which has no axes"),
        "--rules-out": (options.rules_out, ranked, f"OUT is {target}, which needs no program"),
        "--rules": (options.rules, ranked or source.format != "universal", f"neither {source.format} nor {target} needs one"),
        "--config": (options.config, target == "safetensors", f"OUT is {target}, beside which no configuration stands"),
    }
    for name, (value, used, why) in given.items():
        if value and not used:
            raise Refused(f"{name}: {why}")


def _check_places(options: Options) -> None:
    """OUT may not lie inside SOURCE."""
    if "://" in options.source or "://" in options.out:
        return
    source, out = (os.path.realpath(path) for path in (options.source, options.out))
    if os.path.commonpath([source, out]) == source and os.path.isdir(source):
        raise Refused(f"{options.out}: OUT lies inside SOURCE ({options.source}); choose another place")
