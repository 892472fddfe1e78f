"""Weights in memory: every matrix is read in pieces and repacked once, into one arena.

Pieces are read, not mapped: the file never counts as resident beside the packed form, and one that is cut
off meanwhile is an error rather than a signal.  An embedding that is not also the output projection
stays in the file; the rows of a step's tokens are read and packed when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from edgellama.errors import OutOfMemoryError
from edgellama.gguf import GGUFFile, Place, TensorBytes
from edgellama.kernels import layout
from edgellama.kernels.blocks import BlockFormat, padded
from edgellama.kernels.compiler import Pack
from edgellama.kernels.team import Team, call_here, fill_record, pread_address

from .memory import huge_pages

_PIECE_NBYTES = 1 << 19  # what is read stays in the cache until it is packed
_LAUNCH_NBYTES = 1 << 27  # between launches the progress bar moves and Ctrl-C is seen
_OVERRUN = 8192  # kernels prefetch and load a little past the end


class _Matrix(NamedTuple):
    """A matrix of the file and where its packed form begins in the arena."""

    source: TensorBytes
    format: BlockFormat
    n_rows: int
    n_cols: int
    at: int

    @property
    def operation(self) -> str:
        return f"repack.repack[{self.format.name}]"

    @property
    def row_nbytes(self) -> int:
        return self.format.row_nbytes(self.n_cols)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_nbytes

    @property
    def piece_groups(self) -> int:
        """Groups of 8 rows that are read and packed at once."""
        return max(1, _PIECE_NBYTES // (8 * self.row_nbytes))


class Weights:
    """Packed matrices and f32 vectors by tensor name.

    `gathered` names the tensors of which only some rows are wanted in every step, at most `n_batch`.
    Raises: OutOfMemoryError, ModelFileError when the file shrank.
    """

    def __init__(
        self, gguf: GGUFFile, names: Iterable[str], gathered: Iterable[str], n_batch: int
    ) -> None:
        self._vectors: dict[str, np.ndarray] = {}
        self._matrices: dict[str, _Matrix] = {}
        self._gathered: list[_Matrix] = []
        self._ignored = np.zeros(2, np.int64)  # failures of rows that were checked when read
        end = 0
        for name in dict.fromkeys(names):
            info = gguf.tensors[name]
            if len(info.shape) == 1:
                self._vectors[name] = _vector(gguf, name)
                continue
            n_cols, n_rows = info.shape
            matrix = _Matrix(gguf.bytes_of(name), info.format, n_rows, n_cols, end)
            self._matrices[name] = matrix
            if name in gathered:
                self._gathered.append(matrix)
                n_rows = n_batch
            end += padded(info.format.packed_nbytes(n_rows, n_cols), 64)
        try:
            self._arena = huge_pages(end + _OVERRUN)
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"the weights take {end / 1e6:.0f} MB and that much memory could not be had; "
                "close other programs or use a smaller model or quantization"
            ) from error

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that loading needs per thread."""
        pieces = (m.piece_groups * 8 * m.row_nbytes for m in self._matrices.values())
        return max(pieces, default=0) + 4096

    def address(self, name: str) -> int:
        """Where the kernels find a tensor."""
        if name in self._vectors:
            return self._vectors[name].ctypes.data
        return self._arena.ctypes.data + self._matrices[name].at

    def load(self, pack: Pack, team: Team, advance: Callable[[int], None]) -> None:
        """Read and pack every matrix, on all threads."""
        self._pack = pack
        wanted = [m for m in self._matrices.values() if m not in self._gathered]
        while wanted:
            n = 1
            nbytes = wanted[0].nbytes
            while n < len(wanted) and nbytes < _LAUNCH_NBYTES:
                nbytes += wanted[n].nbytes
                n += 1
            self._load_some(wanted[:n], team)
            advance(nbytes)
            del wanted[:n]

    def _load_some(self, matrices: Sequence[_Matrix], team: Team) -> None:
        table = np.zeros((len(matrices), layout.RECORD_NBYTES // 8), np.int64)
        failures = np.zeros((len(matrices), 2), np.int64)  # short reads, floats not finite
        places = [_place(matrix) for matrix in matrices]
        for row, matrix, place, failed in zip(table, matrices, places, failures, strict=True):
            arguments = self._arguments(matrix, place, matrix.n_rows, matrix.piece_groups)
            arguments["failures"] = failed.ctypes.data
            parts = -(-matrix.n_rows // (8 * matrix.piece_groups))
            fill_record(row, self._pack[matrix.operation], arguments, parts=parts)
        step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
        step[layout.STEP_N_TOKENS // 8] = 1
        team.use(table)
        team.run(step, 0, len(matrices))
        for matrix, (n_short, n_bad) in zip(matrices, failures, strict=True):
            if n_short:
                matrix.source.check()
            if n_bad:
                raise matrix.source.not_finite()

    def gather(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the rows at which the kernels find the embeddings of `ids` (at most n_batch)."""
        for matrix in self._gathered:
            rows = np.empty((len(ids), matrix.row_nbytes), np.uint8)
            for row, i in zip(rows, ids, strict=True):
                matrix.source.read_into(row, i * matrix.row_nbytes)
            arguments = self._arguments(matrix, Place(rows.ctypes.data, rows), len(ids), len(ids))
            call_here(self._pack, matrix.operation, arguments)
        return range(len(ids)) if self._gathered else ids

    def _arguments(
        self, matrix: _Matrix, place: Place, n_rows: int, per_part: int
    ) -> dict[str, int]:
        return {
            "out": self._arena.ctypes.data + matrix.at,
            "group_nbytes": matrix.format.group_nbytes(matrix.n_cols),
            "raw": place.at, "n_rows": n_rows, "n_blocks": matrix.n_cols // matrix.format.n_weights,
            "per_part": per_part, "file": max(place.file, 0), "failures": self._ignored.ctypes.data,
            "read": pread_address() if place.file >= 0 else 0,
        }  # fmt: skip


def _place(matrix: _Matrix) -> Place:
    """The file itself where the kernels can read it, otherwise (Windows) a copy in memory."""
    if pread_address():
        return matrix.source.place()
    data = np.empty(matrix.nbytes, np.uint8)
    matrix.source.read_into(data, 0)
    return Place(data.ctypes.data, data)


def _vector(gguf: GGUFFile, name: str) -> np.ndarray:
    """A one-dimensional tensor as f32, padded with zeros to a multiple of 32."""
    info = gguf.tensors[name]
    raw = gguf.data(name)
    if info.type_name == "f32":
        values = raw.view(np.float32)
    elif info.type_name == "f16":
        values = raw.view(np.float16).astype(np.float32)
    else:  # bf16; config.py has checked that it is one of these
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    out = np.zeros(padded(len(values)), np.float32)
    out[: len(values)] = values
    return out
