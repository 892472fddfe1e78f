"""A safetensors reader that distrusts the file.

    8 bytes         length of the header, u64
    the header      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the data        offsets count from here; every byte belongs to one tensor

Source: the format's description in the repository of huggingface/safetensors.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.gguf.cursor import Part

from .checkpoint import SourceTensor
from .folder import MAX_JSON_NBYTES, parse_json
from .stored import ELEMENTS, StoredTensor

MAX_DIMS = 32
_MAX_ELEMENTS = (1 << 63) - 1
_UNREAD = ("F4", "F6_E2M3", "F6_E3M2", "C64")


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """Return the tensors of one file.  Raises: ModelFileError."""
    part = Part(path)
    length = np.zeros(8, np.uint8)
    if part.size < 8:
        raise ModelFileError(
            f"{path.name} has {part.size} bytes; a safetensors file has at least 10"
        )
    part.read(length, 0, "the length of the header")
    n = int.from_bytes(length.tobytes(), "little")
    if n > MAX_JSON_NBYTES or n > part.size - 8:
        raise ModelFileError(
            f"{path.name} claims a header of {n} bytes; {part.size - 8} are there and at most "
            f"{MAX_JSON_NBYTES} are allowed: the file is cut off or damaged"
        )
    header = np.empty(n, np.uint8)
    part.read(header, 8, "the header")
    entries = parse_json(header.tobytes(), f"the header of {path.name}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError(f"{path.name}: __metadata__ must map strings to strings")

    tensors: dict[str, SourceTensor] = {}
    end = 0
    places = [(*_offsets(path, name, entry), name) for name, entry in entries.items()]
    for begin, stop, name in sorted(places):
        if begin != end:
            raise ModelFileError(
                f"{path.name}: tensor {shown(name)} begins at byte {begin} of the data, where {end} "
                "was expected; tensors lie one after another"
            )
        end = stop
        tensors[name] = _tensor(part, name, entries[name], 8 + n)
    if end != part.size - 8 - n:
        raise ModelFileError(
            f"{path.name} has {part.size - 8 - n} bytes of data, its tensors {end}; "
            "it is cut off or damaged: fetch it again"
        )
    return tensors


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(
            f"{path.name}: tensor {shown(name)} needs dtype, shape and data_offsets, nothing else"
        )
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(f"{path.name}: tensor {shown(name)} has no sound data_offsets")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _tensor(part: Part, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    what = f"{part.path.name}: tensor {shown(name)}"
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _UNREAD:
        raise UnsupportedModelError(f"{what} has type {dtype}, which edgellama does not read")
    if not isinstance(dtype, str) or dtype not in ELEMENTS:
        raise ModelFileError(
            f"{what} has type {shown(dtype)}; safetensors has {', '.join(ELEMENTS)}"
        )
    # Without its zeros, so that a dimension beside a zero is bounded too.
    if (
        not _are_sizes(shape)
        or len(shape) > MAX_DIMS
        or prod(n for n in shape if n) > _MAX_ELEMENTS
    ):
        raise ModelFileError(f"{what} has a shape that no file could hold")
    nbytes = prod(shape) * ELEMENTS[dtype].itemsize
    if nbytes != end - begin:
        raise ModelFileError(
            f"{what} has {end - begin} bytes; {dtype} of shape {shape} needs {nbytes}"
        )
    return StoredTensor(part, name, dtype, tuple(shape), base + begin)
