"""What becomes of a finished sum of 8 rows: bias, residual, store. All matrix kernels end here."""

from __future__ import annotations

from .simd import *
from .simd import inline


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
