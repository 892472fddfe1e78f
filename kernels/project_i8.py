"""Projections of unsigned integer weights (up to 6 bits) by activations in bytes: see `matmul.py`."""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS
from .epilogue import finish, finish2
from .formats import LOADS
from .layout import I8_NBYTES
from .simd import *
from .simd import inline

TILE = 8
"""Tokens of a tile: 8 rows x 8 tokens x 16 columns keep weights and sums in 16 registers."""


def _block_functions(format_):
    """(step, unpack): how a block joins the sum, and how it is unpacked into a panel.

    A panel block of 8 rows: per 16 columns four byte vectors and their d, then the m of both.
    """
    load = format_.load
    dot = dot16(format_.bits)
    if format_.groups == 1:

        @inline
        def accumulate(w, y, acc):
            q, d, m = w
            sum0 = to_f32(dot(q[0], q[1], q[2], q[3], y))
            acc = fma(sum0, d * broadcast_f32(y + 32), acc)
            sum1 = to_f32(dot(q[4], q[5], q[6], q[7], y + 16))
            acc = fma(sum1, d * broadcast_f32(y + 36), acc)
            return fma(m, broadcast_f32(y + 48), acc)

        @inline
        def unpack(w, to):
            q, d, m = w
            store_half(to, q[0], q[1], q[2], q[3], d)
            store_half(to + 160, q[4], q[5], q[6], q[7], d)
            store_f32x8(to + 320, m)

        @inline
        def offset(panel, y, acc):
            return fma(load_f32x8(panel + 320), broadcast_f32(y + 48), acc)

        return load, accumulate, unpack, offset, 352

    @inline
    def accumulate16(w, y, acc):
        q, d0, d1, m0, m1 = w
        sum0 = to_f32(dot(q[0], q[1], q[2], q[3], y))
        sum1 = to_f32(dot(q[4], q[5], q[6], q[7], y + 16))
        acc = fma(sum0, d0 * broadcast_f32(y + 32), acc)
        acc = fma(sum1, d1 * broadcast_f32(y + 36), acc)
        acc = fma(m0, broadcast_f32(y + 40), acc)
        return fma(m1, broadcast_f32(y + 44), acc)

    @inline
    def unpack16(w, to):
        q, d0, d1, m0, m1 = w
        store_half(to, q[0], q[1], q[2], q[3], d0)
        store_half(to + 160, q[4], q[5], q[6], q[7], d1)
        store_f32x8(to + 320, m0)
        store_f32x8(to + 352, m1)

    @inline
    def offset16(panel, y, acc):
        acc = fma(load_f32x8(panel + 320), broadcast_f32(y + 40), acc)
        return fma(load_f32x8(panel + 352), broadcast_f32(y + 44), acc)

    return load, accumulate16, unpack16, offset16, 384


@inline
def store_half(to, a, b, c, d, scale):
    store_bytes32(to, a)
    store_bytes32(to + 32, b)
    store_bytes32(to + 64, c)
    store_bytes32(to + 96, d)
    store_f32x8(to + 128, scale)


def strip_functions(format_name):
    """(stream, batch): a strip of 32 rows for one token from the packed form, and for many."""
    format_ = LOADS[format_name]
    load, accumulate, unpack, offset, panel_nbytes = _block_functions(format_)
    dot = dot16(format_.bits)
    block_nbytes = FORMATS[format_name].group_nbytes(256) // 8
    prefetch_ahead = 3072

    @inline
    def stream(out, y, packed, group, n_blocks, residual, bias, row):
        # Two groups at once share every load of activations.
        for pair in range(2):
            w = packed + 2 * pair * group
            w1 = w + group
            a = b = zero_f32x8()
            for k in range(n_blocks):
                ahead = k * block_nbytes + prefetch_ahead
                for i in range(0, block_nbytes, 64):
                    prefetch(w + ahead + i)
                    prefetch(w1 + ahead + i)
                a = accumulate(load(w, k), y + k * I8_NBYTES, a)
                b = accumulate(load(w1, k), y + k * I8_NBYTES, b)
            finish2(out + pair * 64, a, b, residual, bias, row + pair * 16)

    @inline
    def tile(out, out_stride, y, y_stride, panel, n_blocks, residual, bias, row):
        """8 rows x 8 tokens from the panel, 16 columns at a time."""
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = zero_f32x8()
        y3 = y + 3 * y_stride
        y6 = y3 + 3 * y_stride
        for _ in range(n_blocks):
            for half in range(2):
                at = panel + half * 160
                p = load_bytes32(at)
                q = load_bytes32(at + 32)
                r = load_bytes32(at + 64)
                s = load_bytes32(at + 96)
                d = load_f32x8(at + 128)
                z = half * 16
                h = 32 + half * 4
                a0 = fma(to_f32(dot(p, q, r, s, y + z)), d * broadcast_f32(y + h), a0)
                a1 = fma(
                    to_f32(dot(p, q, r, s, y + y_stride + z)),
                    d * broadcast_f32(y + y_stride + h),
                    a1,
                )
                a2 = fma(
                    to_f32(dot(p, q, r, s, y + 2 * y_stride + z)),
                    d * broadcast_f32(y + 2 * y_stride + h),
                    a2,
                )
                a3 = fma(to_f32(dot(p, q, r, s, y3 + z)), d * broadcast_f32(y3 + h), a3)
                a4 = fma(
                    to_f32(dot(p, q, r, s, y3 + y_stride + z)),
                    d * broadcast_f32(y3 + y_stride + h),
                    a4,
                )
                a5 = fma(
                    to_f32(dot(p, q, r, s, y3 + 2 * y_stride + z)),
                    d * broadcast_f32(y3 + 2 * y_stride + h),
                    a5,
                )
                a6 = fma(to_f32(dot(p, q, r, s, y6 + z)), d * broadcast_f32(y6 + h), a6)
                a7 = fma(
                    to_f32(dot(p, q, r, s, y6 + y_stride + z)),
                    d * broadcast_f32(y6 + y_stride + h),
                    a7,
                )
            a0 = offset(panel, y, a0)
            a1 = offset(panel, y + y_stride, a1)
            a2 = offset(panel, y + 2 * y_stride, a2)
            a3 = offset(panel, y3, a3)
            a4 = offset(panel, y3 + y_stride, a4)
            a5 = offset(panel, y3 + 2 * y_stride, a5)
            a6 = offset(panel, y6, a6)
            a7 = offset(panel, y6 + y_stride, a7)
            y += I8_NBYTES
            y3 += I8_NBYTES
            y6 += I8_NBYTES
            panel += panel_nbytes
        finish(out, a0, residual, bias, row)
        out += out_stride
        finish(out, a1, residual, bias, row)
        out += out_stride
        finish(out, a2, residual, bias, row)
        out += out_stride
        finish(out, a3, residual, bias, row)
        out += out_stride
        finish(out, a4, residual, bias, row)
        out += out_stride
        finish(out, a5, residual, bias, row)
        out += out_stride
        finish(out, a6, residual, bias, row)
        out += out_stride
        finish(out, a7, residual, bias, row)

    @inline
    def tail(out, y, panel, n_blocks, residual, bias, row):
        acc = zero_f32x8()
        for _ in range(n_blocks):
            for half in range(2):
                at = panel + half * 160
                s = dot(
                    load_bytes32(at), load_bytes32(at + 32), load_bytes32(at + 64),
                    load_bytes32(at + 96), y + half * 16,
                )  # fmt: skip
                acc = fma(to_f32(s), load_f32x8(at + 128) * broadcast_f32(y + 32 + half * 4), acc)
            acc = offset(panel, y, acc)
            y += I8_NBYTES
            panel += panel_nbytes
        finish(out, acc, residual, bias, row)

    @inline
    def batch(
        out, out_stride, y, y_stride, count, packed, group, n_blocks, scratch, residual, bias, row
    ):
        for g in range(4):
            for k in range(n_blocks):
                to = scratch + (g * n_blocks + k) * panel_nbytes
                unpack(load(packed + g * group, k), to)
        t = 0
        while t < count:
            for g in range(4):
                panel = scratch + g * n_blocks * panel_nbytes
                to = out + t * out_stride + g * 32
                x = y + t * y_stride
                if t + TILE <= count:
                    tile(to, out_stride, x, y_stride, panel, n_blocks, residual, bias, row + g * 8)
                else:
                    for i in range(count - t):
                        tail(
                            to + i * out_stride, x + i * y_stride, panel, n_blocks,
                            residual, bias, row + g * 8,
                        )  # fmt: skip
            t += TILE

    return stream, batch


def row_function(format_name):
    """columns(w, block, lane, to, scratch): 32 weights of row `lane` of a group as floats."""
    format_ = LOADS[format_name]
    load, _, unpack, _, _ = _block_functions(format_)
    groups = format_.groups

    @inline
    def columns(w, block, lane, to, scratch):
        unpack(load(w, block), scratch)
        for i in range(32):
            half = i // 16
            at = scratch + half * 160
            q = load_u8(at + (i % 16 // 4) * 32 + lane * 4 + i % 4)
            m = scratch + 320 + lane * 4
            if groups == 2:
                m += half * 32
            value = fma(
                splat_f32(np.float32(q)),
                splat_f32(load_f32(at + 128 + lane * 4)),
                splat_f32(load_f32(m)),
            )
            store_f32(to + i * 4, first_lane(value))

    return columns
