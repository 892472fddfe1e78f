"""Weights in memory: each tensor is repacked once, then its pages of the file are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgellama.errors import OutOfMemoryError
from edgellama.gguf import GGUFFile
from edgellama.kernels.repack import packed_nbytes, padded, repack


class Weights:
    """Packed matrices and f32 vectors by tensor name."""

    def __init__(
        self,
        gguf: GGUFFile,
        names: Iterable[str],
        *,
        n_threads: int,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self.nbytes = 0

        def load(name: str) -> tuple[str, np.ndarray]:
            info = gguf.tensors[name]
            array = _vector(gguf, name) if len(info.shape) == 1 else _matrix(gguf, name)
            gguf.release(name)
            return name, array

        # The largest first, so that the threads end together.
        order = sorted(dict.fromkeys(names), key=lambda name: -gguf.tensors[name].nbytes)
        try:
            with ThreadPoolExecutor(n_threads) as pool:
                for name, array in pool.map(load, order):
                    self._arrays[name] = array
                    self.nbytes += array.nbytes
                    advance(gguf.tensors[name].nbytes)
        except MemoryError as error:
            total = sum(gguf.tensors[name].nbytes for name in order)
            raise OutOfMemoryError(
                f"the weights take {total / 1e6:.0f} MB and that much memory could not be had; "
                "close other programs or use a smaller model or quantization"
            ) from error

    def address(self, name: str) -> int:
        """Where the kernels find a tensor."""
        return self._arrays[name].ctypes.data


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


def _matrix(gguf: GGUFFile, name: str) -> np.ndarray:
    info = gguf.tensors[name]
    n_cols, n_rows = info.shape
    # Kernels prefetch and load a little past the end.
    out = np.empty(packed_nbytes(info.type_name, n_rows, n_cols) + 4096, np.uint8)
    packed = out[:-4096]
    repack(info.type_name, gguf.data(name), n_rows, n_cols, packed)
    return out
