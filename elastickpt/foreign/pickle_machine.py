"""The restricted interpreter of pickle opcodes: it builds plain values and inert stand-ins and can run nothing. [FOR-10..16]

A table says what each opcode does. What a pickle names is looked up in the table that the caller gives, never imported; an
opcode or name beyond them is `Unsafe` and says what was wanted. Memory is bounded by the pickle's own length: every opcode
is charged for what it makes. Cycles, deep nesting, and sharing that would unfold to more than the limit are refused, so that
whoever gets the value may walk it.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias

from elastickpt.errors import LimitExceeded, Malformed, Unsafe
from elastickpt.foreign.pickle_tree import check_key, check_tree
from elastickpt.foreign.pickle_values import Instance, Maker
from elastickpt.format.version import MIB

MAX_PICKLE_NBYTES = 512 * MIB
_FREE_NBYTES = 4 * MIB  # what may be made whatever the pickle's length
_NBYTES_FOR_A_BYTE = 64  # and for each byte of it: real pickles need below 20

AllowedNames: TypeAlias = Mapping[str, object]
Persistent: TypeAlias = Callable[[object], object]

_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what protocol 2 writes for modules of Python 3


def read_pickle(data: bytes, *, names: AllowedNames, persistent: Persistent, where: str) -> object:
    """The value of a pickle.

    `names` maps "module.name" to a Maker or to a value; `persistent` makes something of a persistent id. `where` begins
    messages. Raises Unsafe for an opcode or name beyond the lists, LimitExceeded for size, nesting and cycles, Malformed for
    what is no pickle.
    """
    if len(data) > MAX_PICKLE_NBYTES:
        raise LimitExceeded(f"{where}: a pickle of {len(data)} bytes, the limit is {MAX_PICKLE_NBYTES}")
    value = _Machine(data, names, persistent, where).run()
    check_tree(value, nbytes=len(data), where=where)
    return value


class _Machine:
    def __init__(self, data: bytes, names: AllowedNames, persistent: Persistent, where: str) -> None:
        self.data = data
        self.at = 0
        self.names = names
        self.persistent = persistent
        self.where = where
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.left = _FREE_NBYTES + _NBYTES_FOR_A_BYTE * len(data)
        self.ended = False

    def run(self) -> object:
        data, size = self.data, len(self.data)
        while not self.ended:
            if self.at >= size:
                self.malformed("it ends before its STOP")
            code = data[self.at]
            self.at += 1
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise Unsafe(f"{self.where}: it needs the pickle opcode {code:#04x}, which this reader does not follow")
            opcode(self)
        return self.pop()

    def malformed(self, problem: str) -> NoReturn:
        raise Malformed(f"{self.where}: the pickle is broken at byte {self.at}: {problem}")

    def charge(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise LimitExceeded(f"{self.where}: a pickle of {len(self.data)} bytes makes more than its length allows")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            self.malformed(f"{count} bytes are expected, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        found: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return found

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            self.malformed("a name without its end")
        found = self.data[self.at : end]
        self.at = end + 1
        return self.text(found)

    def text(self, data: bytes) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            return self.malformed("text that is no UTF-8")

    def push(self, value: object, nbytes: int = 16) -> None:
        self.charge(nbytes)
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack:
            self.malformed("nothing is on the stack")
        return self.stack.pop()

    def top(self) -> object:
        if not self.stack:
            self.malformed("nothing is on the stack")
        return self.stack[-1]

    def pop_mark(self) -> list[object]:
        if not self.marked:
            self.malformed("no mark is on the stack")
        found = self.stack
        self.stack = self.marked.pop()
        return found

    def pop_tuple(self) -> tuple[object, ...]:
        found = self.pop()
        if type(found) is not tuple:
            self.malformed(f"arguments are expected, found {type(found).__name__}")
        return found

    def call(self, called: object, arguments: tuple[object, ...]) -> object:
        if not isinstance(called, Maker):
            raise Unsafe(f"{self.where}: it wants to call {_said(called)}, which is no known class or function")
        self.charge(64)
        try:
            return called.make(arguments)
        except (TypeError, ValueError, OverflowError, RecursionError) as problem:
            self.malformed(f"{called.name} cannot be made of these arguments ({type(problem).__name__})")

    def name(self, module: str, name: str) -> None:
        full = f"{_MOVED.get(module, module)}.{name}"
        try:
            self.push(self.names[full])
        except KeyError:
            raise Unsafe(
                f"{self.where}: it needs {full}, which is none of the names that this reader knows; nothing was run. If you"
                f" trust the file, load it with the program that wrote it and save tensors and plain values only"
            ) from None

    def key(self, key: object) -> object:
        check_key(key, where=self.where)
        return key


def _said(value: object) -> str:
    return repr(value) if isinstance(value, Instance) else f"a {type(value).__name__}"


def _set_pairs(machine: _Machine, pairs: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, dict):
        raise Unsafe(f"{machine.where}: it sets members of {_said(target)}, which is no mapping")
    if len(pairs) % 2:
        machine.malformed("a key without a value")
    machine.charge(64 * len(pairs))
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        target[machine.key(key)] = value


def _append(machine: _Machine, items: list[object]) -> None:
    target = machine.top()
    if type(target) is not list:
        raise Unsafe(f"{machine.where}: it appends to {_said(target)}, which is no list")
    machine.charge(8 * len(items))
    target.extend(items)


def _add(machine: _Machine, items: list[object]) -> None:
    target = machine.top()
    if type(target) is not set:
        raise Unsafe(f"{machine.where}: it adds to {_said(target)}, which is no set")
    machine.charge(64 * len(items))
    target.update(machine.key(one) for one in items)


def _frozen(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.push(frozenset(machine.key(one) for one in items), 216 + 64 * len(items))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def made(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)), 40 + 8 * count)

    return made


def _marked_tuple(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.push(tuple(items), 40 + 8 * len(items))


def _mark(machine: _Machine) -> None:
    machine.charge(72)
    machine.marked.append(machine.stack)
    machine.stack = []


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_pairs(machine, [key, value])


def _one(then: Callable[[_Machine, list[object]], None]) -> Callable[[_Machine], None]:
    return lambda machine: then(machine, [machine.pop()])


def _many(then: Callable[[_Machine, list[object]], None]) -> Callable[[_Machine], None]:
    return lambda machine: then(machine, machine.pop_mark())


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop_tuple()
    machine.push(machine.call(machine.pop(), arguments))


def _build(machine: _Machine) -> None:
    state, target = machine.pop(), machine.top()
    if isinstance(target, Instance):
        target.state = state
    elif type(target) not in (OrderedDict, Counter):  # attributes of a mapping (`_metadata` of a module) are left out
        raise Unsafe(f"{machine.where}: it sets the state of {_said(target)}, which is no known object")


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        machine.malformed("a name that is no text")
    machine.name(module, name)


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


def _get(code: str) -> Callable[[_Machine], None]:
    def found(machine: _Machine) -> None:
        index = machine.number(code)
        if index not in machine.memo:
            machine.malformed(f"memo {index} is asked for, and was never put")
        machine.push(machine.memo[index])

    return found


def _put(machine: _Machine, index: int) -> None:
    machine.charge(48)
    machine.memo[index] = machine.top()


def _text(code: str) -> Callable[[_Machine], None]:
    def made(machine: _Machine) -> None:
        size = machine.number(code)
        machine.push(machine.text(machine.take(size)), 56 + size)

    return made


def _bytes(code: str) -> Callable[[_Machine], None]:
    def made(machine: _Machine) -> None:
        size = machine.number(code)
        machine.push(machine.take(size), 40 + size)

    return made


def _byte_array(machine: _Machine) -> None:
    size = machine.number("<Q")
    machine.push(bytearray(machine.take(size)), 64 + size)


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number("<B")), "little", signed=True), 64)


def _float(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0], 32)


def _protocol(machine: _Machine) -> None:
    found = machine.number("<B")
    if found > 5:
        raise Unsafe(f"{machine.where}: pickle protocol {found}, this reader knows 2 to 5")


def _frame(machine: _Machine) -> None:
    machine.take(8)


def _stop(machine: _Machine) -> None:
    machine.ended = True


Opcode: TypeAlias = Callable[[_Machine], None]


# Those of torch's weights_only reader, and the plain ones that protocols 4 and 5 write in their place.
_OPCODES: dict[int, Opcode] = {
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.push(machine.number("<i"), 32),
    ord("K"): lambda machine: machine.push(machine.number("<B")),
    ord("M"): lambda machine: machine.push(machine.number("<H"), 32),
    0x8A: _long,
    ord("G"): _float,
    ord("X"): _text("<I"),
    0x8C: _text("<B"),
    0x8D: _text("<Q"),
    ord("U"): _text("<B"),
    ord("B"): _bytes("<I"),
    ord("C"): _bytes("<B"),
    0x8E: _bytes("<Q"),
    0x96: _byte_array,
    ord("]"): lambda machine: machine.push([], 56),
    ord("}"): lambda machine: machine.push({}, 64),
    ord(")"): lambda machine: machine.push(()),
    0x8F: lambda machine: machine.push(set(), 216),
    0x91: _frozen,
    ord("t"): _marked_tuple,
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("("): _mark,
    ord("a"): _one(_append),
    ord("e"): _many(_append),
    ord("s"): _set_item,
    ord("u"): _many(_set_pairs),
    0x90: _many(_add),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _reduce,  # NEWOBJ: a Maker makes of a class what it makes of a function
    ord("b"): _build,
    ord("Q"): lambda machine: machine.push(machine.persistent(machine.pop())),
    ord("h"): _get("<B"),
    ord("j"): _get("<I"),
    ord("q"): lambda machine: _put(machine, machine.number("<B")),
    ord("r"): lambda machine: _put(machine, machine.number("<I")),
    0x94: lambda machine: _put(machine, len(machine.memo)),
    0x80: _protocol,
    0x95: _frame,
    ord("."): _stop,
}
