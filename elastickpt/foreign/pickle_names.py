"""The names that a pickle may use, and what is made of each: `spec/foreign-files.md` lists them. [FOR-11, FOR-12]

First what torch 2.13 accepts with `weights_only=True` by itself; then stand-ins that hold data only, for what frameworks put
beside their tensors. Whatever is not of use as an array or a plain value becomes an `Instance`: it can be named, not used.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from elastickpt.errors import Malformed, Unsupported
from elastickpt.foreign.listing import StoredTensor
from elastickpt.foreign.pickle_tree import check_key
from elastickpt.foreign.pickle_values import ElementType, Instance, Make, Maker, StorageClass, StorageReference
from elastickpt.format.arrays import DTYPES

_STORAGE_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QUInt8": "quint8",
    "QInt8": "qint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
_ELEMENT_TYPES = (
    *("float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128", "bool"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)
# Accepted and held, but no arrays: a listing that meets one says so by this name.
_TENSORS_OF_OTHER_KINDS = (
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
)
_OLD_TENSOR_CLASSES = ("BFloat16", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_ENUMS = (  # of a framework's `args`: the member's value is kept
    "megatron.core.enums.Fp4Recipe",
    "megatron.core.enums.Fp8Recipe",
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
    "megatron.legacy.model.enums.AttnMaskType",
    "megatron.legacy.model.enums.AttnType",
    "megatron.legacy.model.enums.LayerType",
    "megatron.legacy.model.enums.ModelType",
    "megatron.model.enums.AttnMaskType",
    "megatron.model.enums.AttnType",
    "megatron.model.enums.LayerType",
    "megatron.model.enums.ModelType",
    "megatron.model.enums.PositionEmbeddingType",
    "signal.Signals",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
)
_HELD = (  # classes of which the arguments and the state are kept, and nothing is done
    "_io.BytesIO",
    "argparse.Namespace",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath",
    "pathlib._local.WindowsPath",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "types.SimpleNamespace",
)


def _held(name: str) -> Maker:
    return Maker(name, lambda arguments: Instance(name, arguments))


def _one_or_none(arguments: tuple[object, ...]) -> object:
    if len(arguments) > 1:
        raise TypeError("more than one argument")
    return arguments[0] if arguments else ()


def _items(value: object) -> Iterable[object]:
    if isinstance(value, list | tuple | set | frozenset):
        return value
    raise TypeError(f"a {type(value).__name__} has no elements")


def _ordered(arguments: tuple[object, ...]) -> object:
    made: OrderedDict[object, object] = OrderedDict()
    for pair in _items(_one_or_none(arguments)):
        key, value = _items(pair)
        check_key(key, where="an ordered mapping")
        made[key] = value
    return made


def _counter(arguments: tuple[object, ...]) -> object:
    given = _one_or_none(arguments)
    made: Counter[object] = Counter()
    if isinstance(given, dict):
        made.update({key: count for key, count in given.items() if isinstance(count, int | float)})
        if len(made) != len(given):
            raise TypeError("a count that is no number")
    elif given != ():
        raise TypeError("a counter of something else than a mapping")
    return made


def _set(arguments: tuple[object, ...]) -> object:
    made = set()
    for one in _items(_one_or_none(arguments)):
        check_key(one, where="a set")
        made.add(one)
    return made


_ENCODINGS = {  # of texts that stand for bytes, as they may be spelled; no other name is looked up
    "latin1": "latin-1",
    "latin-1": "latin-1",
    "iso8859-1": "latin-1",
    "iso-8859-1": "latin-1",
    "utf8": "utf-8",
    "utf-8": "utf-8",
}


def _encoded(arguments: tuple[object, ...]) -> object:
    text, *said = arguments
    encoding = _ENCODINGS.get(str(said[0]).lower().replace("_", "-")) if said else "utf-8"
    if type(text) is not str or len(said) > 1 or encoding is None:
        raise TypeError("bytes are written as text of one character a byte")
    return text.encode(encoding)


def _byte_array(arguments: tuple[object, ...]) -> object:
    given = _one_or_none(arguments)
    if isinstance(given, bytes):
        return bytearray(given)
    return bytearray(number for number in _items(given) if isinstance(number, int))


def _complex(arguments: tuple[object, ...]) -> object:
    real, imaginary = arguments
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise TypeError("two numbers are expected")
    return complex(real, imaginary)


def _size(arguments: tuple[object, ...]) -> object:
    return tuple(_whole_numbers(_one_or_none(arguments)))


def _whole_numbers(value: object) -> tuple[int, ...]:
    found = tuple(_items(value))
    if not all(type(one) is int for one in found):
        raise TypeError("whole numbers are expected")
    return tuple(one for one in found if isinstance(one, int))


def _layout(arguments: tuple[object, ...]) -> object:
    return Instance("torch.layout", arguments)


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError("a whole number is expected")
    return value


def _tensor(at: tuple[object, ...], dtype: str | None, flags: object) -> StoredTensor:
    """A strided tensor of a storage of the file. Raises Malformed where it leaves the storage, Unsupported by dtype."""
    reference, offset, shape, strides = at
    if not isinstance(reference, StorageReference):
        raise TypeError("a storage is expected")
    found = dtype or reference.kind.dtype
    if found is None:
        raise TypeError("an untyped storage without an element type")
    where = reference.storage.file
    if found not in DTYPES:
        raise Unsupported(f"{where}: a tensor of element type {found}, which no array can have")
    if isinstance(flags, Mapping) and any(flags.values()):
        marks = ", ".join(str(name) for name, on in flags.items() if on)
        raise Unsupported(f"{where}: a tensor whose bytes are still to be changed ({marks}); save `tensor.resolve_{marks}()`")
    return StoredTensor(reference.storage, _number(offset), _whole_numbers(shape), _whole_numbers(strides), found)


def _tensor_v2(arguments: tuple[object, ...]) -> object:
    return _tensor(arguments[:4], None, arguments[6] if len(arguments) > 6 else None)


def _tensor_v3(arguments: tuple[object, ...]) -> object:
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, ElementType):
        raise TypeError("an element type is expected")
    return _tensor(arguments[:4], dtype.name, arguments[7] if len(arguments) > 7 else None)


def _parameter(arguments: tuple[object, ...]) -> object:
    if not arguments:
        raise TypeError("a parameter without its tensor")
    return arguments[0]


def _with_attributes(arguments: tuple[object, ...]) -> object:
    """A tensor with Python attributes, or of a class of its own: the tensor that it is made of."""
    called, _, inner, *_ = arguments
    if not isinstance(called, Maker) or not isinstance(inner, tuple):
        raise TypeError("a function and its arguments are expected")
    if called.make is _with_attributes:
        raise Malformed("a tensor with attributes of a tensor with attributes")
    return called.make(inner)


_CALLED: dict[str, Make] = {
    "_codecs.encode": _encoded,
    "builtins.bytearray": _byte_array,
    "builtins.complex": _complex,
    "builtins.set": _set,
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.serialization._get_layout": _layout,
}


def _storage_classes() -> Iterable[tuple[str, object]]:
    for kind, dtype in _STORAGE_DTYPES.items():
        for name in (f"torch.{kind}Storage", f"torch.cuda.{kind}Storage")[: 1 if kind.startswith("Q") else 2]:
            yield name, StorageClass(name, dtype)
    for name in ("torch.storage.TypedStorage", "torch.storage.UntypedStorage"):
        yield name, StorageClass(name, None)


def _old_classes() -> Iterable[str]:
    yield "torch.Tensor"
    yield "torch.device"
    for prefix in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"):
        yield from (f"{prefix}.{kind}Tensor" for kind in _OLD_TENSOR_CLASSES)
    yield from ("torch.BoolTensor", "torch.cuda.BoolTensor")
    for scheme in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"):
        yield f"torch.{scheme}"
    yield "torch.per_channel_affine_float_qparams"


def storage_class(dtype: str) -> str | None:
    """The storage class of torch for an element type; None for one that came after such classes."""
    return next((f"torch.{kind}Storage" for kind, name in _STORAGE_DTYPES.items() if name == dtype), None)


def is_odd_tensor(value: object) -> bool:
    """Whether it stands for a tensor that no array can hold: sparse, quantized, without storage, of an old class."""
    return isinstance(value, Instance) and value.name in _ODD_TENSORS


_ODD_TENSORS = frozenset((*_TENSORS_OF_OTHER_KINDS, *(name for name in _old_classes() if name.endswith("Tensor"))))

NAMES: Mapping[str, object] = {
    **{name: Maker(name, make) for name, make in _CALLED.items()},
    **dict(_storage_classes()),
    **{f"torch.{name}": ElementType(name) for name in _ELEMENT_TYPES},
    **{name: _held(name) for name in (*_old_classes(), *_TENSORS_OF_OTHER_KINDS, *_ENUMS, *_HELD)},
}
