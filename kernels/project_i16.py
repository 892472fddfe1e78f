"""Projections of signed 8-bit weights by activations in 16-bit words: see `matmul.py`.

A multiply-add of words does 16 products where one of floats does 8, needs no conversion per weight, and
loses no accuracy that could be measured: a word holds 15 bits of the largest of 32 activations.
"""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS
from .epilogue import finish2
from .formats import LOADS
from .layout import I16_NBYTES
from .simd import *
from .simd import inline

TILE = 6
"""Tokens of a tile: 16 rows x 6 tokens are 12 sums, two weights and one activation in registers."""

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
        panel = scratch + 512  # before it: the sums of a tile
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
                multiply(
                    out + t * out_stride + pair * 64, out_stride, y + t * y_stride, y_stride,
                    panel, n_blocks, min(TILE, count - t), scratch, residual, bias, row + pair * 16,
                )  # fmt: skip

    return stream, batch


@inline
def two(acc, weights, low, high):
    return words_add(words_add(acc, widen_i8(weights[0]), low), widen_i8(weights[1]), high)


@inline
def add_block(sums, u, v, u_scale, v_scale, y):
    """Add a block of 16 rows of one token to its sums in memory."""
    yd = broadcast_f32(y + 64)
    store_f32x8(sums, fma(to_f32(u), u_scale * yd, load_f32x8(sums)))
    store_f32x8(sums + 32, fma(to_f32(v), v_scale * yd, load_f32x8(sums + 32)))


@inline
def multiply(out, out_stride, y, y_stride, panel, n_blocks, count, sums, residual, bias, row):
    """16 rows x up to 6 tokens."""
    for i in range(0, count * 64, 32):
        store_f32x8(sums + i, zero_f32x8())
    if count == TILE:
        y1 = y + y_stride
        y2 = y1 + y_stride
        y3 = y2 + y_stride
        y4 = y3 + y_stride
        y5 = y4 + y_stride
        for _ in range(n_blocks):
            au = av = zero_i32x8()
            bu = bv = zero_i32x8()
            cu = cv = zero_i32x8()
            du = dv = zero_i32x8()
            eu = ev = zero_i32x8()
            fu = fv = zero_i32x8()
            for i in range(16):
                u = load_words16(panel + i * 64)
                v = load_words16(panel + i * 64 + 32)
                z = broadcast_pair(y + i * 4)
                au = words_add(au, u, z)
                av = words_add(av, v, z)
                z = broadcast_pair(y1 + i * 4)
                bu = words_add(bu, u, z)
                bv = words_add(bv, v, z)
                z = broadcast_pair(y2 + i * 4)
                cu = words_add(cu, u, z)
                cv = words_add(cv, v, z)
                z = broadcast_pair(y3 + i * 4)
                du = words_add(du, u, z)
                dv = words_add(dv, v, z)
                z = broadcast_pair(y4 + i * 4)
                eu = words_add(eu, u, z)
                ev = words_add(ev, v, z)
                z = broadcast_pair(y5 + i * 4)
                fu = words_add(fu, u, z)
                fv = words_add(fv, v, z)
            u_scale = load_f32x8(panel + 1024)
            v_scale = load_f32x8(panel + 1056)
            add_block(sums + 0, au, av, u_scale, v_scale, y)
            add_block(sums + 64, bu, bv, u_scale, v_scale, y1)
            add_block(sums + 128, cu, cv, u_scale, v_scale, y2)
            add_block(sums + 192, du, dv, u_scale, v_scale, y3)
            add_block(sums + 256, eu, ev, u_scale, v_scale, y4)
            add_block(sums + 320, fu, fv, u_scale, v_scale, y5)
            panel += _PANEL_NBYTES
            y += I16_NBYTES
            y1 += I16_NBYTES
            y2 += I16_NBYTES
            y3 += I16_NBYTES
            y4 += I16_NBYTES
            y5 += I16_NBYTES
    else:
        for t in range(count):
            at = panel
            x = y + t * y_stride
            for _ in range(n_blocks):
                au = av = zero_i32x8()
                for i in range(16):
                    z = broadcast_pair(x + i * 4)
                    au = words_add(au, load_words16(at + i * 64), z)
                    av = words_add(av, load_words16(at + i * 64 + 32), z)
                add_block(
                    sums + t * 64, au, av, load_f32x8(at + 1024), load_f32x8(at + 1056), x
                )  # fmt: skip
                at += _PANEL_NBYTES
                x += I16_NBYTES
    for t in range(count):
        at = sums + t * 64
        finish2(
            out + t * out_stride, load_f32x8(at), load_f32x8(at + 32), residual, bias, row
        )  # fmt: skip


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
