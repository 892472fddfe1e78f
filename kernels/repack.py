"""From a file's blocks to r8: 8 rows side by side, so that vector lanes are rows.

One function per format, in NumPy: it runs once per tensor and moves bytes. `formats.py` has the byte
map of what is written; the file's own layouts are those of the GGUF specification (ggml-quants.c).

Names: b u8 (G, 8, B, n) are the file's blocks of G groups of 8 rows, B blocks a row; v are unpacked
codes u8 (G, 8, B, 32) per block of 32; what is written has shape (G, B, bytes of a packed block).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .blocks import FORMATS
from .layout import STRIP

Bytes = NDArray[np.uint8]

PACKED_NBYTES: dict[str, int] = {  # of 8 rows x one block of the file's format (32 for floats)
    "f32": 1024,
    "f16": 512,
    "bf16": 512,
    "q4_0": 144,
    "q4_1": 160,
    "q5_0": 176,
    "q5_1": 192,
    "q8_0": 272,
    "iq4_nl": 144,
    "mxfp4": 136,
    "q2_k": 672,
    "q3_k": 912,
    "q4_k": 1184,
    "q5_k": 1440,
    "q6_k": 1680,
    "iq4_xs": 1104,
}
FLOATS = ("f32", "f16", "bf16")


def padded(n: int, multiple: int = STRIP) -> int:
    """Round up to a multiple."""
    return -(-n // multiple) * multiple


def packed_nbytes(format_name: str, n_rows: int, n_cols: int) -> int:
    """Bytes of a packed tensor: rows padded to 32, columns of float formats to 32."""
    per_block = 32 if format_name in FLOATS else FORMATS[format_name].n_weights
    return padded(n_rows) // 8 * (-(-n_cols // per_block)) * PACKED_NBYTES[format_name]


def repack(format_name: str, raw: Bytes, n_rows: int, n_cols: int, out: Bytes) -> None:
    """Write the packed form of a tensor to `out` (packed_nbytes,).

    Shapes: raw u8 (n_rows * row bytes,) as in the file.
    """
    format_ = FORMATS[format_name]
    row_nbytes = format_.row_nbytes(n_cols)
    rows = raw.reshape(n_rows, row_nbytes)
    group_nbytes = packed_nbytes(format_name, 8, n_cols) // 4
    groups = out.reshape(padded(n_rows) // 8, group_nbytes)
    step = max(1, (1 << 20) // (8 * row_nbytes))  # about 1 MB at a time stays in the cache
    for first in range(0, len(groups), step):
        to = groups[first : first + step]
        chunk = rows[first * 8 : (first + len(to)) * 8]
        if len(chunk) < len(to) * 8:
            full = np.zeros((len(to) * 8, row_nbytes), np.uint8)
            full[: len(chunk)] = chunk
            chunk = full
        if format_name in FLOATS:
            _floats(chunk.reshape(len(to), 8, n_cols, format_.nbytes), to)
        else:
            n_blocks = n_cols // format_.n_weights
            b = chunk.reshape(len(to), 8, n_blocks, format_.nbytes)
            _REPACK[format_name](b, to.reshape(len(to), n_blocks, -1))


# --- pieces ---------------------------------------------------------------------------------------
def _put(out: Bytes, at: int, values: NDArray) -> int:
    """Store (G, B, ...) at byte `at` of every block; return where it ends."""
    flat = np.ascontiguousarray(values).view(np.uint8).reshape(*out.shape[:2], -1)
    out[:, :, at : at + flat.shape[2]] = flat
    return at + flat.shape[2]


def _rows_last(values: NDArray) -> NDArray:
    """(G, 8, B, n) to (G, B, n, 8)."""
    return values.transpose(0, 2, 3, 1)


def _f16(b: Bytes, at: int) -> NDArray:
    """One f16 per block, of 8 rows."""
    return _rows_last(np.ascontiguousarray(b[..., at : at + 2]).view(np.uint16))


def _words(b: Bytes, at: int) -> NDArray:
    """16 bytes of nibbles as they are: words of 4 columns, of 8 rows."""
    return _rows_last(np.ascontiguousarray(b[..., at : at + 16]).view(np.uint32))


def _by_vector(v: Bytes) -> NDArray:
    """Codes (G, 8, B, 32) to (G, B, vector 8, row 8, column 4)."""
    g, _, n, _ = v.shape
    return v.reshape(g, 8, n, 8, 4).transpose(0, 2, 3, 1, 4)


def _nibble_plane(v: Bytes) -> NDArray:
    w = _by_vector(v)
    return w[:, :, :4] | (w[:, :, 4:] << 4)


def _two_bit_plane(v: Bytes) -> NDArray:
    w = _by_vector(v)
    return w[:, :, :2] | (w[:, :, 2:4] << 2) | (w[:, :, 4:6] << 4) | (w[:, :, 6:] << 6)


def _bit_plane(v: Bytes) -> NDArray:
    w = _by_vector(v)
    return np.packbits(w, axis=2, bitorder="little")


def _fifth_bits(b: Bytes, at: int) -> NDArray:
    return _bit_plane(np.unpackbits(b[..., at : at + 4], axis=3, bitorder="little"))


def _sub_blocks(values: NDArray) -> Bytes:
    """Codes (G, 8, B, 256 in any shape) to (G, 8, 8 B, 32)."""
    g, _, n = values.shape[:3]
    return values.reshape(g, 8, n * 8, 32)


def _per_super(plane: NDArray, n: int) -> NDArray:
    """Planes of (G, 8 B, ...) back to (G, B, ...)."""
    return np.ascontiguousarray(plane).reshape(len(plane), n, -1)


# --- formats of 32 --------------------------------------------------------------------------------
def _floats(b: Bytes, out: Bytes) -> None:
    g, _, n_cols, size = b.shape
    to = out.reshape(g, -1, 8, size)
    to[:, :n_cols] = b.transpose(0, 2, 1, 3)
    to[:, n_cols:] = 0


def _q4_0(b: Bytes, out: Bytes) -> None:
    _put(out, _put(out, 0, _f16(b, 0)), _words(b, 2))


def _q4_1(b: Bytes, out: Bytes) -> None:
    _put(out, _put(out, _put(out, 0, _f16(b, 0)), _f16(b, 2)), _words(b, 4))


def _q5_0(b: Bytes, out: Bytes) -> None:
    at = _put(out, _put(out, 0, _f16(b, 0)), _fifth_bits(b, 2))
    _put(out, at, _words(b, 6))


def _q5_1(b: Bytes, out: Bytes) -> None:
    at = _put(out, _put(out, 0, _f16(b, 0)), _f16(b, 2))
    _put(out, _put(out, at, _fifth_bits(b, 4)), _words(b, 8))


def _q8_0(b: Bytes, out: Bytes) -> None:
    _put(out, _put(out, 0, _f16(b, 0)), _rows_last(b[..., 2:]))


def _mxfp4(b: Bytes, out: Bytes) -> None:
    _put(out, _put(out, 0, _rows_last(b[..., :1])), _words(b, 1))


def _indices(v: Bytes) -> NDArray:
    """4-bit indices (G, 8, B, 32) to 16 bytes per 4 columns: columns 0, 1 low; 2, 3 high."""
    g, _, n, _ = v.shape
    w = v.reshape(g, 8, n, 8, 2, 2).transpose(0, 2, 3, 4, 5, 1)  # (G, B, 8, half, column, row)
    return w[:, :, :, 0] | (w[:, :, :, 1] << 4)


def _nibbles(b: Bytes) -> Bytes:
    """16 bytes to 32 codes: low nibbles first."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _iq4_nl(b: Bytes, out: Bytes) -> None:
    _put(out, _put(out, 0, _f16(b, 0)), _indices(_nibbles(b[..., 2:])))


# --- formats of 256 -------------------------------------------------------------------------------
def _scales_k4(b: Bytes, at: int) -> tuple[Bytes, Bytes]:
    """The 12 bytes of q4_k and q5_k: 8 six-bit scales and 8 six-bit minima."""
    s = b[..., at : at + 12]
    low, middle, high = s[..., :4], s[..., 4:8], s[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    return scales, minima


def _q4_k_head(b: Bytes, out: Bytes) -> int:
    scales, minima = _scales_k4(b, 4)
    at = _put(out, _put(out, 0, _f16(b, 0)), _f16(b, 2))
    both = np.stack([_rows_last(scales), _rows_last(minima)], axis=3)  # (G, B, 8, 2, row)
    return _put(out, at, both)


def _nibbles_of_32(b: Bytes) -> Bytes:
    """Runs of 32 bytes: low nibbles are 32 codes, high nibbles the next 32."""
    q = b.reshape(*b.shape[:3], -1, 1, 32)
    return np.concatenate([q & 15, q >> 4], axis=-2)


def _q4_k(b: Bytes, out: Bytes) -> None:
    at = _q4_k_head(b, out)
    _put(out, at, _per_super(_nibble_plane(_sub_blocks(_nibbles_of_32(b[..., 16:]))), b.shape[2]))


def _q5_k(b: Bytes, out: Bytes) -> None:
    n = b.shape[2]
    at = _q4_k_head(b, out)
    at = _put(out, at, _per_super(_nibble_plane(_sub_blocks(_nibbles_of_32(b[..., 48:]))), n))
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (b[..., 16:48][..., None, :] >> shifts) & 1  # bit of sub-block, position
    _put(out, at, _per_super(_bit_plane(_sub_blocks(fifth)), n))


def _two_bits_of_32(b: Bytes) -> Bytes:
    """Runs of 32 bytes: bits 0-1 are 32 codes, bits 2-3 the next 32, ..."""
    q = b.reshape(*b.shape[:3], -1, 1, 32)
    return (q >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3


def _q2_k(b: Bytes, out: Bytes) -> None:
    at = _put(out, _put(out, 0, _f16(b, 80)), _f16(b, 82))
    at = _put(out, at, _rows_last(b[..., :16]))
    codes = _sub_blocks(_two_bits_of_32(b[..., 16:80]))
    _put(out, at, _per_super(_two_bit_plane(codes), b.shape[2]))


def _q3_k(b: Bytes, out: Bytes) -> None:
    n = b.shape[2]
    packed = b[..., 96:108]
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = packed[..., None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = low | (high.reshape(low.shape) << 4)
    at = _put(out, 0, _f16(b, 108))
    at = _put(out, at, _rows_last(scales.astype(np.int8) - np.int8(32)))
    at = _put(out, at, _per_super(_two_bit_plane(_sub_blocks(_two_bits_of_32(b[..., 32:96]))), n))
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    third = (b[..., None, :32] >> shifts) & 1
    _put(out, at, _per_super(_bit_plane(_sub_blocks(third)), n))


def _q6_k(b: Bytes, out: Bytes) -> None:
    n = b.shape[2]
    shape = (*b.shape[:3], 2, 1, 64)
    low = b[..., :128].reshape(shape)
    low = np.concatenate([low & 15, low >> 4], axis=-2)  # (.., 2, 2, 64): +0 +32 | +64 +96
    high = _two_bits_of_32(b[..., 128:192])
    at = _put(out, 0, _f16(b, 208))
    at = _put(out, at, _rows_last(b[..., 192:208]))
    at = _put(out, at, _per_super(_nibble_plane(_sub_blocks(low)), n))
    _put(out, at, _per_super(_two_bit_plane(_sub_blocks(high)), n))


def _iq4_xs(b: Bytes, out: Bytes) -> None:
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:3], 8)
    high = np.ascontiguousarray(b[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, np.uint16) & 3
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    at = _put(out, _put(out, 0, _f16(b, 0)), _rows_last(scales))
    q = b[..., 8:].reshape(*b.shape[:3], 8, 16)
    _put(out, at, _per_super(_indices(_sub_blocks(_nibbles(q))), b.shape[2]))


_REPACK: dict[str, Callable[[Bytes, Bytes], None]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "mxfp4": _mxfp4,
    "iq4_nl": _iq4_nl,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
}
