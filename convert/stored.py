"""A tensor as it lies in a file: where it begins, its element type, its strides.

Every reader but GGUF's gives these.  Elements are little-endian; the names of types are those of
safetensors.  Only what is asked for is read, and never more than that and a row of the slowest axis.
"""

from __future__ import annotations

from math import prod

import numpy as np

from edgellama.errors import shown
from edgellama.gguf.cursor import Part

from .checkpoint import SourceTensor

ELEMENTS: dict[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
        "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
    }.items()
}  # fmt: skip
"""Element types by name, and what holds their bits."""


def _e4m3() -> np.ndarray:
    """Values of the 256 codes: 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


_TABLES = {
    "F8_E4M3": _e4m3(),
    # The upper half of an f16.
    "F8_E5M2": (np.arange(256, dtype="<u2") << 8).view("<f2").astype(np.float32),
    # A power of two; 255 is NaN.
    "F8_E8M0": np.append(2.0 ** (np.arange(255.0) - 127), np.nan).astype(np.float32),
}


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values of elements of a type, f32; NaN and infinities stay what they are."""
    if dtype == "BF16":
        return (raw.astype("<u4") << 16).view("<f4")
    if dtype in _TABLES:
        return _TABLES[dtype][raw]
    with np.errstate(all="ignore"):  # an f64 may be too large, a NaN may be signalling
        return raw.astype(np.float32, copy=False)


class StoredTensor(SourceTensor):
    """Elements of an open file, `strides` elements apart (C order if left out).

    The caller has checked that all of them are inside the file, and that no two share a place.
    """

    def __init__(
        self,
        part: Part,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.part, self.name, self.dtype, self.shape, self.offset = part, name, dtype, shape, offset
        self.strides = c_strides(shape) if strides is None else strides
        self.nbytes = prod(shape) * ELEMENTS[dtype].itemsize

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Return columns of a matrix as they are stored; nothing else is read."""
        n_rows, step = self.shape[0], self.strides[1] * ELEMENTS[self.dtype].itemsize
        at, shape = self.offset + start * step, (n_rows, stop - start)
        return StoredTensor(self.part, self.name, self.dtype, shape, at, self.strides).raw(
            0, n_rows
        )

    def _read(self, start: int, stop: int) -> np.ndarray:
        return to_float32(self.raw(start, stop), self.dtype)

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Return rows as they are stored (`ELEMENTS`), C-contiguous."""
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        out = np.empty(shape, ELEMENTS[self.dtype])
        step = self.strides[0] * out.itemsize if self.strides else 0
        if out.size:
            self._fill(out, self.offset + start * step)
        return out

    def _fill(self, out: np.ndarray, at: int) -> None:
        what = f"tensor {shown(self.name)}"
        # An axis of one element has no stride to speak of.
        axes = [i for i, n in enumerate(out.shape) if n > 1]
        strides = [self.strides[i] for i in axes]
        if tuple(strides) == c_strides(tuple(out.shape[i] for i in axes)):
            self.part.read(out.reshape(-1).view(np.uint8), at, what)
            return
        # As in memory: the axis with the largest stride is walked, the others are read at once.
        axes.sort(key=lambda i: -self.strides[i])
        outer, *inner = axes
        rows = out.transpose(outer, *inner, *(i for i, n in enumerate(out.shape) if n == 1))
        span = 1 + sum((out.shape[i] - 1) * self.strides[i] for i in inner)
        buffer = np.empty(span, out.dtype)
        shape = tuple(out.shape[i] for i in inner)
        steps = tuple(self.strides[i] * out.itemsize for i in inner)
        row = np.lib.stride_tricks.as_strided(buffer, shape, steps, writeable=False)
        for i in range(out.shape[outer]):
            self.part.read(buffer.view(np.uint8), at + i * self.strides[outer] * out.itemsize, what)
            rows[i] = row.reshape(rows.shape[1:])


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last axis is the fastest."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
