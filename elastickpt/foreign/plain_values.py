"""Between what a pickle held and values that a checkpoint carries: objects of named classes become marked mappings. [FOR-7]

`{"$class": name, "arguments": tuple, "state": value}` stands for an object; tensors and numpy arrays become `ArrayValue`s.
`from_plain` is the inverse, but for numpy's own objects, which are made out without running its functions.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from math import prod

from elastickpt.errors import Malformed, ValueNotCarried
from elastickpt.foreign.listing import FileConstant, NotCarried, StoredTensor
from elastickpt.foreign.pickle_names import NAMES, is_odd_tensor
from elastickpt.foreign.pickle_values import ElementType, Instance, Maker
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import ArrayValue, DeviceValue, DtypeValue
from elastickpt.format.version import MAX_SMALL_ARRAY_NBYTES

CLASS = "$class"
_DEVICE = "torch.device"
ReadTensor = Callable[[StoredTensor], bytes]


def to_plain(value: object, read: ReadTensor, *, where: str) -> object:
    """A value of builtins and ArrayValues. Raises ValueNotCarried, naming the place, for what cannot be one."""
    if isinstance(value, StoredTensor):
        if value.nbytes > MAX_SMALL_ARRAY_NBYTES:
            raise ValueNotCarried(f"{where}: a tensor of {value.nbytes} bytes among plain values")
        return ArrayValue(value.dtype, value.shape, read(value), "torch")
    if isinstance(value, ElementType):
        return DtypeValue(value.name)
    if isinstance(value, Instance):
        return _instance(value, read, where)
    if isinstance(value, OrderedDict):
        return OrderedDict((key, to_plain(one, read, where=f"{where}/{key}")) for key, one in value.items())
    if isinstance(value, Counter):
        return value
    if isinstance(value, dict):
        return {_key(key, where): to_plain(one, read, where=f"{where}/{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [to_plain(one, read, where=f"{where}/{k}") for k, one in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(to_plain(one, read, where=f"{where}/{k}") for k, one in enumerate(value))
    if isinstance(value, bytearray):
        return bytes(value)
    if value is None or isinstance(value, bool | int | float | str | bytes | complex | set | frozenset):
        return value
    raise ValueNotCarried(f"{where}: a {type(value).__name__} among plain values")


def _key(key: object, where: str) -> object:
    if isinstance(key, Instance | ElementType):
        raise ValueNotCarried(f"{where}: a mapping whose key is {key!r}")
    return key


def _instance(value: Instance, read: ReadTensor, where: str) -> object:
    if is_odd_tensor(value):
        raise ValueNotCarried(f"{where}: a tensor made by {value.name}, which no array can hold")
    array = numpy_array(value, where=where)
    if array is not None:
        return array
    if value.name == _DEVICE and all(isinstance(one, str | int) for one in value.arguments):
        return DeviceValue(":".join(map(str, value.arguments)))
    arguments = tuple(to_plain(one, read, where=f"{where}/{k}") for k, one in enumerate(value.arguments))
    return {CLASS: value.name, "arguments": arguments, "state": to_plain(value.state, read, where=where)}


def from_plain(value: object) -> object:
    """What `to_plain` was given; ArrayValues stay what they are. Raises Malformed for a class that is not listed."""
    if isinstance(value, DtypeValue):
        return ElementType(value.name)
    if isinstance(value, DeviceValue):
        return Instance(_DEVICE, (value.name,))
    if isinstance(value, Counter):
        return value
    if isinstance(value, dict):
        if CLASS in value and set(value) == {CLASS, "arguments", "state"}:
            name, arguments = value[CLASS], from_plain(value["arguments"])
            if not isinstance(name, str) or not isinstance(NAMES.get(name), Maker) or not isinstance(arguments, tuple):
                raise Malformed(f"a value of class {name!r}, which is none of the known ones")
            return Instance(name, arguments, from_plain(value["state"]))
        inner = {key: from_plain(one) for key, one in value.items()}
        return OrderedDict(inner) if isinstance(value, OrderedDict) else inner
    if isinstance(value, list):
        return [from_plain(one) for one in value]
    if isinstance(value, tuple):
        return tuple(from_plain(one) for one in value)
    return value


def carried(
    values: Mapping[object, object], read: ReadTensor, *, where: str
) -> tuple[dict[str, object], tuple[NotCarried, ...]]:
    """The members of a mapping that can be carried, by JSON pointer, and the others with their reasons."""
    found: dict[str, object] = {}
    left: list[NotCarried] = []
    for key, value in values.items():
        place = f"/{str(key).replace('~', '~0').replace('/', '~1')}"
        try:
            found[place] = to_plain(value, read, where=place)
        except ValueNotCarried as problem:
            left.append(NotCarried(f"{where}{place}", problem.message))
    return found, tuple(left)


def constants_of(values: Mapping[str, object]) -> dict[str, FileConstant]:
    """The plain numbers and words of a mapping, element types by name, members of mappings in it as "outer.inner"."""
    found: dict[str, FileConstant] = {}
    for name, value in values.items():
        if isinstance(value, ElementType | DtypeValue):
            found[name] = value.name
        elif value is None or isinstance(value, bool | int | float | str):
            found[name] = value
        elif isinstance(value, tuple | list) and all(isinstance(one, bool | int | float | str) for one in value):
            found[name] = tuple(value)
        elif isinstance(value, dict):
            inner = constants_of({str(key): one for key, one in value.items()})
            found.update({f"{name}.{key}": one for key, one in inner.items()})
    return found


def constants_among(values: Mapping[str, object]) -> dict[str, FileConstant]:
    """The constants of plain values that programs keep beside their tensors under `config` or `args`."""
    found: dict[str, FileConstant] = {}
    for pointer in ("/config", "/args"):
        value = values.get(pointer)
        inner = value.get("state") if isinstance(value, dict) and CLASS in value else value
        if isinstance(inner, dict):
            found |= constants_of({str(name): one for name, one in inner.items()})
    return found


_KINDS = {"f": "float", "i": "int", "u": "uint", "c": "complex"}


def numpy_array(value: Instance, *, where: str) -> ArrayValue | None:
    """The array or scalar that a pickled numpy object is; None for objects of other libraries.

    Raises ValueNotCarried for element types that no array of a checkpoint has, big-endian ones, and Fortran order.
    """
    module, _, name = value.name.rpartition(".")
    if not module.startswith("numpy"):
        return None
    if name == "scalar" and len(value.arguments) == 2:
        return _array(value.arguments[0], (), value.arguments[1], where)
    if name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, fortran, data = value.state
        if fortran is False or _is_row(shape):
            return _array(dtype, shape, data, where)
    if name == "_frombuffer" and len(value.arguments) == 4:
        data, dtype, shape, order = value.arguments
        if order == "C":
            return _array(dtype, shape, data, where)
    raise ValueNotCarried(f"{where}: a numpy object ({name}) that is no array in C order")


def _is_row(shape: object) -> bool:
    return isinstance(shape, tuple) and len(shape) <= 1


def _array(dtype: object, shape: object, data: object, where: str) -> ArrayValue:
    name = _dtype_name(dtype, where)
    if not isinstance(shape, tuple) or not all(type(one) is int and one >= 0 for one in shape):
        raise ValueNotCarried(f"{where}: a numpy array without a shape")
    if not isinstance(data, bytes | bytearray) or len(data) != prod(shape) * DTYPES[name].itemsize:
        raise ValueNotCarried(f"{where}: a numpy array whose bytes do not fit its shape {shape}")
    return ArrayValue(name, shape, bytes(data), "numpy")


def _dtype_name(dtype: object, where: str) -> str:
    """ "float32" of what numpy pickles for it: the class with "f4", and a state of which the second is the byte order."""
    if isinstance(dtype, Instance) and dtype.name == "numpy.dtype" and dtype.arguments:
        code = dtype.arguments[0]
        order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
        if isinstance(code, str) and order in ("<", "|", "="):
            name = "bool" if code == "b1" else f"{_KINDS.get(code[:1], '?')}{8 * int(code[1:]) if code[1:].isdigit() else 0}"
            if name in DTYPES:
                return name
    raise ValueNotCarried(f"{where}: a numpy array of an element type that no array of a checkpoint has")
