"""numpy's arrays, scalars and element types as pickles hold them, made out without running numpy's own functions."""

from __future__ import annotations

from math import prod

from elastickpt.errors import ValueNotCarried
from elastickpt.foreign.pickle_values import Instance
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import ArrayValue

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
