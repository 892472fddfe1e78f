"""A GGUF reader that distrusts the file.

Every count, length and offset is a Python integer (no wrap-around) and is checked against what is left
of the file before anything is allocated or sliced.  Tensor data stays in the file's mapping.
Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.kernels.blocks import FORMAT_BY_ID, OTHER_TYPES

MAX_KEY_NBYTES = 1 << 16
MAX_COUNT = 1 << 30  # strings (bytes) and arrays (elements)
MAX_NAME_NBYTES = 63
MAX_DIMS = 4
_INT64_MAX = (1 << 63) - 1

_SCALARS: dict[int, tuple[str, str]] = {  # value type: struct code, NumPy dtype
    0: ("B", "u1"),
    1: ("b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("B", "u1"),  # bool
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file; `shape[0]` is the number of columns, `offset` counts from file start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    n_weights: int
    nbytes: int
    offset: int
    part: int = 0


class Place(NamedTuple):
    """An offset of an open file, or without one an address; `owner` keeps either valid."""

    at: int
    owner: object
    file: int = -1


class TensorBytes:
    """The bytes of a tensor, read when asked; stays usable when its file object is closed."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self._path, self._info = path, info
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        os.close(self._handle)

    def place(self) -> Place:
        """Where the bytes are, for whoever reads them natively."""
        return Place(self._info.offset, self, self._handle)

    def shrank(self) -> ModelFileError:
        """The error of a file that ends before its tensors do."""
        return ModelFileError(f"{self._path.name} shrank; {self._info.name} is gone")

    def read_into(self, out: np.ndarray, at: int) -> None:
        """Fill `out` u8 from byte `at` of the tensor on."""
        view = memoryview(out)
        done = 0
        while done < len(view):
            n = os.preadv(self._handle, [view[done:]], self._info.offset + at + done)
            if n == 0:
                raise self.shrank()
            done += n


class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.end = len(data)

    def fail(self, what: str, at: int | None = None) -> ModelFileError:
        return ModelFileError(f"{self.path.name}: {what} (byte {self.at if at is None else at})")

    def need(self, nbytes: int, what: str) -> int:
        """Take `nbytes` and return where they begin."""
        start = self.at
        if nbytes > self.end - start:
            left = self.end - start
            raise self.fail(
                f"{what} needs {nbytes} bytes but {left} are left; the file is cut off or damaged"
            )
        self.at = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.need(8, what))[0])

    def string(self, what: str, limit: int = MAX_COUNT) -> str:
        at = self.at
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} claims {length} bytes; at most {limit} are allowed", at)
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8", at) from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has value type {kind}; GGUF defines 0 to 12", self.at - 4)
        code = _SCALARS[kind][0]
        at = self.need(struct.calcsize(code), what)
        value = struct.unpack_from(code, self.data, at)[0]
        if kind == _BOOL:
            if value > 1:
                raise self.fail(f"{what} is a bool with value {value}; it must be 0 or 1", at)
            return bool(value)
        return value

    def array(self, what: str) -> Any:
        at = self.at
        kind = self.u32(what)
        count = self.u64(what)
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which is not supported", at)
        if kind != _STRING and kind not in _SCALARS:
            raise self.fail(f"{what} has element type {kind}; GGUF defines 0 to 12", at)
        if count > MAX_COUNT:
            raise self.fail(f"{what} claims {count} elements; at most {MAX_COUNT} are allowed", at)
        if kind != _STRING:
            dtype = np.dtype(_SCALARS[kind][1])
            start = self.need(count * dtype.itemsize, what)
            values = np.frombuffer(self.data, dtype, count, start).copy()
            return values.astype(bool) if kind == _BOOL else values
        if count * 8 > self.end - self.at:
            raise self.fail(f"{what} claims {count} strings, more than the file could hold", at)
        return self.strings(count, what)

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings, fast: tokens of a vocabulary. Invalid UTF-8 is replaced, never refused."""
        data, at, end = self.data, self.at, self.end
        unpack = _U64.unpack_from
        out: list[str] = []
        append = out.append
        for i in range(count):
            if at + 8 > end:
                raise self.fail(f"{what}[{i}] is beyond the end of the file", at)
            (length,) = unpack(data, at)
            at += 8
            if length > end - at:
                raise self.fail(f"{what}[{i}] claims {length} bytes but {end - at} are left", at)
            append(data[at : at + length].decode(errors="replace"))
            at += length
        self.at = at
        return out


class GGUFFile:
    """An open file (or all parts of a split one): metadata, tensors and their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 0
        self.alignment = 32
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: list[tuple[Path, int, mmap.mmap | bytes]] = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def data(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, u8 (nbytes,), in the mapping of the file."""
        info = self.tensors[name]
        path, size, mapping = self._maps[info.part]
        try:
            now = os.stat(path).st_size
        except OSError:
            now = size  # unlinked: the mapping still holds it
        if now < info.offset + info.nbytes:
            raise ModelFileError(
                f"{path.name} shrank from {size} to {now} bytes after it was opened; "
                f"tensor {name} is gone. Fetch the file again"
            )
        return np.frombuffer(mapping, np.uint8, info.nbytes, info.offset)

    def bytes_of(self, name: str) -> TensorBytes:
        """Return the reader of a tensor's bytes."""
        info = self.tensors[name]
        return TensorBytes(self._maps[info.part][0], info)

    def release(self, name: str) -> None:
        """Drop the resident pages of a tensor, where the system can."""
        info = self.tensors[name]
        mapping = self._maps[info.part][2]
        if hasattr(mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0:
                mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file. Arrays from `data` keep their part of it alive."""
        for _, _, mapping in self._maps:
            if isinstance(mapping, mmap.mmap):
                with contextlib.suppress(BufferError):  # an array still looks into it
                    mapping.close()
        self._maps = []


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; a path to the first part of a split file opens all parts.

    Raises: ModelFileError with the byte or name that is wrong; UnsupportedModelError for a sound file
    of a kind that is not read here.
    """
    path = Path(path)
    gguf = GGUFFile(path)
    try:
        _read_part(gguf, path, 0)
        n_parts = gguf.metadata.get("split.count", 0)
        if isinstance(n_parts, int) and n_parts > 1:
            for other in _other_parts(gguf, path, n_parts):
                _read_part(gguf, other, len(gguf._maps))
            expected = gguf.metadata.get("split.tensors.count")
            if isinstance(expected, int) and expected != len(gguf.tensors):
                raise ModelFileError(
                    f"{path.name}: the parts hold {len(gguf.tensors)} tensors, "
                    f"split.tensors.count says {expected}; the parts do not belong together"
                )
    except BaseException:
        gguf.close()
        raise
    return gguf


def _other_parts(gguf: GGUFFile, path: Path, n_parts: int) -> list[Path]:
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != n_parts:
        raise ModelFileError(
            f"{path.name} is one of {n_parts} parts; its name must end in "
            f"-00001-of-{n_parts:05d}.gguf so that the others can be found"
        )
    if int(match[2]) != 1:
        raise ModelFileError(
            f"{path.name} is part {int(match[2])} of {n_parts}; open the first part"
        )
    parts = [
        path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(2, n_parts + 1)
    ]
    for part in parts:
        if not part.exists():
            raise ModelFileError(f"{part.name} is missing; {path.name} has {n_parts} parts")
    return parts


def _map(path: Path) -> mmap.mmap:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelFileError(f"{path} cannot be opened: {reason}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a regular file; a GGUF file is needed")
        if status.st_size < 24:
            raise ModelFileError(
                f"{path.name} has {status.st_size} bytes; a GGUF file has at least 24 (byte 0)"
            )
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)


def _read_part(gguf: GGUFFile, path: Path, part: int) -> None:
    mapping = _map(path)
    gguf._maps.append((path, len(mapping), mapping))
    c = _Cursor(path, mapping)
    magic = mapping[:4]
    if magic != b"GGUF":
        raise ModelFileError(
            f"{path.name} begins with {magic!r}; a GGUF file begins with b'GGUF' (byte 0)"
        )
    c.at = 4
    version = c.u32("the version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            raise UnsupportedModelError(
                f"{path.name} is a big-endian GGUF file; edgellama reads little-endian ones (byte 4)"
            )
        raise UnsupportedModelError(
            f"{path.name} has GGUF version {version}; versions 2 and 3 are read (byte 4)"
        )
    n_tensors = c.u64("the tensor count")
    n_keys = c.u64("the key count")
    if n_tensors * 24 > c.end or n_tensors > _INT64_MAX:
        raise c.fail(f"{n_tensors} tensors are claimed, more than the file could hold", 8)
    if n_keys * 13 > c.end:
        raise c.fail(f"{n_keys} metadata keys are claimed, more than the file could hold", 16)
    metadata = _read_metadata(c, n_keys)
    alignment = metadata.get("general.alignment", 32)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 0 < alignment <= 1 << 30
        or alignment & (alignment - 1)
    ):
        raise c.fail(f"general.alignment is {alignment!r}; it must be a power of two")
    if part == 0:
        gguf.version, gguf.alignment, gguf.metadata = version, alignment, metadata
    infos = [_read_tensor(c, i) for i in range(n_tensors)]
    base = -(-c.at // alignment) * alignment
    _place(gguf, c, infos, base, alignment, part)


def _read_metadata(c: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        at = c.at
        key = c.string(f"metadata key {i}", MAX_KEY_NBYTES)
        if not key:
            raise c.fail(f"metadata key {i} is empty", at)
        if key in metadata:
            raise c.fail(f"metadata key {key!r} appears twice", at)
        kind = c.u32(key)
        if key == "general.alignment" and kind != 4:
            raise c.fail(f"general.alignment has value type {kind}; it must be a u32", at)
        metadata[key] = c.value(kind, key)
    return metadata


def _read_tensor(c: _Cursor, i: int) -> TensorInfo:
    at = c.at
    name = c.string(f"the name of tensor {i}", MAX_NAME_NBYTES)
    what = f"tensor {name!r}"
    n_dims = c.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise c.fail(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMS} are allowed", at)
    shape = tuple(c.u64(what) for _ in range(n_dims))
    type_id = c.u32(what)
    offset = c.u64(what)
    if max(shape) > _INT64_MAX or prod(shape) > _INT64_MAX:
        raise c.fail(f"{what} has shape {list(shape)}, which no file could hold", at)
    format_ = FORMAT_BY_ID.get(type_id) or OTHER_TYPES.get(type_id)
    if format_ is None:
        private = 97 <= type_id <= 99 or 133 <= type_id <= 158 or 202 <= type_id <= 399
        known = (
            "a private type of ik_llama.cpp" if private else "not a type of GGUF, or a removed one"
        )
        raise UnsupportedModelError(
            f"{c.path.name}: {what} has type {type_id}, {known} (byte {at}); convert the model anew"
        )
    if shape[0] % format_.n_weights:
        raise c.fail(
            f"{what} has rows of {shape[0]} values; {format_.name} needs a multiple of "
            f"{format_.n_weights}", at,
        )  # fmt: skip
    n_weights = prod(shape)
    nbytes = n_weights // format_.n_weights * format_.nbytes
    return TensorInfo(name, shape, type_id, format_.name, n_weights, nbytes, offset)


def _place(
    gguf: GGUFFile, c: _Cursor, infos: list[TensorInfo], base: int, alignment: int, part: int
) -> None:
    """Check offsets against the file and each other, and make them count from its start."""
    expected = 0
    for info in sorted(infos, key=lambda info: info.offset):
        what = f"tensor {info.name!r}"
        if info.name in gguf.tensors:
            raise c.fail(f"{what} appears twice")
        if info.offset % alignment:
            raise c.fail(f"{what} has offset {info.offset}, no multiple of alignment {alignment}")
        if info.offset < expected:
            raise c.fail(f"{what} at offset {info.offset} overlaps the tensor before it")
        if info.offset > expected:
            raise c.fail(
                f"{what} has offset {info.offset}; tensors lie one after another and this one "
                f"belongs at {expected}"
            )
        if base + info.offset + info.nbytes > c.end:
            raise c.fail(
                f"{what} ends at byte {base + info.offset + info.nbytes} but the file has {c.end}; "
                "it is cut off: fetch it again"
            )
        expected = -(-(info.offset + info.nbytes) // alignment) * alignment
    for info in infos:
        gguf.tensors[info.name] = TensorInfo(
            info.name, info.shape, info.type_id, info.type_name,
            info.n_weights, info.nbytes, base + info.offset, part,
        )  # fmt: skip
    if len({info.name for info in infos}) != len(infos):
        raise c.fail("two tensors have the same name")
