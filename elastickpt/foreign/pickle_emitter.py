"""Plain values, tensors and known objects as a pickle of protocol 2, as torch.save writes it. [FOR-94..96]

What `weights_only=True` does not take by itself is refused, but for the objects that `pickle_names` knows: those of a
framework's own files, which are read by that framework.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from elastickpt.errors import ValueNotCarried
from elastickpt.foreign.file_plans import NewTensor
from elastickpt.foreign.pickle_names import NAMES, storage_class
from elastickpt.foreign.pickle_values import ElementType, Instance
from elastickpt.format.arrays import DTYPES
from elastickpt.format.values import ArrayValue
from elastickpt.layout.grid import c_strides

KeyOf = Callable[[NewTensor | ArrayValue], str]
_BATCH = 1000  # entries that one opcode adds, as in pickle itself


def emit_pickle(value: object, key_of: KeyOf) -> bytes:
    """The pickle. `key_of` gives a tensor the key of its storage. Raises ValueNotCarried for values without a spelling."""
    emitter = _Emitter(key_of)
    emitter.emit(value, "")
    return b"\x80\x02" + bytes(emitter.made) + b"."


class _Emitter:
    def __init__(self, key_of: KeyOf) -> None:
        self.key_of = key_of
        self.made = bytearray()
        self.memo: dict[tuple[str, str], int] = {}

    def emit(self, value: object, where: str) -> None:
        if value is None or isinstance(value, bool):
            self.made += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif type(value) is int:
            self._int(value)
        elif type(value) is float:
            self.made += b"G" + struct.pack(">d", value)
        elif type(value) is str:
            self._remembered("text", value, lambda: self._text(value, where))
        elif isinstance(value, NewTensor | ArrayValue):
            self._tensor(value, where)
        elif isinstance(value, ElementType):
            self._name(f"torch.{value.name}")
        elif isinstance(value, Instance):
            self._instance(value, where)
        else:
            self._container(value, where)

    def _container(self, value: object, where: str) -> None:
        if isinstance(value, OrderedDict):
            self._call("collections.OrderedDict", (), where)
            self._members(value, where)
        elif isinstance(value, Counter):
            self._call("collections.Counter", (dict(value),), where)
        elif type(value) is dict:
            self.made += b"}"
            self._members(value, where)
        elif type(value) is list:
            self.made += b"]"
            for start in range(0, len(value), _BATCH):
                self._marked(value[start : start + _BATCH], where, b"e")
        elif type(value) is tuple:
            self._tuple(value, where)
        elif type(value) is set:
            self._call("builtins.set", (list(value),), where)
        elif isinstance(value, bytes | bytearray):
            self._call("_codecs.encode", (bytes(value).decode("latin-1"), "latin1"), where)
        elif type(value) is complex:
            self._call("builtins.complex", (value.real, value.imag), where)
        else:
            raise ValueNotCarried(f"{where or '/'}: no file of torch.save can hold a {type(value).__name__}")

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.made += b"K" + bytes((value,))
        elif -(1 << 31) <= value < 1 << 31:
            self.made += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 255:
                raise ValueNotCarried(f"no file of torch.save can hold an integer of {len(data)} bytes")
            self.made += b"\x8a" + bytes((len(data),)) + data

    def _text(self, value: str, where: str) -> None:
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueNotCarried(f"{where or '/'}: text with a lone surrogate") from None
        self.made += b"X" + struct.pack("<I", len(data)) + data

    def _remembered(self, kind: str, text: str, make: Callable[[], None]) -> None:
        """What stands several times is written once, and fetched from the memo after that."""
        number = self.memo.get((kind, text))
        if number is None:
            make()
            number = self.memo[kind, text] = len(self.memo)
            self.made += b"r" + struct.pack("<I", number)
        else:
            self.made += b"j" + struct.pack("<I", number)

    def _name(self, name: str) -> None:
        module, _, last = name.rpartition(".")
        module = {"builtins": "__builtin__"}.get(module, module)
        self._remembered("name", name, lambda: self.made.extend(f"c{module}\n{last}\n".encode()))

    def _tuple(self, value: tuple[object, ...], where: str) -> None:
        if len(value) > 3:
            self._marked(value, where, b"t")
            return
        for k, one in enumerate(value):
            self.emit(one, f"{where}/{k}")
        self.made += (b")", b"\x85", b"\x86", b"\x87")[len(value)]

    def _marked(self, values: Iterable[object], where: str, opcode: bytes) -> None:
        self.made += b"("
        for k, one in enumerate(values):
            self.emit(one, f"{where}/{k}")
        self.made += opcode

    def _members(self, value: dict[object, object], where: str) -> None:
        pairs = list(value.items())
        for start in range(0, len(pairs), _BATCH):
            self.made += b"("
            for key, one in pairs[start : start + _BATCH]:
                self.emit(key, f"{where}/{key}")
                self.emit(one, f"{where}/{key}")
            self.made += b"u"

    def _call(self, name: str, arguments: tuple[object, ...], where: str) -> None:
        self._name(name)
        self._tuple(arguments, where)
        self.made += b"R"

    def _instance(self, value: Instance, where: str) -> None:
        if value.name not in NAMES and value.name != "torch.layout":
            raise ValueNotCarried(f"{where or '/'}: an object of class {value.name}, which is none of the known ones")
        if value.name == "torch.layout":
            self._call("torch.serialization._get_layout", value.arguments, where)
            return
        self._name(value.name)
        self._tuple(value.arguments, where)
        self.made += b"R" if value.arguments else b"\x81"
        if value.state is not None:
            self.emit(value.state, where)
            self.made += b"b"

    def _tensor(self, value: NewTensor | ArrayValue, where: str) -> None:
        """A call of torch's own function with the storage as a persistent id."""
        count = 1
        for size in value.shape:
            count *= size
        kind = storage_class(value.dtype)
        self._name(f"torch._utils._rebuild_tensor_{'v2' if kind else 'v3'}")
        self.made += b"(("
        self.emit("storage", where)
        self._name(kind or "torch.storage.UntypedStorage")
        self.emit(self.key_of(value), where)
        self.emit("cpu", where)
        self.emit(count if kind else count * DTYPES[value.dtype].itemsize, where)
        self.made += b"tQK\x00"
        self._tuple(value.shape, where)
        self._tuple(c_strides(value.shape, 1), where)
        self.made += b"\x89"
        self._call("collections.OrderedDict", (), where)
        if not kind:
            self._name(f"torch.{value.dtype}")
        self.made += b"tR"
