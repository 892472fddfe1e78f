"""What becomes of a finished sum of 8 rows: bias, residual, store. All matrix kernels end here."""

from __future__ import annotations

from .simd import *
from .simd import inline

TILE = 6
"""Tokens of a tile of 16 rows: 12 sums, two weights and one activation in 16 registers."""

SUMS_NBYTES = 512
"""Room in a thread's scratch for the sums of a tile."""


@inline
def finish(out, acc, residual, bias, row):
    """Store 8 rows at `out`: acc (+ bias of `row`) (+ what stood there)."""
    if bias != 0:
        acc = acc + load_f32x8(bias + row * 4)
    if residual != 0:
        acc = load_f32x8(out) + acc
    store_f32x8(out, acc)


@inline
def finish2(out, low, high, residual, bias, row):
    """The same for 16 rows."""
    finish(out, low, residual, bias, row)
    finish(out + 32, high, residual, bias, row + 8)


@inline
def finish_tile(out, out_stride, sums, first, residual, bias, row):
    """The same for tokens [first, TILE) of a tile of 16 rows, whose sums lie at `sums`."""
    for t in range(first, TILE):
        at = sums + t * 64
        finish2(
            out + t * out_stride, load_f32x8(at), load_f32x8(at + 32), residual, bias, row
        )  # fmt: skip
