"""What `inspect` tells, as values: taken from a checkpoint's records, before it is known how they will be shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from elastickpt.errors import Malformed
from elastickpt.format.arrays import ArrayId, Box
from elastickpt.format.encode_values import pointer_token, value_digest
from elastickpt.format.piece_columns import FragmentColumns
from elastickpt.format.records import ArrayRecord, Field, FieldKind, Manifest, OptimizerTable
from elastickpt.format.values import Value
from elastickpt.loading.checkpoint import Checkpoint

Setting = tuple[FieldKind, str]  # a column of an optimizer table: its kind and key


@dataclass(frozen=True, slots=True)
class ArrayFact:
    """One array: its record, and where it stood on which mesh. `grid` is the number of chunks along each axis."""

    record: ArrayRecord
    grid: tuple[int, ...]
    mesh: str | None
    axes: tuple[str, ...]
    placements: tuple[str, ...] | None

    @property
    def id(self) -> ArrayId:
        return self.record.spec.id

    @property
    def nbytes(self) -> int:
        return self.record.spec.nbytes

    @property
    def chunks(self) -> int:
        return prod(self.grid)


@dataclass(frozen=True, slots=True)
class Settings:
    """One distinct set of an optimizer's settings, and the (model item, FQN) of the parameters that have it."""

    parameters: tuple[tuple[str, str], ...]
    values: Mapping[Setting, Value]


@dataclass(frozen=True, slots=True)
class OptimizerFact:
    """An optimizer: settings that all its parameters share, and the sets in which they differ, most parameters first."""

    item: str
    parameters: int
    shared: Mapping[Setting, Value]
    groups: tuple[Settings, ...]


@dataclass(frozen=True, slots=True)
class WriterFact:
    """What one writer stored. `nbytes` are those of elements, `file_nbytes` those of its fragment file."""

    writer: int
    path: str
    file_nbytes: int
    arrays: int
    pieces: int
    nbytes: int
    block_nbytes: int
    values: int


@dataclass(frozen=True, slots=True)
class PieceFact:
    """One stored piece: which elements of which array, and where they lie."""

    array: ArrayId
    key: str
    writer: int
    box: Box
    file: str
    offset: int
    nbytes: int
    row_nbytes: int
    row_stride: int


class Facts:
    """The facts of one checkpoint. Those of writers and pieces read fragment files, the others manifest and index."""

    def __init__(self, checkpoint: Checkpoint, *, names: Iterable[str] = ()) -> None:
        self._checkpoint = checkpoint
        self._names = tuple(names)

    @property
    def manifest(self) -> Manifest:
        return self._checkpoint.manifest

    @property
    def place(self) -> str:
        """The checkpoint's folder, whatever named it: an absolute local path, else a URL."""
        return self._checkpoint.path

    @cached_property
    def every(self) -> tuple[ArrayFact, ...]:
        """All arrays, in the order of their keys."""
        return tuple(_array(record, self.manifest) for record in self._checkpoint.records.values())

    @cached_property
    def arrays(self) -> tuple[ArrayFact, ...]:
        """The arrays that were asked for, in the order of their keys."""
        return tuple(fact for fact in self.every if not self._names or _matches(fact.id, self._names))

    @property
    def filtered(self) -> bool:
        return bool(self._names)

    @property
    def nbytes(self) -> int:
        """Of all arrays of the checkpoint."""
        return sum(fact.nbytes for fact in self.every)

    @property
    def chunks(self) -> int:
        """Of all arrays of the checkpoint."""
        return sum(fact.chunks for fact in self.every)

    @property
    def parameters(self) -> int:
        """Parameters, and buffers, which a checkpoint does not tell from them."""
        return len(self._checkpoint.parameters)

    @property
    def elements(self) -> int:
        """Elements of all parameters and buffers together, as they are stored."""
        return sum(prod(parameter.shape) for parameter in self._checkpoint.parameters.values())

    @cached_property
    def optimizers(self) -> tuple[OptimizerFact, ...]:
        return tuple(_optimizer(table) for table in self._checkpoint.tables)

    def values(self) -> list[tuple[str, Value]]:
        """The replicated values, leaf by leaf, by JSON pointer."""
        return leaves(self._checkpoint.values)

    def values_of(self, writer: int) -> list[tuple[str, Value]]:
        """One writer's own values, leaf by leaf, by JSON pointer."""
        return leaves(self._checkpoint.per_rank(writer))

    def writers(self) -> list[WriterFact]:
        """Every writer. Raises Damaged kinds for a fragment file that is not what was written."""
        files = self.manifest.fragments
        return [_writer(columns, files[columns.writer].path, files[columns.writer].nbytes) for columns in self._maps()]

    def pieces(self) -> list[PieceFact]:
        """Every stored piece of the arrays that were asked for. Raises Damaged kinds as `writers` does."""
        wanted = {fact.record.key: fact.id for fact in self.arrays}
        return [piece for columns in self._maps() for piece in _pieces(columns, wanted)]

    def _maps(self) -> Iterable[FragmentColumns]:
        return self._checkpoint.fragments()


def _array(record: ArrayRecord, manifest: Manifest) -> ArrayFact:
    grid = tuple(-(-extent // step) if step else 0 for extent, step in zip(record.spec.shape, record.chunk_shape, strict=True))
    if record.layout is None:
        return ArrayFact(record, grid, None, (), None)
    if record.layout >= len(manifest.layouts):
        raise Malformed(f"index: array {record.spec.id}: layout {record.layout}, the manifest has {len(manifest.layouts)}")
    layout = manifest.layouts[record.layout]
    mesh = manifest.meshes[layout.mesh]
    return ArrayFact(record, grid, mesh.name, mesh.axes, layout.placements)


def _matches(array: ArrayId, globs: tuple[str, ...]) -> bool:
    """Whether a glob matches the name, or the name with its item, its state or both. [CLI-22]"""
    name = f"{array.item}/{array.name}" if array.name else array.item
    spellings = {array.name, name}
    if array.state:
        spellings |= {f"{array.name}/{array.state}", f"{name}/{array.state}"}
    return any(fnmatchcase(spelling, glob) for spelling in spellings for glob in globs)


def _optimizer(table: OptimizerTable) -> OptimizerFact:
    columns = {(field.kind, field.key): _codes(field) for field in table.fields}
    values = {(field.kind, field.key): field.values for field in table.fields}
    differing = [key for key, codes in columns.items() if len(set(codes)) > 1]
    shared = {key: values[key][codes[0]] for key, codes in columns.items() if key not in differing and codes and codes[0] >= 0}
    rows: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for row, parameter in enumerate(table.parameters):
        rows.setdefault(tuple(columns[key][row] for key in differing), []).append(parameter)
    groups = [
        Settings(tuple(parameters), {key: values[key][code] for key, code in zip(differing, codes, strict=True) if code >= 0})
        for codes, parameters in rows.items()
    ]
    groups.sort(key=lambda group: -len(group.parameters))
    return OptimizerFact(table.item, len(table.parameters), shared, tuple(groups))


def _codes(field: Field) -> list[int]:
    """A field's code for each parameter, equal values having one code: tables merged from several ranks may not."""
    first: dict[str, int] = {}
    same = [first.setdefault(value_digest(value), code) for code, value in enumerate(field.values)]
    return [same[code] if code >= 0 else -1 for code in field.which]


def _writer(columns: FragmentColumns, path: str, file_nbytes: int) -> WriterFact:
    pieces = columns.pieces
    own = columns.values if isinstance(columns.values, Mapping) else {}
    nbytes = int(pieces.nbytes.sum())
    return WriterFact(
        columns.writer, path, file_nbytes, len(pieces.arrays), len(pieces), nbytes, columns.block_nbytes, len(leaves(own))
    )


def _pieces(columns: FragmentColumns, wanted: Mapping[str, ArrayId]) -> Iterable[PieceFact]:
    for key, places in columns.pieces.by_array().items():
        if key not in wanted:
            continue
        for number in places:
            piece = columns.pieces.piece(number)
            yield PieceFact(
                wanted[key],
                key,
                columns.writer,
                piece.box,
                columns.files[piece.file].path,
                piece.offset,
                piece.nbytes,
                piece.row_nbytes,
                piece.row_stride,
            )


def leaves(values: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Values by JSON pointer, mappings with text keys taken apart: {"/a": {"b": 1}} -> [("/a/b", 1)]."""
    found: list[tuple[str, Value]] = []
    for place, value in values.items():
        if type(value) is dict and value and all(type(key) is str for key in value):
            found += leaves({f"{place}/{pointer_token(key)}": one for key, one in value.items()})
        else:
            found.append((place, value))
    return found


def approximate_since(manifest: Manifest) -> int | None:
    """The completed steps at which training first went on from a stage that was rebuilt approximately; None where it never did.
    [REC-60]"""
    elastic = manifest.values.get("/elastic") if isinstance(manifest.values, Mapping) else None
    lineage = elastic.get("lineage") if isinstance(elastic, Mapping) else None
    if not isinstance(lineage, list | tuple):
        return None
    steps = [one.get("step") for one in lineage if isinstance(one, Mapping)]
    return min((step for step in steps if isinstance(step, int)), default=None)
