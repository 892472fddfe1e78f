"""Checkpoints as their writers make them, byte by byte: safetensors, and `torch.save` without PyTorch."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"f4": "F32", "f2": "F16", "f8": "F64", "i4": "I32", "i8": "I64", "i1": "I8", "u1": "U8"}
_STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "i4": "IntStorage", "i8": "LongStorage"}


def dtype_name(array: np.ndarray) -> str:
    """The name that safetensors has for a NumPy type."""
    return NAMES[array.dtype.str[1:]]


def safetensors(
    tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str] | None = None, **metadata: str
) -> bytes:
    """Return a file of tensors; `dtypes` names the types that NumPy does not have."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": (dtypes or {}).get(name) or dtype_name(array),
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a header and data behind the length of the header, or what is claimed to be."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# --- pickles --------------------------------------------------------------------------------------
class Global:
    """A name of a module, written as the opcode GLOBAL."""

    def __init__(self, module: str, name: str) -> None:
        self.code = f"c{module}\n{name}\n".encode()


class Call:
    """The result of a call."""

    def __init__(self, function: Global, *arguments: Any) -> None:
        self.code = function.code + pickled(arguments) + b"R"


class Stored:
    """A storage, by its persistent id."""

    def __init__(self, kind: str, key: str, n_elements: int, *view: None) -> None:
        ids = ("storage", Global("torch", kind), key, "cpu", n_elements, *view)
        self.code = pickled(ids) + b"Q"


def pickled(value: Any) -> bytes:
    """Return the opcodes of protocol 2 that make a value, without a memo."""
    if isinstance(value, Global | Call | Stored):
        return value.code
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(pickled(k) + pickled(v) for k, v in value.items()) + b"u"


def a_pickle(value: Any) -> bytes:
    """Return a whole pickle."""
    return b"\x80\x02" + pickled(value) + b"."


def a_tensor(
    key: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    offset: int = 0,
    n_elements: int,
    kind: str = "FloatStorage",
) -> Call:
    """Return the call that rebuilds a tensor."""
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(rebuild, Stored(kind, key, n_elements), offset, shape, strides, False, hooks)


def state_dict(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what a pickle says of tensors, and the bytes of their storages."""
    content, storages = {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        strides = tuple(n // array.itemsize for n in array.strides)
        kind = _STORAGES[array.dtype.str[1:]]
        content[name] = a_tensor(str(i), array.shape, strides, n_elements=array.size, kind=kind)
        storages[str(i)] = np.ravel(array, order="K").tobytes()
    return content, storages


def write_zip(
    path: Path,
    data_pkl: bytes,
    storages: Mapping[str, bytes],
    root: str = "archive/",
    **more: bytes,
) -> Path:
    """Write the zip of torch.save; `more` are further members."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(root + "data.pkl", data_pkl)
        for key, raw in storages.items():
            archive.writestr(f"{root}data/{key}", raw)
        for name, raw in more.items():
            archive.writestr(root + name, raw)
    return path


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write tensors as torch.save does; strides are kept."""
    content, storages = state_dict(tensors)
    return write_zip(path, a_pickle(content), storages, version=b"3\n", byteorder=b"little")
