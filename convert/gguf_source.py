"""A GGUF file as a checkpoint: its metadata is the configuration, its blocks are read as floats."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from edgellama.errors import UnsupportedModelError
from edgellama.gguf import GGUFFile, open_gguf
from edgellama.kernels.blocks import BlockFormat

from .checkpoint import Checkpoint, SourceTensor
from .dequantize import DECODERS


class BlockTensor(SourceTensor):
    """A tensor of a GGUF file, with rows first (GGUF names columns first)."""

    def __init__(self, gguf: GGUFFile, name: str) -> None:
        info = gguf.tensors[name]
        self.name, self.shape, self.nbytes = name, info.shape[::-1], info.nbytes
        self.format: BlockFormat = info.format
        self.dtype = info.type_name.upper()
        self._bytes = gguf.bytes_of(name)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if self.format.name not in DECODERS:
            raise UnsupportedModelError(
                f"tensor {self.name!r} is {self.dtype}, which edgellama does not read; "
                f"it reads {', '.join(DECODERS)}"
            )
        n_cols, n_weights, nbytes = prod(self.shape[1:]), self.format.n_weights, self.format.nbytes
        first = start * n_cols // n_weights  # rows are whole blocks, elements of a vector are not
        last = -(-stop * n_cols // n_weights)
        raw = np.empty((last - first, nbytes), np.uint8)
        self._bytes.read_into(raw.reshape(-1), first * nbytes)
        values = DECODERS[self.format.name](raw).reshape(-1)
        begin = start * n_cols - first * n_weights
        values = values[begin : begin + (stop - start) * n_cols]
        return values.reshape(stop - start, *self.shape[1:])


def open_gguf_source(path: Path) -> Checkpoint:
    """Open a GGUF file (the first part of a split one).  Raises: ModelFileError."""
    with open_gguf(path) as gguf:
        tensors = {name: BlockTensor(gguf, name) for name in gguf.tensors}
        return Checkpoint("gguf", gguf.metadata, tensors, path.parent)
