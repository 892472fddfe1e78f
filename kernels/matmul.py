"""Matrix products: out = W @ x for one token or many, from packed weights of any format.

A row of the result is the same to the last bit whatever T is, because both paths run the same chain:

    integer formats   acc = fma(f32(sum of q*y over 16), d*yd, acc), twice; acc = fma(m, ys, acc)
    float formats     acc = fma(w, y, acc), column by column

with lanes = rows and blocks in order.  One token streams the packed weights.  More tokens first unpack
a strip of 32 rows into the thread's scratch (the panel: bytes and lines, or floats), and run a
register tile over it; unpacking costs 1/T of the work, so any format gets the same fast tile.

Activations come in one of two forms (`quantize.py` writes them): rows of floats, or rows of bytes with
a scale per 16 columns:  y i8 (K,) | yd f32 (K/16,) | ys f32 (K/32,) | ys16 f32 (K/16,).
"""

from __future__ import annotations

import numpy as np

from .formats import LOADS, FloatFormat
from .layout import STRIP
from .simd import *
from .simd import inline

TILE = 4
"""Tokens of an integer tile: 8 rows x 4 tokens keeps weights and sums in 16 registers."""


def project(format_name):
    """Return the operation `project[format]`: rows of `out` += or = W @ x (+ bias) for all tokens."""
    format_ = LOADS[format_name]
    return _project_f32(format_) if isinstance(format_, FloatFormat) else _project_q8(format_)


@inline
def _finish(out, acc, residual, bias, row):
    if bias != 0:
        acc = acc + load_f32x8(bias + row * 4)
    if residual != 0:
        acc = load_f32x8(out) + acc
    store_f32x8(out, acc)


# --- integer formats ------------------------------------------------------------------------------
def dot_function(bits):
    """Sum of q*y over 16 columns, within the i16 budget that `bits` allows (simd.py)."""
    if bits <= 5:

        @inline
        def dot(a, b, c, d, y):
            s = pairs_add(pairs_zero(), a, broadcast4(y))
            s = pairs_add(s, b, broadcast4(y + 4))
            s = pairs_add(s, c, broadcast4(y + 8))
            s = pairs_add(s, d, broadcast4(y + 12))
            return pairs_sum(s)
    else:

        @inline
        def dot(a, b, c, d, y):
            s = pairs_add(pairs_zero(), a, broadcast4(y))
            s = pairs_add(s, b, broadcast4(y + 4))
            t = pairs_add(pairs_zero(), c, broadcast4(y + 8))
            t = pairs_add(t, d, broadcast4(y + 12))
            return pairs_sum(s) + pairs_sum(t)

    return dot


def _block_functions(format_):
    """(step, unpack, step_panel, panel_nbytes): how a block joins the sum, and how it is unpacked."""
    load = format_.load
    dot = dot_function(format_.bits)
    if format_.groups == 1:

        @inline
        def accumulate(w, y, k, n_blocks, acc):
            q, d, m = w
            at = y + k * 32
            yd = y + n_blocks * 32 + k * 8
            sum0 = to_f32(dot(q[0], q[1], q[2], q[3], at))
            sum1 = to_f32(dot(q[4], q[5], q[6], q[7], at + 16))
            acc = fma(sum0, d * broadcast_f32(yd), acc)
            acc = fma(sum1, d * broadcast_f32(yd + 4), acc)
            return fma(m, broadcast_f32(y + n_blocks * 40 + k * 4), acc)

        @inline
        def unpack(w, to):
            q, d, m = w
            store_panel_bytes(to, q)
            store_f32x8(to + 256, d)
            store_f32x8(to + 288, m)

        @inline
        def load_panel(at):
            return panel_bytes(at), load_f32x8(at + 256), load_f32x8(at + 288)

        return load, accumulate, unpack, load_panel, 320

    @inline
    def accumulate16(w, y, k, n_blocks, acc):
        q, d0, d1, m0, m1 = w
        at = y + k * 32
        yd = y + n_blocks * 32 + k * 8
        ys = y + n_blocks * 44 + k * 8
        sum0 = to_f32(dot(q[0], q[1], q[2], q[3], at))
        sum1 = to_f32(dot(q[4], q[5], q[6], q[7], at + 16))
        acc = fma(sum0, d0 * broadcast_f32(yd), acc)
        acc = fma(sum1, d1 * broadcast_f32(yd + 4), acc)
        acc = fma(m0, broadcast_f32(ys), acc)
        return fma(m1, broadcast_f32(ys + 4), acc)

    @inline
    def unpack16(w, to):
        q, d0, d1, m0, m1 = w
        store_panel_bytes(to, q)
        store_f32x8(to + 256, d0)
        store_f32x8(to + 288, d1)
        store_f32x8(to + 320, m0)
        store_f32x8(to + 352, m1)

    @inline
    def load_panel16(at):
        return (
            panel_bytes(at),
            load_f32x8(at + 256),
            load_f32x8(at + 288),
            load_f32x8(at + 320),
            load_f32x8(at + 352),
        )

    return load, accumulate16, unpack16, load_panel16, 384


@inline
def panel_bytes(at):
    return (
        load_bytes32(at),
        load_bytes32(at + 32),
        load_bytes32(at + 64),
        load_bytes32(at + 96),
        load_bytes32(at + 128),
        load_bytes32(at + 160),
        load_bytes32(at + 192),
        load_bytes32(at + 224),
    )


@inline
def store_panel_bytes(to, q):
    store_bytes32(to, q[0])
    store_bytes32(to + 32, q[1])
    store_bytes32(to + 64, q[2])
    store_bytes32(to + 96, q[3])
    store_bytes32(to + 128, q[4])
    store_bytes32(to + 160, q[5])
    store_bytes32(to + 192, q[6])
    store_bytes32(to + 224, q[7])


def _project_q8(format_):
    load, accumulate, unpack, load_panel, panel_nbytes = _block_functions(format_)
    group_nbytes = format_.nbytes  # of 256 columns
    prefetch_ahead = 3072

    @inline
    def one_token(out, y, w, n_blocks, residual, bias, row):
        """Rows of one group of 8, streamed from the packed weights."""
        acc = zero_f32x8()
        for k in range(n_blocks):
            at = w + k * (group_nbytes // 8) + prefetch_ahead
            prefetch(at)
            prefetch(at + 64)
            prefetch(at + 128)
            acc = accumulate(load(w, k), y, k, n_blocks, acc)
        _finish(out, acc, residual, bias, row)

    @inline
    def tile(out, out_stride, y, y_stride, panel, n_blocks, residual, bias, row):
        """8 rows x 4 tokens from the panel."""
        a = zero_f32x8()
        b = zero_f32x8()
        c = zero_f32x8()
        d = zero_f32x8()
        for k in range(n_blocks):
            w = load_panel(panel + k * panel_nbytes)
            a = accumulate(w, y, k, n_blocks, a)
            b = accumulate(w, y + y_stride, k, n_blocks, b)
            c = accumulate(w, y + 2 * y_stride, k, n_blocks, c)
            d = accumulate(w, y + 3 * y_stride, k, n_blocks, d)
        _finish(out, a, residual, bias, row)
        _finish(out + out_stride, b, residual, bias, row)
        _finish(out + 2 * out_stride, c, residual, bias, row)
        _finish(out + 3 * out_stride, d, residual, bias, row)

    @inline
    def tail(out, y, panel, n_blocks, residual, bias, row):
        acc = zero_f32x8()
        for k in range(n_blocks):
            acc = accumulate(load_panel(panel + k * panel_nbytes), y, k, n_blocks, acc)
        _finish(out, acc, residual, bias, row)

    def operation(
        step, part, first, count, scratch,
        out, out_stride, x, x_stride, w, bias, n_blocks, n_strips, per_part, residual,
    ):  # fmt: skip
        last = min(n_strips, (part + 1) * per_part)
        group = n_blocks * (group_nbytes // 8)
        for strip in range(part * per_part, last):
            base = w + strip * 4 * group
            if count < TILE:
                for t in range(first, first + count):
                    for g in range(4):
                        row = strip * STRIP + g * 8
                        to = out + t * out_stride + row * 4
                        one_token(
                            to, x + t * x_stride, base + g * group, n_blocks, residual, bias, row
                        )
            else:
                for g in range(4):
                    for k in range(n_blocks):
                        to = scratch + (g * n_blocks + k) * panel_nbytes
                        unpack(load(base + g * group, k), to)
                t = first
                while t < first + count:
                    for g in range(4):
                        row = strip * STRIP + g * 8
                        to = out + t * out_stride + row * 4
                        panel = scratch + g * n_blocks * panel_nbytes
                        y = x + t * x_stride
                        if t + TILE <= first + count:
                            tile(to, out_stride, y, x_stride, panel, n_blocks, residual, bias, row)
                        else:
                            for i in range(first + count - t):
                                tail(
                                    to + i * out_stride, y + i * x_stride,
                                    panel, n_blocks, residual, bias, row,
                                )  # fmt: skip
                    t += TILE

    return operation


# --- float formats --------------------------------------------------------------------------------
def _project_f32(format_):
    scale, load4 = format_.scale, format_.load4
    group_nbytes = format_.nbytes
    prefetch_ahead = 1024

    @inline
    def chain(w, y, acc):
        acc = fma(w[0], broadcast_f32(y), acc)
        acc = fma(w[1], broadcast_f32(y + 4), acc)
        acc = fma(w[2], broadcast_f32(y + 8), acc)
        return fma(w[3], broadcast_f32(y + 12), acc)

    @inline
    def one_token(out, y, w, group, n_blocks, residual, bias, row):
        """A strip: its four groups are four independent chains, which hides the latency of fma."""
        a = zero_f32x8()
        b = zero_f32x8()
        c = zero_f32x8()
        d = zero_f32x8()
        w1 = w + group
        w2 = w1 + group
        w3 = w2 + group
        for block in range(n_blocks):
            da = scale(w, block)
            db = scale(w1, block)
            dc = scale(w2, block)
            dd = scale(w3, block)
            ahead = block * (group_nbytes // 8) + prefetch_ahead
            for k in range(0, group_nbytes // 8, 64):
                prefetch(w + ahead + k)
                prefetch(w1 + ahead + k)
                prefetch(w2 + ahead + k)
                prefetch(w3 + ahead + k)
            for k in range(8):
                at = y + block * 128 + k * 16
                a = chain(load4(w, block, k, da), at, a)
                b = chain(load4(w1, block, k, db), at, b)
                c = chain(load4(w2, block, k, dc), at, c)
                d = chain(load4(w3, block, k, dd), at, d)
        _finish(out, a, residual, bias, row)
        _finish(out + 32, b, residual, bias, row + 8)
        _finish(out + 64, c, residual, bias, row + 16)
        _finish(out + 96, d, residual, bias, row + 24)

    def operation(
        step, part, first, count, scratch,
        out, out_stride, x, x_stride, w, bias, n_blocks, n_strips, per_part, residual,
    ):  # fmt: skip
        last = min(n_strips, (part + 1) * per_part)
        group = n_blocks * (group_nbytes // 8)
        for strip in range(part * per_part, last):
            base = w + strip * 4 * group
            row = strip * STRIP
            if count < TILE:
                for t in range(first, first + count):
                    to = out + t * out_stride + row * 4
                    one_token(to, x + t * x_stride, base, group, n_blocks, residual, bias, row)
            else:
                for pair in range(2):  # the panel: 16 rows, column by column
                    for half in range(2):
                        from_ = base + (2 * pair + half) * group
                        to = scratch + half * 32
                        for block in range(n_blocks):
                            d = scale(from_, block)
                            for k in range(8):
                                v = load4(from_, block, k, d)
                                at = to + (block * 32 + k * 4) * 64
                                store_f32x8(at, v[0])
                                store_f32x8(at + 64, v[1])
                                store_f32x8(at + 128, v[2])
                                store_f32x8(at + 192, v[3])
                    at_row = row + pair * 16
                    for t in range(first, first + count, 6):
                        multiply_f32(
                            out + t * out_stride + at_row * 4, out_stride,
                            x + t * x_stride, x_stride, scratch, n_blocks * 32,
                            min(6, first + count - t), residual, bias, at_row,
                        )  # fmt: skip

    return operation


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
        _finish2(out, a0, a1, residual, bias, row)
        _finish2(out + out_stride, b0, b1, residual, bias, row)
        _finish2(out + 2 * out_stride, c0, c1, residual, bias, row)
        _finish2(out + 3 * out_stride, d0, d1, residual, bias, row)
        _finish2(out + 4 * out_stride, e0, e1, residual, bias, row)
        _finish2(out + 5 * out_stride, f0, f1, residual, bias, row)
    else:
        for t in range(count):
            a0 = a1 = zero_f32x8()
            for k in range(n_cols):
                y = broadcast_f32(x + t * x_stride + k * 4)
                a0 = fma(load_f32x8(panel + k * 64), y, a0)
                a1 = fma(load_f32x8(panel + k * 64 + 32), y, a1)
            _finish2(out + t * out_stride, a0, a1, residual, bias, row)


@inline
def _finish2(out, low, high, residual, bias, row):
    _finish(out, low, residual, bias, row)
    _finish(out + 32, high, residual, bias, row + 8)


# --- rows of weights ------------------------------------------------------------------------------
def embed(format_name):
    """Return the operation `embed[format]`: the float row of each token id, times `factor`."""
    from .layout import STEP_IDS

    format_ = LOADS[format_name]
    if isinstance(format_, FloatFormat):
        scale, load4 = format_.scale, format_.load4

        @inline
        def columns(w, block, lane, to, scratch):
            d = scale(w, block)
            for k in range(8):
                v = load4(w, block, k, d)
                store_f32x8(scratch, v[0])
                store_f32x8(scratch + 32, v[1])
                store_f32x8(scratch + 64, v[2])
                store_f32x8(scratch + 96, v[3])
                for i in range(4):
                    store_f32(to + (4 * k + i) * 4, load_f32(scratch + i * 32 + lane * 4))
    else:
        load, _, unpack, _, _ = _block_functions(format_)
        groups = format_.groups

        @inline
        def columns(w, block, lane, to, scratch):
            unpack(load(w, block), scratch)
            for i in range(32):
                q = load_u8(scratch + (i // 4) * 32 + lane * 4 + i % 4)
                line = scratch + 256 + lane * 4
                if groups == 2:
                    line += (i // 16) * 32
                value = fma(
                    splat_f32(np.float32(q)),
                    splat_f32(load_f32(line)),
                    splat_f32(load_f32(line + groups * 32)),
                )
                store_f32(to + i * 4, first_lane(value))

    group_nbytes = format_.nbytes

    def operation(step, part, first, count, scratch, out, out_stride, w, n_blocks, factor: float):
        ids = load_i64(step + STEP_IDS)
        for t in range(first, first + count):
            token = load_i32(ids + 4 * t)
            base = w + (token // 8) * n_blocks * (group_nbytes // 8)
            to = out + t * out_stride
            for block in range(n_blocks):
                columns(base, block, token % 8, to + block * 128, scratch)
            if factor != np.float32(1.0):
                for block in range(n_blocks * 4):
                    at = to + block * 32
                    store_f32x8(at, load_f32x8(at) * splat_f32(factor))

    return operation
