"""A GGUF reader that distrusts the file.

Every count, length and offset is a Python integer (no wrap-around) and is checked against what is left
of the file before anything is allocated or sliced (`cursor.py`); every float of a tensor is checked on
its way to the kernels (`finite.py`).
Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import os
import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.kernels.blocks import FORMAT_BY_ID, OTHER_TYPES, BlockFormat

from .cursor import Cursor, Part, RawValue
from .finite import is_finite

MAX_COUNT = 1 << 16  # tensors, and metadata keys
MAX_KEY_NBYTES = 1 << 16
MAX_NAME_NBYTES = 63
MAX_DIMS = 4
_INT64_MAX = (1 << 63) - 1
_CHUNK_NBYTES = 1 << 20
_FOREIGN_TYPES: tuple[tuple[frozenset[int], str], ...] = (
    (frozenset({4, 5, *range(31, 34), *range(36, 39)}), "a type that was removed from GGUF"),
    (
        frozenset({*range(97, 100), *range(133, 159), *range(202, 400)}),
        "a private type of ik_llama.cpp",
    ),
)


class TensorInfo(NamedTuple):
    """A tensor of the file; `shape[0]` is the number of columns, `offset` counts from file start."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    n_weights: int
    nbytes: int
    offset: int
    part: int = 0

    @property
    def type_name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def type_id(self) -> int:
        """The format's number in GGUF."""
        return self.format.type_id


class Place(NamedTuple):
    """An offset of an open file, or without one an address; `owner` keeps either valid."""

    at: int
    owner: object
    file: int = -1


class TensorBytes:
    """The bytes of a tensor, read when asked for."""

    def __init__(self, part: Part, info: TensorInfo) -> None:
        self._part, self._info = part, info

    def place(self) -> Place:
        """Where the bytes are, for whoever reads and checks them natively."""
        return Place(self._info.offset, self._part, self._part.fileno())

    def read_into(self, out: np.ndarray, at: int) -> None:
        """Fill `out` u8 (whole blocks) from byte `at` of the tensor on.

        Raises: ModelFileError, also for a NaN or an infinity: kernels may turn it into a number.
        """
        self._part.read(out, self._info.offset + at, f"tensor {self._info.name!r}")
        if not is_finite(self._info.format, out):
            raise self.not_finite(at)

    def check(self) -> None:
        """Read all to no other end than the errors; about 1 MB at a time stays in the cache."""
        step = _CHUNK_NBYTES // self._info.format.nbytes * self._info.format.nbytes
        for at in range(0, self._info.nbytes, step):
            self.read_into(np.empty(min(step, self._info.nbytes - at), np.uint8), at)

    def not_finite(self, at: int = 0) -> ModelFileError:
        """The error for a NaN or an infinity after byte `at`."""
        return ModelFileError(
            f"{self._part.path.name}: tensor {self._info.name!r} holds NaN or infinite values; fetch "
            f"or convert the file again (after byte {self._info.offset + at})"
        )


class GGUFFile:
    """An open file (or all parts of a split one): metadata, tensors and their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 0
        self.alignment = 32
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: list[Part] = []
        self._spans: dict[str, tuple[int, int]] = {}  # of the values in the first part

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def paths(self) -> list[Path]:
        """The files that are open: one, or the parts of a split model."""
        return [part.path for part in self._parts]

    def bytes_of(self, name: str) -> TensorBytes:
        """Return the reader of a tensor's bytes, which keeps the file open."""
        info = self.tensors[name]
        return TensorBytes(self._parts[info.part], info)

    def raw_value(self, key: str) -> RawValue:
        """Return a metadata value as it stands in the file, to be written into another."""
        start, end = self._spans[key]
        out = np.empty(end - start, np.uint8)
        self._parts[0].read(out, start, f"metadata key {shown(key)}")
        return RawValue(out.tobytes())

    def data(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, u8 (nbytes,), as a copy.

        Raises: ModelFileError as `TensorBytes.read_into` does.
        """
        out = np.empty(self.tensors[name].nbytes, np.uint8)
        self.bytes_of(name).read_into(out, 0)
        return out

    def close(self) -> None:
        """Let go of the file; what `data` and `bytes_of` returned stays good."""
        self._parts = []


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; a path to the first part of a split file opens all parts.

    Raises: ModelFileError with the byte or name that is wrong; UnsupportedModelError for a sound file
    of a kind that is not read here.
    """
    path = Path(path)
    gguf = GGUFFile(path)
    try:
        _read_part(gguf, path)
        n_parts = gguf.metadata.get("split.count", 0)
        if isinstance(n_parts, int) and n_parts > 1:
            for other in _other_parts(gguf, path, n_parts):
                _read_part(gguf, other)
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


def _read_part(gguf: GGUFFile, path: Path) -> None:
    part = Part(path)
    gguf._parts.append(part)
    if part.size < 24:
        raise ModelFileError(
            f"{path.name} has {part.size} bytes; a GGUF file has at least 24 (byte 0)"
        )
    c = Cursor(part)
    c.need(4, "the magic")
    magic = c.data[:4]
    if magic != b"GGUF":
        raise ModelFileError(
            f"{path.name} begins with {magic!r}; a GGUF file begins with b'GGUF' (byte 0)"
        )
    version = c.u32("the version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            raise UnsupportedModelError(
                f"{path.name} is a big-endian GGUF file; edgellama reads little-endian ones (byte 4)"
            )
        raise UnsupportedModelError(
            f"{path.name} has GGUF version {version}; versions 2 and 3 are read (byte 4)"
        )
    counts = []
    for what in ("tensors", "metadata keys"):
        at = c.at
        counts.append(c.u64(f"the number of {what}"))
        if counts[-1] > MAX_COUNT:
            raise c.fail(f"{counts[-1]} {what} are claimed; at most {MAX_COUNT} are allowed", at)
    metadata, spans = _read_metadata(c, counts[1])
    alignment = metadata.get("general.alignment", 32)
    if not 0 < alignment <= 1 << 30 or alignment & (alignment - 1):
        raise c.fail(f"general.alignment is {alignment}; it must be a power of two up to 2^30")
    if len(gguf._parts) == 1:
        gguf.version, gguf.alignment, gguf.metadata = version, alignment, metadata
        gguf._spans = spans
    _read_tensors(gguf, c, counts[0], alignment)


def _read_metadata(c: Cursor, n_keys: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Return the values by key, and where type and value of each begin and end."""
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(n_keys):
        at = c.at
        key = c.string(f"metadata key {i}", MAX_KEY_NBYTES)
        if not key:
            raise c.fail(f"metadata key {i} is empty", at)
        if key in metadata:
            raise c.fail(f"metadata key {shown(key)} appears twice", at)
        what = shown(key)
        start = c.at
        kind = c.u32(what)
        if key == "general.alignment" and kind != 4:
            raise c.fail(f"general.alignment has value type {kind}; it must be a u32 (4)", at)
        metadata[key] = c.value(kind, what)
        spans[key] = start, c.at
    return metadata, spans


def _read_tensors(gguf: GGUFFile, c: Cursor, n_tensors: int, alignment: int) -> None:
    """Read the table of tensors; make offsets count from the file's start.

    Every tensor must begin where the one before it ends: then none overlaps, and no sum wraps.
    """
    infos: list[TensorInfo] = []
    names = set(gguf.tensors)
    expected = 0
    for i in range(n_tensors):
        at = c.at
        info = _read_tensor(c, i, len(gguf._parts) - 1)
        if info.name in names:
            raise c.fail(f"tensor {info.name!r} appears twice", at)
        if info.offset != expected:
            raise c.fail(
                f"tensor {info.name!r} has offset {info.offset}; tensors lie one after another, "
                f"aligned to {alignment} bytes, and this one belongs at {expected}", at,
            )  # fmt: skip
        expected = -(-(info.offset + info.nbytes) // alignment) * alignment
        names.add(info.name)
        infos.append(info)
    base = -(-c.at // alignment) * alignment
    for info in infos:
        end = base + info.offset + info.nbytes
        if end > c.part.size:
            raise ModelFileError(
                f"{c.part.path.name}: tensor {info.name!r} ends at byte {end} but the file has "
                f"{c.part.size}; it is cut off: fetch it again"
            )
        gguf.tensors[info.name] = info._replace(offset=base + info.offset)


def _read_tensor(c: Cursor, i: int, part: int) -> TensorInfo:
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
        kind = next((kind for ids, kind in _FOREIGN_TYPES if type_id in ids), "no type of GGUF")
        raise UnsupportedModelError(
            f"{c.part.path.name}: {what} has type {type_id}, {kind}; convert the model anew (byte {at})"
        )
    if shape[0] % format_.n_weights:
        raise c.fail(
            f"{what} has rows of {shape[0]} values; {format_.name} needs a multiple of "
            f"{format_.n_weights}", at,
        )  # fmt: skip
    n_weights = prod(shape)
    nbytes = n_weights // format_.n_weights * format_.nbytes
    return TensorInfo(name, shape, format_, n_weights, nbytes, offset, part)
