"""Projections of float weights by float activations: see `matmul.py`."""

from __future__ import annotations

from .blocks import FORMATS
from .epilogue import SUMS_NBYTES, TILE, finish, finish_tile
from .formats import LOADS
from .simd import *
from .simd import inline
from .tiles import tile_load, tile_operations, tile_rows

load_row = tile_load("f32", 2)
rows_at = tile_rows(TILE)
zero, add, _, store = tile_operations(TILE, 2)


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
        panel = scratch + SUMS_NBYTES
        for pair in range(2):  # the panel: 16 rows, column by column
            for half in range(2):
                w = packed + (2 * pair + half) * group
                for block in range(n_blocks):
                    for k in range(8):
                        v = load4(w, block, k)
                        at = panel + half * 32 + (block * 32 + k * 4) * 64
                        store_f32x8(at, v[0])
                        store_f32x8(at + 64, v[1])
                        store_f32x8(at + 128, v[2])
                        store_f32x8(at + 192, v[3])
            for t in range(0, count, TILE):
                start = min(t, count - TILE)
                x = rows_at(y + start * y_stride, y_stride)
                sums = zero()
                for k in range(0, n_blocks * 32, 4):
                    for i in range(k, k + 4):  # unrolled: 7 % faster than one by one
                        sums = add(sums, load_row(panel + i * 64), x, i * 4)
                store(scratch, 64, sums)
                finish_tile(
                    out + start * out_stride + pair * 64, out_stride, scratch, t - start,
                    residual, bias, row + pair * 16,
                )  # fmt: skip

    return stream, batch


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
