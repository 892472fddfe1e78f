"""Projections of unsigned integer weights (up to 6 bits) by activations in bytes: see `matmul.py`.

Many tokens are multiplied tile by tile, 8 rows x 6 tokens.  Both sides lie in the thread's scratch in the
same layout, per 32 columns

    four byte vectors | F32x8 scale, twice (16 columns each) | two vectors for offsets or centres

a panel of weights (scales d, minimums m) for the rows of a part, and the tokens of a tile (scales yd, the
same in all lanes; their sums, which m or the centre is multiplied with), a chunk of columns at a time, so
that the tokens stay in the first cache while the rows pass by.  Every operand of a product is then a
register or memory as it stands: 24 instructions for 256 products, where broadcasting from the rows of
activations takes 35.
"""

from __future__ import annotations

import numpy as np

from .blocks import FORMATS, STRIP
from .epilogue import finish, finish2
from .formats import LOADS
from .layout import I8_NBYTES, I8_SCRATCH_NBYTES
from .simd import *
from .simd import inline
from .tiles import byte_tile_operations, tile_load, tile_operations

TILE = 6
"""Tokens of a tile: their sums, four vectors of weights, a scale and what is added up take 16 registers."""

CHUNK = 8
"""Blocks of 32 columns at a time: the tokens of a tile take 18 KB."""

STRIPS = 8
"""Strips of 32 rows at a time: spreading tokens out costs a twentieth of multiplying them by so many."""

ROUND = 86 * TILE
"""Tokens at a time: their sums stay in scratch while the chunks pass by, so 512 should be one round."""

assert I8_SCRATCH_NBYTES >= 384 * CHUNK * (TILE + 4 * STRIPS) + 32 * ROUND * 4 * STRIPS

load_sums = tile_load("f32", TILE)
zero_sums, _, _, store_sums = tile_operations(1, TILE)


def _block_functions(format_):
    """(accumulate, unpack, spread, multiply, nbytes): what is done with a block.

    `accumulate` joins it to a sum, `unpack` writes it into a panel and `spread` one of activations
    beside it, in `nbytes` each; `multiply` adds their products to a tile.
    """
    kinds = (_centred, _with_minimum, _with_minimums)
    nbytes = 384 if format_.minimums != 1 else 352
    operations = byte_tile_operations(TILE, format_.bits, nbytes)
    return *kinds[format_.minimums](format_, dot16(format_.bits), *operations), nbytes


def _centred(format_, dot, add, add_centred, add_offset):
    centre = format_.centre
    write_centre = centre16(centre)

    @inline
    def accumulate(w, y, acc):
        q, d0, d1 = w
        sum0 = dot(q[0], q[1], q[2], q[3], y) - broadcast_i32(y + 40) * splat_i32(centre)
        sum1 = dot(q[4], q[5], q[6], q[7], y + 16) - broadcast_i32(y + 44) * splat_i32(centre)
        acc = fma(to_f32(sum0), d0 * broadcast_f32(y + 32), acc)
        return fma(to_f32(sum1), d1 * broadcast_f32(y + 36), acc)

    @inline
    def unpack(w, to):
        q, d0, d1 = w
        store_half(to, q[0], q[1], q[2], q[3], d0)
        store_half(to + 160, q[4], q[5], q[6], q[7], d1)

    @inline
    def spread(y, to):
        spread_halves(y, to)
        write_centre(to + 320, y, load_i32(y + 40))
        write_centre(to + 352, y + 16, load_i32(y + 44))

    @inline
    def multiply(sums, w, y):
        sums = add_centred(sums, w, y, y + 320)
        return add_centred(sums, w + 160, y + 160, y + 352)

    return accumulate, unpack, spread, multiply


def _with_minimum(format_, dot, add, add_centred, add_offset):
    @inline
    def accumulate(w, y, acc):
        q, d, m = w
        sum0 = to_f32(dot(q[0], q[1], q[2], q[3], y))
        sum1 = to_f32(dot(q[4], q[5], q[6], q[7], y + 16))
        acc = fma(sum0, d * broadcast_f32(y + 32), acc)
        acc = fma(sum1, d * broadcast_f32(y + 36), acc)
        return fma(m, broadcast_f32(y + 48), acc)

    @inline
    def unpack(w, to):
        q, d, m = w
        store_half(to, q[0], q[1], q[2], q[3], d)
        store_half(to + 160, q[4], q[5], q[6], q[7], d)
        store_f32x8(to + 320, m)

    @inline
    def spread(y, to):
        spread_halves(y, to)
        store_f32x8(to + 320, broadcast_f32(y + 48))

    @inline
    def multiply(sums, w, y):
        sums = add(sums, w, y)
        sums = add(sums, w + 160, y + 160)
        return add_offset(sums, w + 320, y + 320)

    return accumulate, unpack, spread, multiply


def _with_minimums(format_, dot, add, add_centred, add_offset):
    @inline
    def scaled_sum(y, half):
        return broadcast_f32(y + 32 + half * 4) * to_f32(broadcast_i32(y + 40 + half * 4))

    @inline
    def accumulate(w, y, acc):
        q, d0, d1, m0, m1 = w
        sum0 = to_f32(dot(q[0], q[1], q[2], q[3], y))
        sum1 = to_f32(dot(q[4], q[5], q[6], q[7], y + 16))
        acc = fma(sum0, d0 * broadcast_f32(y + 32), acc)
        acc = fma(sum1, d1 * broadcast_f32(y + 36), acc)
        acc = fma(m0, scaled_sum(y, 0), acc)
        return fma(m1, scaled_sum(y, 1), acc)

    @inline
    def unpack(w, to):
        q, d0, d1, m0, m1 = w
        store_half(to, q[0], q[1], q[2], q[3], d0)
        store_half(to + 160, q[4], q[5], q[6], q[7], d1)
        store_f32x8(to + 320, m0)
        store_f32x8(to + 352, m1)

    @inline
    def spread(y, to):
        spread_halves(y, to)
        store_f32x8(to + 320, scaled_sum(y, 0))
        store_f32x8(to + 352, scaled_sum(y, 1))

    @inline
    def multiply(sums, w, y):
        sums = add(sums, w, y)
        sums = add(sums, w + 160, y + 160)
        sums = add_offset(sums, w + 320, y + 320)
        return add_offset(sums, w + 352, y + 352)

    return accumulate, unpack, spread, multiply


@inline
def spread_halves(y, to):
    spread16(to, y)
    store_f32x8(to + 128, broadcast_f32(y + 32))
    spread16(to + 160, y + 16)
    store_f32x8(to + 288, broadcast_f32(y + 36))


@inline
def store_half(to, a, b, c, d, scale):
    store_bytes32(to, a)
    store_bytes32(to + 32, b)
    store_bytes32(to + 64, c)
    store_bytes32(to + 96, d)
    store_f32x8(to + 128, scale)


def strip_functions(format_name):
    """(stream, batch): a strip of 32 rows for one token from the packed form, and many for many."""
    format_ = LOADS[format_name]
    load = format_.load
    accumulate, unpack, spread, multiply, nbytes = _block_functions(format_)
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
    def batch(
        out, out_stride, y, y_stride, count, w, group, n_blocks, scratch, residual, bias,
        first_strip, last_strip,
    ):  # fmt: skip
        for strip in range(first_strip, last_strip, STRIPS):
            n_groups = 4 * min(STRIPS, last_strip - strip)
            for first in range(0, count, ROUND):
                multiply_round(
                    out, out_stride, y, y_stride, count, first, min(count, first + ROUND),
                    w + strip * 4 * group, group, n_blocks, scratch, residual, bias, strip * STRIP,
                    n_groups,
                )  # fmt: skip

    @inline
    def multiply_round(
        out, out_stride, y, y_stride, count, first, end, packed, group, n_blocks, scratch,
        residual, bias, row, n_groups,
    ):  # fmt: skip
        """Tokens [first, end) times `n_groups` groups; the last tile may overlap the one before."""
        tokens = scratch
        panel = tokens + TILE * CHUNK * nbytes
        sums = panel + n_groups * CHUNK * nbytes
        for block in range(0, n_blocks, CHUNK):
            n = min(CHUNK, n_blocks - block)
            for g in range(n_groups):
                for k in range(n):
                    # A chunk of a group is too short for the CPU to see what will be read next.
                    ahead = packed + (g + 3) * group + (block + k) * block_nbytes
                    for i in range(0, block_nbytes, 64):
                        prefetch(ahead + i)
                    to = panel + (g * CHUNK + k) * nbytes
                    unpack(load(packed + g * group, block + k), to)
            at = sums
            for t in range(first, end, TILE):
                start = min(t, count - TILE)
                for i in range(TILE):
                    x = y + (start + i) * y_stride + block * I8_NBYTES
                    for k in range(n):
                        spread(x + k * I8_NBYTES, tokens + (k * TILE + i) * nbytes)
                for g in range(n_groups):
                    w = panel + g * CHUNK * nbytes
                    x = tokens
                    tile = zero_sums() if block == 0 else load_sums(at)
                    for _ in range(n):
                        tile = multiply(tile, w, x)
                        w += nbytes
                        x += TILE * nbytes
                    store_sums(at, 0, tile)
                    if block + n == n_blocks:
                        for i in range(t - start, TILE):
                            to = out + (start + i) * out_stride + (row + g * 8) * 4
                            finish(to, load_f32x8(at + i * 32), residual, bias, row + g * 8)
                    at += TILE * 32

    return stream, batch


def row_function(format_name):
    """columns(w, block, lane, to, scratch): 32 weights of row `lane` of a group as floats."""
    format_ = LOADS[format_name]
    load = format_.load
    _, unpack, *_ = _block_functions(format_)
    centre = format_.centre
    minimums = format_.minimums

    @inline
    def columns(w, block, lane, to, scratch):
        unpack(load(w, block), scratch)
        for i in range(32):
            half = i // 16
            at = scratch + half * 160
            q = load_u8(at + (i % 16 // 4) * 32 + lane * 4 + i % 4) - centre
            d = load_f32(at + 128 + lane * 4)
            value = np.float32(q) * d
            if minimums != 0:
                m = scratch + 320 + lane * 4 + half * 32 * (minimums - 1)
                value = first_lane(
                    fma(splat_f32(np.float32(q)), splat_f32(d), splat_f32(load_f32(m)))
                )
            store_f32(to + i * 4, value)

    return columns
