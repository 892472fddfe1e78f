"""Weights in memory: every matrix is read in pieces and repacked once, into one arena.

Pieces are read, not mapped: the file never counts as resident beside the packed form, and one that is cut
off meanwhile is an error rather than a signal.  An embedding that is not also the output projection
stays in the file; the rows of a step's tokens are read and packed when they are needed.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgellama.errors import OutOfMemoryError
from edgellama.gguf import GGUFFile, TensorBytes
from edgellama.kernels.blocks import FORMATS, BlockFormat, padded
from edgellama.kernels.compiler import Pack
from edgellama.kernels.team import call_here

_PIECE_NBYTES = 1 << 19  # what is read stays in the cache until it is packed
_OVERRUN = 8192  # kernels prefetch and load a little past the end


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix of the file and where its packed form begins in the arena."""

    source: TensorBytes
    format: BlockFormat
    n_rows: int
    n_cols: int
    at: int

    @property
    def packed_nbytes(self) -> int:
        return self.format.packed_nbytes(self.n_rows, self.n_cols)


class Weights:
    """Packed matrices and f32 vectors by tensor name.

    `gathered` names the tensors of which only some rows are wanted in every step, at most `n_batch`.
    Raises: OutOfMemoryError, ModelFileError when the file shrank.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        names: Iterable[str],
        gathered: Iterable[str],
        pack: Pack,
        *,
        n_batch: int,
        n_threads: int,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._pack = pack
        self._addresses: dict[str, int] = {}
        self._vectors: list[np.ndarray] = []
        self._gathered: list[_Matrix] = []
        self._threads = threading.local()
        matrices: dict[str, _Matrix] = {}
        end = 0
        for name in dict.fromkeys(names):
            info = gguf.tensors[name]
            if len(info.shape) == 1:
                self._vectors.append(_vector(gguf, name))
                self._addresses[name] = self._vectors[-1].ctypes.data
                continue
            n_cols, n_rows = info.shape
            is_gathered = name in gathered
            matrix = _Matrix(
                gguf.bytes_of(name), FORMATS[info.type_name],
                padded(n_batch) if is_gathered else n_rows, n_cols, end,
            )  # fmt: skip
            matrices[name] = matrix
            if is_gathered:
                self._gathered.append(matrix)
            end += padded(matrix.packed_nbytes, 64)
        self.nbytes = end
        try:
            self._arena = _huge_pages(end + _OVERRUN)
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"the weights take {end / 1e6:.0f} MB and that much memory could not be had; "
                "close other programs or use a smaller model or quantization"
            ) from error
        self._base = self._arena.ctypes.data
        self._addresses |= {name: self._base + matrix.at for name, matrix in matrices.items()}
        pieces = [
            (matrix, first, n)
            for matrix in matrices.values()
            if matrix not in self._gathered
            for first, n in _pieces(matrix)
        ]
        self._load(pieces, n_threads, advance)

    def address(self, name: str) -> int:
        """Where the kernels find a tensor."""
        return self._addresses[name]

    def gather(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the rows at which the kernels find the embeddings of `ids` (at most n_batch)."""
        for matrix in self._gathered:
            row_nbytes = matrix.format.row_nbytes(matrix.n_cols)
            rows = np.empty((len(ids), row_nbytes), np.uint8)
            for row, i in zip(rows, ids, strict=True):
                matrix.source.read_into(row, i * row_nbytes)
            self._repack(matrix, rows, 0)
        return range(len(ids)) if self._gathered else ids

    def _load(
        self,
        pieces: Sequence[tuple[_Matrix, int, int]],
        n_threads: int,
        advance: Callable[[int], None],
    ) -> None:
        def load(piece: tuple[_Matrix, int, int]) -> int:
            matrix, first, n_rows = piece
            row_nbytes = matrix.format.row_nbytes(matrix.n_cols)
            nbytes = n_rows * row_nbytes
            buffer = getattr(self._threads, "buffer", None)
            if buffer is None or len(buffer) < nbytes:
                buffer = self._threads.buffer = np.empty(nbytes, np.uint8)
            rows = buffer[:nbytes].reshape(n_rows, row_nbytes)
            matrix.source.read_into(rows, first * row_nbytes)
            self._repack(matrix, rows, first // 8)
            return nbytes

        pool = ThreadPoolExecutor(n_threads)
        try:
            for nbytes in pool.map(load, pieces):
                advance(nbytes)
        finally:
            pool.shutdown(cancel_futures=True)  # the rest is not wanted after an error or Ctrl-C

    def _repack(self, matrix: _Matrix, rows: np.ndarray, group: int) -> None:
        """Pack rows (n, row bytes) of the file as groups from `group` on."""
        group_nbytes = matrix.format.group_nbytes(matrix.n_cols)
        call_here(
            self._pack,
            f"repack.repack[{matrix.format.name}]",
            {
                "out": self._base + matrix.at + group * group_nbytes, "group_nbytes": group_nbytes,
                "raw": rows.ctypes.data, "n_rows": len(rows),
                "n_blocks": matrix.n_cols // matrix.format.n_weights,
            },
            -(-len(rows) // 8),
        )  # fmt: skip


def _pieces(matrix: _Matrix) -> Iterable[tuple[int, int]]:
    """Rows (first, count) of about `_PIECE_NBYTES`, a multiple of 8 but for the last."""
    step = max(8, _PIECE_NBYTES // matrix.format.row_nbytes(matrix.n_cols) // 8 * 8)
    for first in range(0, matrix.n_rows, step):
        yield first, min(step, matrix.n_rows - first)


def _huge_pages(nbytes: int) -> np.ndarray:
    """Zeroed memory in pages of 2 MB where the system has them: far fewer faults while loading."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _vector(gguf: GGUFFile, name: str) -> np.ndarray:
    """A one-dimensional tensor as f32, padded with zeros to a multiple of 32."""
    info = gguf.tensors[name]
    raw = np.empty(info.nbytes, np.uint8)
    gguf.bytes_of(name).read_into(raw, 0)
    if info.type_name == "f32":
        values = raw.view(np.float32)
    elif info.type_name == "f16":
        values = raw.view(np.float16).astype(np.float32)
    else:  # bf16; config.py has checked that it is one of these
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    out = np.zeros(padded(len(values)), np.float32)
    out[: len(values)] = values
    return out
