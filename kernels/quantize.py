"""Activations to bytes: one scale per 32 columns, and the sums that unsigned weights need.

Row form, K columns:  y i8 (K,) | yd f32 (K/32,) | ys f32 (K/32,) | ys16 f32 (K/16,)   = 1.5 K bytes.
yd = max|x| / 127 over the 32 columns, y = round(x / yd) to nearest even, ys and ys16 are yd times the
sums of y over 32 and 16 columns.
"""

from __future__ import annotations

import numpy as np

from .simd import *
from .simd import inline


@inline
def quantize_row(y, x, n_blocks):
    """Write the byte form of the f32 row at `x` to `y`."""
    for k in range(n_blocks):
        at = x + k * 128
        a = load_f32x8(at)
        b = load_f32x8(at + 32)
        c = load_f32x8(at + 64)
        d = load_f32x8(at + 96)
        peak = max_lanes(
            maximum(maximum(absolute(a), absolute(b)), maximum(absolute(c), absolute(d)))
        )
        inverse = splat_f32(np.float32(127.0) / peak if peak > np.float32(1e-30) else np.float32(0))
        scale = peak / np.float32(127.0)
        to = y + k * 32
        i = store_rounded_i8x8(to, a * inverse)
        j = store_rounded_i8x8(to + 8, b * inverse)
        low = sum_lanes_i32(i + j)
        i = store_rounded_i8x8(to + 16, c * inverse)
        j = store_rounded_i8x8(to + 24, d * inverse)
        high = sum_lanes_i32(i + j)
        line = y + n_blocks * 32 + k * 4
        store_f32(line, scale)
        store_f32(line + n_blocks * 4, scale * np.float32(low + high))
        sums = y + n_blocks * 40 + k * 8
        store_f32(sums, scale * np.float32(low))
        store_f32(sums + 4, scale * np.float32(high))


def quantize(step, part, first, count, scratch, out, out_stride, x, x_stride, n_blocks):
    """Quantize the row of every token."""
    for t in range(first, first + count):
        quantize_row(out + t * out_stride, x + t * x_stride, n_blocks)
