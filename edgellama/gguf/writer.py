"""Writing GGUF files: metadata, the table of tensors, then their bytes as they come.

Own code, because a vocabulary of 262144 tokens is copied as it stands, to the byte, and because tensors
come in pieces that no memory holds together.  The file has a temporary name until it is whole.
Source: the GGUF specification, version 3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import UsageError, shown
from edgellama.kernels.blocks import BlockFormat, padded

from .cursor import ARRAY, BOOL, SCALARS, STRING, RawValue
from .new_file import NewFile, check_absent

ALIGNMENT = 32
_U32, _I32, _F32, _U64, _I64 = 4, 5, 6, 10, 11
_KIND_OF = {np.dtype(dtype): kind for kind, (_, dtype) in SCALARS.items() if kind != BOOL}
_KIND_OF[np.dtype(bool)] = BOOL


class NewTensor(NamedTuple):
    """A tensor to be written; `shape[0]` is the number of columns, as in the file."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return prod(self.shape) // self.format.n_weights * self.format.nbytes


class GGUFWriter:
    """Writes one file; `append` the bytes of the tensors in their order, inside a `with`.

    Leaving the block without an error gives the file its name; otherwise nothing is left.
    Raises: UsageError and OSError as `NewFile`; UsageError for metadata that GGUF cannot hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        tensors: Sequence[NewTensor],
        *,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        check_absent(self.path, force)  # before anything slow
        self._force = force
        self._tensors = tensors
        self._header = _header(metadata, tensors)
        self.nbytes = len(self._header) + sum(padded(t.nbytes, ALIGNMENT) for t in tensors)
        self._new: NewFile | None = None
        self._index = 0  # of the tensor that is being written
        self._left = 0  # bytes of it that are still to come

    def __enter__(self) -> GGUFWriter:
        self._new = NewFile(self.path, self.nbytes, force=self._force)
        try:
            self._new.file.write(self._header)
        except BaseException:
            self._new.discard()
            raise
        self._begin(0)
        return self

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes of the current tensor, u8, any number that it still needs."""
        assert self._new is not None, "append outside of `with`"
        assert data.nbytes <= self._left, f"{data.nbytes} bytes, {self._left} are left"
        self._new.file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._left -= data.nbytes
        if self._left == 0:
            self._new.file.write(bytes(-self._tensors[self._index].nbytes % ALIGNMENT))
            self._begin(self._index + 1)

    def sync(self) -> None:
        """Wait until what was written so far is on the disk."""
        assert self._new is not None, "sync outside of `with`"
        self._new.sync()

    def _begin(self, index: int) -> None:
        """Go on to a tensor; one without weights needs nothing."""
        while index < len(self._tensors) and self._tensors[index].nbytes == 0:
            index += 1
        self._index = index
        self._left = self._tensors[index].nbytes if index < len(self._tensors) else 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._new is not None
        try:
            if kind is None:
                assert self._index == len(self._tensors), f"tensor {self._index} is not whole"
                self._new.finish()
        finally:
            self._new.discard()


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """Magic, version, counts, metadata and table of tensors, padded to where the data begin."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            out += _text(key) + encode_value(value)
        except UsageError as error:
            raise UsageError(f"{shown(key)} cannot be written: {error}") from None
    offset = 0
    for tensor in tensors:
        out += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        out += struct.pack("<IQ", tensor.format.type_id, offset)
        offset += padded(tensor.nbytes, ALIGNMENT)
    return bytes(out) + bytes(-len(out) % ALIGNMENT)


def _text(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{shown(text)} is no text that UTF-8 can hold") from None
    return struct.pack("<Q", len(raw)) + raw


def encode_value(value: Any) -> bytes:
    """Return type and bytes of a metadata value: u32 for integers that fit, f32 for floats.

    Raises: UsageError for a number or a text that no type holds.
    """
    match value:
        case RawValue():
            return value.data
        case bool():
            return struct.pack("<IB", BOOL, value)
        case int():
            for kind, code, least, most in (
                (_U32, "<I", 0, 1 << 32), (_I32, "<i", -(1 << 31), 0),
                (_U64, "<Q", 0, 1 << 64), (_I64, "<q", -(1 << 63), 0),
            ):  # fmt: skip
                if least <= value < most:
                    return struct.pack("<I", kind) + struct.pack(code, value)
            raise UsageError("an integer needs at most 64 bits")
        case float():
            try:
                return struct.pack("<If", _F32, value)
            except OverflowError:
                raise UsageError(f"{value:g} is beyond what f32 holds") from None
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case np.ndarray():
            kind = _KIND_OF[value.dtype]
            return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
        case [str(), *_]:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        case [bool(), *_]:
            return encode_value(np.array(value, bool))
        case [*_] if all(isinstance(x, int) for x in value):
            return encode_value(np.array(value, np.int32))
        case [*_]:
            return encode_value(np.array(value, np.float32))
    raise TypeError(f"no value type of GGUF holds a {type(value).__name__}")
