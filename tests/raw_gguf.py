"""GGUF byte by byte, so that any part of it can be wrong: what the hostile files are made of.

A pair is (key, value type, payload); a tensor is (name, shape, type id, offset).  Counts, lengths and
offsets say what they are told to say.  `dismantle` takes a sound file apart into the same pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.gguf import open_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_OF = {"u1": U8, "i1": I8, "u2": U16, "i2": I16, "u4": U32, "i4": I32, "f4": F32, "b1": BOOL,
           "u8": U64, "i8": I64, "f8": F64}  # fmt: skip

Pair = tuple[bytes, int, bytes]
Tensor = tuple[bytes, Sequence[int], int, int]


def u32(n: int) -> bytes:
    return struct.pack("<I", n % (1 << 32))


def u64(n: int) -> bytes:
    return struct.pack("<Q", n % (1 << 64))


def f32(x: float) -> bytes:
    return struct.pack("<f", x)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def array(kind: int, elements: bytes, count: int) -> bytes:
    return u32(kind) + u64(count) + elements


def strings(values: Sequence[str]) -> bytes:
    return array(STRING, b"".join(map(text, values)), len(values))


def header(n_tensors: int = 0, n_pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + u32(version) + u64(n_tensors) + u64(n_pairs)


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def tensor(name: str | bytes, shape: Sequence[int], type_id: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(map(u64, shape))
    return text(name) + u32(len(shape)) + dims + u32(type_id) + u64(offset)


def build(
    pairs: Sequence[Pair] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    alignment: int = 32,
) -> bytes:
    """A file whose counts are those of its pieces."""
    out = header(len(tensors), len(pairs))
    out += b"".join(pair(*p) for p in pairs) + b"".join(tensor(*t) for t in tensors)
    return out + bytes(-len(out) % alignment) + data


def value(given: Any) -> tuple[int, bytes]:
    """Value type and payload of a Python value."""
    match given:
        case bool():
            return BOOL, bytes([given])
        case int() if -(1 << 31) <= given < 0:
            return I32, struct.pack("<i", given)
        case int():
            return (U32, u32(given)) if given < 1 << 32 else (U64, u64(given))
        case float():
            return F32, f32(given)
        case str():
            return STRING, text(given)
        case list():
            return ARRAY, strings(given)
    assert isinstance(given, np.ndarray)
    return ARRAY, array(TYPE_OF[given.dtype.str[1:]], given.tobytes(), len(given))


def dismantle(path: Path) -> tuple[list[Pair], list[Tensor], bytes]:
    """Pairs, tensors with offsets as in the file, and the data of a sound file."""
    with open_gguf(path) as gguf:
        pairs = [(key.encode(), *value(given)) for key, given in gguf.metadata.items()]
        base = min(info.offset for info in gguf.tensors.values())
        tensors = [
            (info.name.encode(), info.shape, info.type_id, info.offset - base)
            for info in gguf.tensors.values()
        ]
    return pairs, tensors, path.read_bytes()[base:]
