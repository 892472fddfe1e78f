"""Importance matrices: how much each column of a matrix matters, read and written as llama.cpp does.

An entry is the mean square of what a tensor's input had in each column, over the tokens of a text; the
quantizers weight a column's error by it.  Read are GGUF files (`imatrix.*` keys; tensors NAME.in_sum2 and
NAME.counts) and the older `.dat` form.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, shown
from edgellama.gguf import open_gguf
from edgellama.gguf.writer import GGUFWriter, NewTensor
from edgellama.kernels.blocks import FORMATS

_SUM, _COUNT = ".in_sum2", ".counts"
_MAX_TEXT, _MAX_VALUES = 4096, 1 << 24


class Sums(NamedTuple):
    """Sums of squares of a tensor's input, f32 (n_cols,), and over how many rows."""

    squares: np.ndarray
    n_rows: int


def write_importance(
    path: Path, sums: Mapping[str, Sums], *, dataset: str, n_chunks: int, chunk_size: int,
    force: bool = False,
) -> None:  # fmt: skip
    """Write sums by tensor name as a GGUF importance matrix."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [dataset],
        "imatrix.chunk_count": n_chunks,
        "imatrix.chunk_size": chunk_size,
    }
    tensors, data = [], []
    for name, entry in sorted(sums.items()):
        for suffix, values in ((_SUM, entry.squares), (_COUNT, [entry.n_rows])):
            values = np.asarray(values, np.float32)
            tensors.append(NewTensor(name + suffix, (len(values), 1), FORMATS["f32"]))
            data.append(values)
    with GGUFWriter(path, metadata, tensors, force=force) as writer:
        for values in data:
            writer.append(values)


def read_importance(path: Path) -> dict[str, np.ndarray]:
    """Return the mean square per column, f32 (n_cols,), by tensor name.

    Raises: ModelFileError for a damaged file, and for sums that are negative or not finite.
    """
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    sums = _read_gguf(path) if is_gguf else _read_dat(path)
    if not sums:
        raise ModelFileError(f"{path} holds no importance matrix: no tensor NAME{_SUM} is in it")
    out = {}
    for name, entry in sums.items():
        if not (np.isfinite(entry.squares).all() and (entry.squares >= 0).all()):
            raise ModelFileError(f"{path}: the sums of {name} are negative or not finite")
        out[name] = (entry.squares / np.float32(max(entry.n_rows, 1))).astype(np.float32)
    return out


def _read_gguf(path: Path) -> dict[str, Sums]:
    sums = {}
    with open_gguf(path) as gguf:
        for name, info in gguf.tensors.items():
            if not name.endswith(_SUM):
                continue
            base = name.removesuffix(_SUM)
            counted = gguf.tensors.get(base + _COUNT)
            if counted is None or {info.type_name, counted.type_name} != {"f32"}:
                raise ModelFileError(f"{path}: {name} or its {_COUNT[1:]} are not f32 or missing")
            if info.n_weights != info.shape[0] or counted.n_weights != 1:
                raise ModelFileError(f"{path}: {name} is of several experts, which are not read")
            counts = gguf.data(base + _COUNT).view(np.float32)
            sums[base] = Sums(gguf.data(name).view(np.float32), int(counts[0]))
    return sums


def _read_dat(path: Path) -> dict[str, Sums]:
    """The older form: per entry a name, a number of calls, and sums already divided by rows."""
    sums: dict[str, Sums] = {}
    with open(path, "rb") as file:

        def integer(most: int) -> int:
            raw = file.read(4)
            value = struct.unpack("<i", raw)[0] if len(raw) == 4 else -1
            if not 0 <= value <= most:
                raise ModelFileError(
                    f"{path} is no importance matrix, or damaged, at byte {file.tell()}"
                )
            return int(value)

        for _ in range(integer(1 << 16)):
            name = file.read(integer(_MAX_TEXT)).decode("utf-8", "replace")
            n_calls = integer((1 << 31) - 1)
            n = integer(_MAX_VALUES)
            raw = file.read(4 * n)
            if len(raw) < 4 * n:
                raise ModelFileError(f"{path} is cut off in {shown(name)}; make it again")
            sums[name] = Sums(np.frombuffer(raw, "<f4").astype(np.float32), max(n_calls, 1))
    return sums
