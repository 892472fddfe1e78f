"""Projections of float weights by float activations: see `matmul.py`."""

from __future__ import annotations

from .blocks import FORMATS
from .epilogue import finish, finish2
from .formats import LOADS
from .simd import *
from .simd import inline

TILE = 4
"""From this many tokens on a panel pays; its tile is 16 rows x 6 tokens."""


def strip_functions(format_name):
    """(stream, batch): a strip of 32 rows for one token from the packed form, and for many."""
    load4 = LOADS[format_name].load4
    block_nbytes = FORMATS[format_name].packed
    prefetch_ahead = 1024

    @inline
    def chain(w, y, acc):
        acc = fma(w[0], broadcast_f32(y), acc)
        acc = fma(w[1], broadcast_f32(y + 4), acc)
        acc = fma(w[2], broadcast_f32(y + 8), acc)
        return fma(w[3], broadcast_f32(y + 12), acc)

    @inline
    def stream(out, y, w, group, n_blocks, residual, bias, row):
        # The four groups of a strip are four independent chains, which hides the latency of fma.
        a = zero_f32x8()
        b = zero_f32x8()
        c = zero_f32x8()
        d = zero_f32x8()
        w1 = w + group
        w2 = w1 + group
        w3 = w2 + group
        for block in range(n_blocks):
            ahead = block * (block_nbytes) + prefetch_ahead
            for k in range(0, block_nbytes, 64):
                prefetch(w + ahead + k)
                prefetch(w1 + ahead + k)
                prefetch(w2 + ahead + k)
                prefetch(w3 + ahead + k)
            for k in range(8):
                at = y + block * 128 + k * 16
                a = chain(load4(w, block, k), at, a)
                b = chain(load4(w1, block, k), at, b)
                c = chain(load4(w2, block, k), at, c)
                d = chain(load4(w3, block, k), at, d)
        finish(out, a, residual, bias, row)
        finish(out + 32, b, residual, bias, row + 8)
        finish(out + 64, c, residual, bias, row + 16)
        finish(out + 96, d, residual, bias, row + 24)

    @inline
    def batch(
        out, out_stride, y, y_stride, count, packed, group, n_blocks, scratch, residual, bias, row
    ):
        for pair in range(2):  # the panel: 16 rows, column by column
            for half in range(2):
                w = packed + (2 * pair + half) * group
                for block in range(n_blocks):
                    for k in range(8):
                        v = load4(w, block, k)
                        at = scratch + half * 32 + (block * 32 + k * 4) * 64
                        store_f32x8(at, v[0])
                        store_f32x8(at + 64, v[1])
                        store_f32x8(at + 128, v[2])
                        store_f32x8(at + 192, v[3])
            for t in range(0, count, 6):
                multiply_f32(
                    out + t * out_stride + pair * 64, out_stride, y + t * y_stride, y_stride,
                    scratch, n_blocks * 32, min(6, count - t), residual, bias, row + pair * 16,
                )  # fmt: skip

    return stream, batch


@inline
def multiply_f32(out, out_stride, x, x_stride, panel, n_cols, count, residual, bias, row):
    """16 rows x up to 6 tokens: 12 sums, two weights and one broadcast in 16 registers."""
    x1 = x + x_stride
    x2 = x1 + x_stride
    x3 = x2 + x_stride
    x4 = x3 + x_stride
    x5 = x4 + x_stride
    a0 = b0 = c0 = d0 = e0 = f0 = zero_f32x8()
    a1 = b1 = c1 = d1 = e1 = f1 = zero_f32x8()
    if count == 6:
        for k in range(n_cols):
            u = load_f32x8(panel + k * 64)
            v = load_f32x8(panel + k * 64 + 32)
            y = broadcast_f32(x + k * 4)
            a0 = fma(u, y, a0)
            a1 = fma(v, y, a1)
            y = broadcast_f32(x1 + k * 4)
            b0 = fma(u, y, b0)
            b1 = fma(v, y, b1)
            y = broadcast_f32(x2 + k * 4)
            c0 = fma(u, y, c0)
            c1 = fma(v, y, c1)
            y = broadcast_f32(x3 + k * 4)
            d0 = fma(u, y, d0)
            d1 = fma(v, y, d1)
            y = broadcast_f32(x4 + k * 4)
            e0 = fma(u, y, e0)
            e1 = fma(v, y, e1)
            y = broadcast_f32(x5 + k * 4)
            f0 = fma(u, y, f0)
            f1 = fma(v, y, f1)
        finish2(out, a0, a1, residual, bias, row)
        finish2(out + out_stride, b0, b1, residual, bias, row)
        finish2(out + 2 * out_stride, c0, c1, residual, bias, row)
        finish2(out + 3 * out_stride, d0, d1, residual, bias, row)
        finish2(out + 4 * out_stride, e0, e1, residual, bias, row)
        finish2(out + 5 * out_stride, f0, f1, residual, bias, row)
    else:
        for t in range(count):
            a0 = a1 = zero_f32x8()
            for k in range(n_cols):
                y = broadcast_f32(x + t * x_stride + k * 4)
                a0 = fma(load_f32x8(panel + k * 64), y, a0)
                a1 = fma(load_f32x8(panel + k * 64 + 32), y, a1)
            finish2(out + t * out_stride, a0, a1, residual, bias, row)


def row_function(format_name):
    """columns(w, block, lane, to, scratch): 32 weights of row `lane` of a group as floats."""
    load4 = LOADS[format_name].load4

    @inline
    def columns(w, block, lane, to, scratch):
        for k in range(8):
            v = load4(w, block, k)
            store_f32x8(scratch, v[0])
            store_f32x8(scratch + 32, v[1])
            store_f32x8(scratch + 64, v[2])
            store_f32x8(scratch + 96, v[3])
            for i in range(4):
                store_f32(to + (4 * k + i) * 4, load_f32(scratch + i * 32 + lane * 4))

    return columns
