"""The part of pickle that `torch.save` writes, read as data.

An interpreter of its own: Python's `pickle` is not used, and no name in the file is ever imported or
called.  A name is looked up in `_NAMES`; what is not there is refused.  Work is bounded by the number
of opcodes, memory by the bytes of the pickle.  Where the elements of a storage lie: `torch_file.py`.

Source: the opcodes of protocols 2 to 4 in Python's `pickletools`; `torch/_utils.py` for what the
functions that rebuild tensors take.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from edgellama.errors import ModelFileError, UnsupportedModelError, shown

MAX_OPCODES = 1 << 20  # a tensor takes about 30


class Storage(NamedTuple):
    """Elements that tensors share: a key of the file, and their type ("" counts bytes)."""

    key: str
    dtype: str
    n_elements: int


class PickledTensor(NamedTuple):
    """Where a tensor lies in its storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Type(NamedTuple):
    """A class of storages, or a dtype."""

    dtype: str


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{what} is no list of sizes")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> PickledTensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    shape, strides = _sizes(shape, "a shape"), _sizes(strides, "a stride")
    if len(shape) != len(strides):
        raise ValueError("a tensor has more sizes than strides, or fewer")
    (offset,) = _sizes([offset], "an offset")
    return PickledTensor(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(*args: Any) -> PickledTensor:
    """`_rebuild_tensor_v3`: the storage is untyped, the seventh argument is the dtype."""
    if not isinstance(args[6], _Type):
        raise ValueError("a tensor has no dtype")
    return _tensor(*args[:4])._replace(dtype=args[6].dtype)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _dict(*items: Any) -> dict[Any, Any]:
    if items not in ((), ([],)):
        raise ValueError("an OrderedDict is not built from nothing")
    return {}


_NAMES: dict[tuple[str, str], Callable[..., Any] | _Type] = {
    ("collections", "OrderedDict"): _dict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): _Type(""),
}
for _storage, _dtype, _name in (
    ("DoubleStorage", "float64", "F64"),
    ("FloatStorage", "float32", "F32"),
    ("HalfStorage", "float16", "F16"),
    ("BFloat16Storage", "bfloat16", "BF16"),
    ("LongStorage", "int64", "I64"),
    ("IntStorage", "int32", "I32"),
    ("ShortStorage", "int16", "I16"),
    ("CharStorage", "int8", "I8"),
    ("ByteStorage", "uint8", "U8"),
    ("BoolStorage", "bool", "BOOL"),
    ("", "uint16", "U16"),
    ("", "uint32", "U32"),
    ("", "uint64", "U64"),
    ("", "float8_e4m3fn", "F8_E4M3"),
    ("", "float8_e5m2", "F8_E5M2"),
):
    _NAMES["torch", _dtype] = _Type(_name)
    if _storage:
        _NAMES["torch", _storage] = _Type(_name)


class Content(NamedTuple):
    """What a pickle describes, where it ends, and the element type of each storage it names."""

    value: Any
    end: int
    storages: dict[str, str]


def load(data: bytes, where: str, start: int = 0) -> Content:
    """Read the pickle at byte `start`.

    The value is made of dicts, lists, tuples, numbers, strings, None and `PickledTensor`s.
    Raises: ModelFileError; UnsupportedModelError for a name that is not one of tensors.
    """
    machine = _Machine(data, start, where)
    try:
        value = machine.run()
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        detail = str(error) if type(error) is ValueError else "it breaks off or contradicts itself"
        raise ModelFileError(f"{where} is not sound: {detail} (byte {machine.at})") from None
    return Content(value, machine.at, machine.storages)


class _Machine:
    def __init__(self, data: bytes, at: int, where: str) -> None:
        self.data, self.at, self.where = data, at, where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, str] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.stack.pop()
            if code not in _OPCODES:
                raise ValueError(f"torch.save does not write the opcode {code:#04x}")
            _OPCODES[code](self)
        raise ValueError(f"it has over {MAX_OPCODES} opcodes")

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError("it is cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, length: str) -> str:
        return self.take(self.number(length)).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 256)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, n: int) -> None:
        if n > len(self.stack):
            raise IndexError
        self.stack[-n:] = [tuple(self.stack[-n:])]

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is no string")
        if (module, name) not in _NAMES:
            raise UnsupportedModelError(
                f"{self.where} asks for {shown(f'{module}.{name}')}; only tensors in dicts are read, and "
                "nothing was run. Save the state_dict alone, best as safetensors"
            )
        self.push(_NAMES[module, name])

    def storage(self) -> None:
        kind, type_, key, _, n_elements, *view = self.stack.pop()
        if kind != "storage" or not isinstance(type_, _Type) or not isinstance(key, str):
            raise ValueError("a persistent id is no storage")
        if type(n_elements) is not int or n_elements < 0 or view not in ([], [None]):
            raise ValueError("a storage has no sound size")
        self.storages[key] = type_.dtype
        self.push(Storage(key, type_.dtype, n_elements))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if (
            not isinstance(arguments, tuple)
            or isinstance(function, _Type)
            or not callable(function)
        ):
            raise ValueError("something is called that is no function")
        self.push(function(*arguments))

    def build(self) -> None:
        """Attributes: a state dict carries the versions of its modules there, a tensor nothing."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | PickledTensor):
            raise ValueError("attributes are set on something that has none")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items are set in what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, bool, type(None)):  # a tuple may take forever to hash
                raise ValueError("a key of a dict is no string")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items are appended to what is no list")
        self.stack[-1].extend(items)

    def two(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def long(self) -> int:
        return int.from_bytes(self.take(self.take(1)[0]), "little", signed=True)

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]


_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    ord(code): act
    for code, act in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(m.number("<i")),
        "K": lambda m: m.push(m.number("B")),
        "M": lambda m: m.push(m.number("<H")),
        "\x8a": lambda m: m.push(m.long()),
        "G": lambda m: m.push(m.number(">d")),
        "X": lambda m: m.push(m.text("<I")),
        "\x8c": lambda m: m.push(m.text("B")),
        "U": lambda m: m.push(m.text("B")),  # a string of Python 2
        "T": lambda m: m.push(m.text("<I")),
        "}": lambda m: m.push({}),
        "]": lambda m: m.push([]),
        ")": lambda m: m.push(()),
        "(": lambda m: m.mark(),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "s": lambda m: m.set_items(m.two()),
        "u": lambda m: m.set_items(m.since_mark()),
        "a": lambda m: m.append([m.stack.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "c": lambda m: m.name(m.line(), m.line()),  # GLOBAL
        "\x93": lambda m: m.stack_name(),
        "Q": lambda m: m.storage(),  # BINPERSID
        "R": lambda m: m.call(),  # REDUCE
        "b": lambda m: m.build(),
        "q": lambda m: m.remember(m.number("B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.push(m.memo[m.number("B")]),
        "j": lambda m: m.push(m.memo[m.number("<I")]),
    }.items()
}
