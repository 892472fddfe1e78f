"""Projections of signed 8-bit weights by activations in 16-bit words: see `matmul.py`.

A multiply-add of words does 16 products where one of floats does 8, needs no conversion per weight, and
loses no accuracy that could be measured: a word holds 15 bits of the largest of 32 activations.
"""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS
from .epilogue import SUMS_NBYTES, TILE, finish2, finish_tile
from .formats import LOADS
from .layout import I16_NBYTES
from .simd import *
from .simd import inline
from .tiles import tile_load, tile_operations, tile_rows, word_tile_operations

load_row, zero, add, add_floats = word_tile_operations(TILE, 2)
zero_sums, _, _, store = tile_operations(TILE, 2)
load_scales = tile_load("f32", 2)
rows_at = tile_rows(TILE)

_PANEL_NBYTES = 1088  # of 16 rows x 32 columns: words (16, 16 rows, 2 columns) | d f32 (16,)


def strip_functions(format_name):
    """(stream, batch): a strip of 32 rows for one token from the packed form, and for many."""
    scale, load2 = LOADS[format_name].scale, LOADS[format_name].load2
    block_nbytes = FORMATS[format_name].group_nbytes(256) // 8
    prefetch_ahead = 1536

    @inline
    def stream(out, y, packed, group, n_blocks, residual, bias, row):
        a = b = c = d = zero_f32x8()
        w1 = packed + group
        w2 = w1 + group
        w3 = w2 + group
        for block in range(n_blocks):
            ahead = block * block_nbytes + prefetch_ahead
            for k in range(0, block_nbytes, 64):
                prefetch(packed + ahead + k)
                prefetch(w1 + ahead + k)
                prefetch(w2 + ahead + k)
                prefetch(w3 + ahead + k)
            at = y + block * I16_NBYTES
            sa = sb = sc = sd = zero_i32x8()
            for k in range(8):
                low = broadcast_pair(at + k * 4)
                high = broadcast_pair(at + 32 + k * 4)
                sa = two(sa, load2(packed, block, k), low, high)
                sb = two(sb, load2(w1, block, k), low, high)
                sc = two(sc, load2(w2, block, k), low, high)
                sd = two(sd, load2(w3, block, k), low, high)
            yd = broadcast_f32(at + 64)
            a = fma(to_f32(sa), scale(packed, block) * yd, a)
            b = fma(to_f32(sb), scale(w1, block) * yd, b)
            c = fma(to_f32(sc), scale(w2, block) * yd, c)
            d = fma(to_f32(sd), scale(w3, block) * yd, d)
        finish2(out, a, b, residual, bias, row)
        finish2(out + 64, c, d, residual, bias, row + 16)

    @inline
    def batch(
        out, out_stride, y, y_stride, count, packed, group, n_blocks, scratch, residual, bias, row
    ):
        panel = scratch + SUMS_NBYTES
        for pair in range(2):
            for half in range(2):
                w = packed + (2 * pair + half) * group
                for block in range(n_blocks):
                    to = panel + block * _PANEL_NBYTES + half * 32
                    for k in range(8):
                        low, high = load2(w, block, k)
                        store_words16(to + k * 64, widen_i8(low))
                        store_words16(to + 512 + k * 64, widen_i8(high))
                    store_f32x8(to + 1024, scale(w, block))
            for t in range(0, count, TILE):
                start = min(t, count - TILE)
                sums = multiply(y + start * y_stride, y_stride, panel, n_blocks)
                store(scratch, 64, sums)
                finish_tile(
                    out + start * out_stride + pair * 64, out_stride, scratch, t - start,
                    residual, bias, row + pair * 16,
                )  # fmt: skip

    return stream, batch


@inline
def two(acc, weights, low, high):
    return words_add(words_add(acc, widen_i8(weights[0]), low), widen_i8(weights[1]), high)


@inline
def multiply(y, y_stride, panel, n_blocks):
    """16 rows x 6 tokens: a tile of sums."""
    sums = zero_sums()
    for _ in range(n_blocks):
        x = rows_at(y, y_stride)
        tile = zero()
        for k in range(16):
            tile = add(tile, load_row(panel + k * 64), x, k * 4)
        sums = add_floats(sums, tile, load_scales(panel + 1024), rows_at(y + 64, y_stride))
        panel += _PANEL_NBYTES
        y += I16_NBYTES
    return sums


def row_function(format_name):
    """columns(w, block, lane, to, scratch): 32 weights of row `lane` of a group as floats."""
    scale, load2 = LOADS[format_name].scale, LOADS[format_name].load2

    @inline
    def columns(w, block, lane, to, scratch):
        store_f32x8(scratch, scale(w, block))
        d = load_f32(scratch + lane * 4)
        for k in range(8):
            low, high = load2(w, block, k)
            store_words16(scratch, widen_i8(low))
            store_words16(scratch + 32, widen_i8(high))
            for i in range(2):
                at = scratch + lane * 4 + i * 2
                store_f32(to + (2 * k + i) * 4, np.float32(load_i16(at)) * d)
                store_f32(to + (2 * k + i + 16) * 4, np.float32(load_i16(at + 32)) * d)

    return columns
